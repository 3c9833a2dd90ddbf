"""The server under fire for minutes: ``python -m tests.soak``."""
