"""A soak test of the server: ``python -m tests.soak``."""
