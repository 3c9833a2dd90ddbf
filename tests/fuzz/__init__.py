"""Fuzzing with thousands of requests generated from our OpenAPI document: ``python -m tests.fuzz SCHEMATHESIS``."""
