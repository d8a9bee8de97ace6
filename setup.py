"""Builds the native extension; everything else is declared in pyproject.toml.

KEDIT_FAST_NATIVE=0 leaves it out, =1 makes a failed build an error. Unset: it is built where a compiler is found, and
a machine without one gets the pure-Python package (`kedit-fast info` says which).
"""

import os
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError

HERE = Path(__file__).resolve().parent
SOURCES = [
    "csrc/attention.cpp",
    "csrc/bindings.cpp",
    "csrc/linear.cpp",
    "csrc/pointwise.cpp",
    "csrc/second_moment.cpp",
]
HEADERS = [
    "csrc/attention.h",
    "csrc/attention_rows.h",
    "csrc/each_instruction_set.h",
    "csrc/linear.h",
    "csrc/pointwise.h",
    "csrc/pointwise_rows.h",
    "csrc/second_moment.h",
    "csrc/second_moment_tiles.h",
    "csrc/team.h",
    "csrc/vector_functions.h",
    "csrc/vectors.h",
]


class BuildNative(build_ext):
    """Adds the flags that this compiler takes. Never -march=native: the code picks its instructions at run time."""

    def build_extension(self, ext):
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args += ["/std:c++17", "/O2", "/EHsc"]
        else:
            ext.extra_compile_args += ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
        for flags in _openmp_candidates(self.compiler.compiler_type):
            if self._builds(flags):
                ext.extra_compile_args += flags
                ext.extra_link_args += [flag for flag in flags if not flag.startswith("/")]
                break
        super().build_extension(ext)

    def _builds(self, flags):
        """Whether a parallel loop compiles and links with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("int main() {\n#pragma omp parallel\n  {}\n  return 0;\n}\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                link_flags = [flag for flag in flags if not flag.startswith("/")]
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=link_flags)
            except (CompileError, LinkError, ExecError):
                return False
        return True


def _openmp_candidates(compiler_type):
    if compiler_type == "msvc":
        return [["/openmp"]]
    # torch brings its own libomp on macOS, and a second copy in the process aborts it: one thread there.
    return [] if sys.platform == "darwin" else [["-fopenmp"]]


def _extensions(wanted):
    """The extension, or nothing; ``wanted`` is the value of KEDIT_FAST_NATIVE."""
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"KEDIT_FAST_NATIVE={wanted}: expected 0 (leave out), 1 (must build) or unset")
    if wanted == "0":
        return []
    try:
        import pybind11
    except ImportError:
        if wanted == "1":
            raise
        print("kedit_fast: pybind11 is not installed, so the native extension is left out", file=sys.stderr)
        return []
    return [
        Extension(
            "kedit_fast._native",
            sources=SOURCES,
            depends=HEADERS,
            include_dirs=[pybind11.get_include()],
            language="c++",
            optional=wanted != "1",
        )
    ]


def _remove_stale():
    """An in-place module of an earlier build would go on being imported."""
    for pattern in ("_native*.so", "_native*.pyd"):
        for module in (HERE / "kedit_fast").glob(pattern):
            module.unlink()


if __name__ == "__main__":
    wanted = os.environ.get("KEDIT_FAST_NATIVE", "")
    if wanted == "0":
        _remove_stale()
    setup(ext_modules=_extensions(wanted), cmdclass={"build_ext": BuildNative})
