"""Ways for bytes to cross: in one process, over TCP."""
