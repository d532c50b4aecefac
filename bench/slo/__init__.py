"""What clients see of a server under load, and whether it meets its objectives."""
