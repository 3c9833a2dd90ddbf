"""Benchmarks against other embedding software: run each module as ``python -m benchmarks.NAME``; it prints tables.

Absolute figures mean little on shared machines. Contenders therefore run in separate processes, take turns within one
run, and are compared by medians. `RESULTS.md` records the results, with machine and date.
"""
