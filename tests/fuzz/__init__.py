"""Mutated files, by the thousand, for everything that reads files which others may have written.

``python -m tests.fuzz --minutes 10`` runs on and on; ``test_fuzz.py`` runs a few of fixed seeds.
"""
