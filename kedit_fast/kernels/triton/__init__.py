"""Triton twins of the ops, a file for each under the op's stem; imported by the op when it runs on Triton.

Triton is optional, and ``@triton.jit`` needs it at import: no other file of the package imports these when it loads.
Every file gives ``compile_cases()``, the specialisations of its kernels that are launched: a list of

    (name, kernel, argument types, constexprs, options)

with types as in a Triton signature ("*bf16", "i32"; pointers are taken as aligned to 16 bytes unless they end in ":1",
and "i32:16" is an integer known to be divisible by 16), constexprs also for integers that Triton specialises on being
1, and the options of the launch. tests/kernels/triton/compile_all.py compiles them for GPUs that are not there.
"""
