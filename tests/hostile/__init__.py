"""Hostile inputs, by the hundred: ``python -m tests.hostile`` gives each a verdict and fails if one is wrong."""
