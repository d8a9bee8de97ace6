"""A fact, the files that facts come from, and how a model reads one."""
