"""A deployment file brought up, supervised, and taken down. No torch."""
