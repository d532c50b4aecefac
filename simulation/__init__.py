"""An engine without tensors that keeps honest KV. No torch."""
