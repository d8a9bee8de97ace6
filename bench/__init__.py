"""Benchmarks: check against a reference, then time, in one run. ``python -m bench --help``."""
