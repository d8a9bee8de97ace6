#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary copy of the package, and runs
# the tests of the native ops there. Tensors come from malloc, so reads and writes beside them are seen too.
#   PYTHON: the interpreter that has the package's dependencies (default python); CXX: g++ (default)
#   arguments: what pytest shall run instead
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python}")
compiler=${CXX:-g++}
tests=("$@")
[ $# -gt 0 ] || tests=(tests/kernels/test_{second_moment,linear,pointwise,native_attention,solve}.py)

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r csrc kedit_fast tests setup.py pyproject.toml README.md LICENSE "$copy"
rm -f "$copy"/kedit_fast/_native*
cd "$copy"

flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
# In the command and not in CFLAGS: setup.py also links a probe, which decides whether there is OpenMP.
env KEDIT_FAST_NATIVE=1 CC="$compiler $flags" CXX="$compiler $flags" "$python" setup.py -q build_ext --inplace

# Python itself is not instrumented: the sanitizers have to be there first, and with them what throws C++ exceptions.
preload=""
for library in libasan.so libubsan.so libstdc++.so.6; do
    preload+="$("$compiler" -print-file-name="$library") "
done
# No report of leaks, since the interpreter keeps much to its end; no capture, which would swallow the report of an error.
env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
    OMP_NUM_THREADS=1 PYTHONPATH="$copy" "$python" -m pytest -q -s -p no:cacheprovider "${tests[@]}"
