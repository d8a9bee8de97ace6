"""Causal tracing: exact, estimated, and what comes of it."""
