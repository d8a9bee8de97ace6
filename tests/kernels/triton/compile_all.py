"""Compiles every Triton kernel for GPUs that are not there and prints what ptxas says of it, as JSON.

Run as ``python -m tests.kernels.triton.compile_all`` without TRITON_INTERPRET: interpreted kernels do not compile.
Each row: {"kernel", "capability", "registers", "spill_stores", "spill_loads" (bytes), "shared" (bytes)}.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

MODULES = ("attention", "attention_backward", "target_logprob", "rows", "lowrank", "second_moment", "pointwise")
CAPABILITIES = (80, 90)


def cases() -> list[tuple]:
    """(name, kernel, argument types, constexprs, options) of every module."""
    modules = [importlib.import_module(f"kedit_fast.kernels.triton.{name}") for name in MODULES]
    return [case for module in modules for case in module.compile_cases()]


def compile_for(capability: int, kernel, types: dict, constexprs: dict, options: dict):
    """The kernel compiled as a launch with such arguments would compile it."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind, _, divisor = ("constexpr" if name in constexprs else types[name]).partition(":")
        signature[name] = kind
        if divisor == "16" or (kind.startswith("*") and not divisor):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled, capability: int) -> dict:
    """What ptxas needs for the compiled PTX; the metadata of Triton has it only after loading on a device."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        target = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [get_ptxas(capability).path, "-v", target, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spill_stores": int(stores),
        "spill_loads": int(loads),
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    rows = []
    for name, kernel, types, constexprs, options in cases():
        for capability in CAPABILITIES:
            compiled = compile_for(capability, kernel, types, constexprs, options)
            rows.append({"kernel": name, "capability": capability, **resources(compiled, capability)})
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
