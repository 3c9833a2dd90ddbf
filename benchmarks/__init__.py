"""How fast, beside others: every module here is run as ``python -m benchmarks.NAME`` and prints tables.

A figure is worth what stands beside it: contenders run in processes of their own, take turns in one run, and are
compared by medians. `RESULTS.md` keeps what was measured, where and when.
"""
