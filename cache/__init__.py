"""Block accounting and the prefix cache: which block is whose. No torch."""
