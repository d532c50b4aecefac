"""A worker process: an engine, both phases, sockets."""
