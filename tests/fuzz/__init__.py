"""Requests by the thousand, made from our own OpenAPI document: ``python -m tests.fuzz SCHEMATHESIS``."""
