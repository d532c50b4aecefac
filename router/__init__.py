"""The front: REST, tokenizer, placement, membership, failover. No torch."""
