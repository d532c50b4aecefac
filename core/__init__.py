"""What every room shares: ids, configuration, messages, errors, the engine protocol. No torch."""
