"""Numeric operations: each file holds a public op, its plain torch reference and, where there is one, its kernel.

``dispatch`` says which implementation runs. The compiled twins of these files lie in ``csrc/`` and ``triton/``, under
the same stem; ``openblas`` holds the routines of the library that numpy brings.
"""
