"""Slow, obviously right causal tracing, ROME and MEMIT over Hugging Face models and torch hooks.

Written from the papers' formulas, one fact and one forward at a time, and independent of the package: nothing here
imports it. The package's results are compared with these.
"""
