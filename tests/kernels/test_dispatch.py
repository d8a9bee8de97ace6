"""Which backend runs, what forcing one does, and that the package works without its extension."""

import sys
from types import SimpleNamespace

import pytest
import torch

from kedit_fast.kernels import dispatch
from kedit_fast.kernels.second_moment import second_moment_, second_moment_ref

ABSENT = "the extension was not built"


@pytest.fixture
def machine(monkeypatch):
    """Sets what is there (words: native, triton, and interpreter, where Triton interprets) and what is forced.

    The extension is a stand-in: only the choice is tested here.
    """

    def set_up(there, forced=None):
        module = SimpleNamespace(instruction_sets=lambda: ["plain"], has_openmp=lambda: True, is_amd=lambda: False)
        monkeypatch.setattr(dispatch, "_load_native", lambda: (module, "") if "native" in there else (None, ABSENT))
        monkeypatch.setattr(dispatch, "find_spec", lambda name: object() if "triton" in there else None)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if "interpreter" in there else "0")
        monkeypatch.delenv("KEDIT_FAST_BACKEND", raising=False)
        if forced:
            monkeypatch.setenv("KEDIT_FAST_BACKEND", forced)

    return set_up


BITS_16_AND_32 = "float32 float16 bfloat16"
ALL, INTERPRETED = "native triton", "native triton interpreter"


@pytest.mark.parametrize(
    ("there", "forced", "op", "device", "dtypes", "runs"),
    [
        ("native", None, "second_moment", "cpu", BITS_16_AND_32, "native"),
        ("native", None, "second_moment", "cpu", "float64", "reference"),
        ("native", None, "rows", "cpu", "float32", "reference"),
        ("native", "reference", "second_moment", "cpu", "float32", "reference"),
        ("native", "native", "second_moment", "cpu", "bfloat16", "native"),
        ("native", None, "pointwise", "cpu", "float32", "native"),
        ("native", None, "pointwise", "cpu", "float16 bfloat16 float64", "reference"),
        ("native", None, "attention", "cpu", "float32", "native"),
        ("native", None, "attention", "cpu", "float16 bfloat16 float64", "reference"),
        ("native", "native", "rows", "cpu", "float32", "reference"),  # an op without native code
        (ALL, None, "rows", "cuda:1", f"{BITS_16_AND_32} float64", "triton"),
        (ALL, None, "lowrank", "cuda:1", BITS_16_AND_32, "triton"),
        (ALL, None, "pointwise", "cuda:1", BITS_16_AND_32, "triton"),
        (ALL, None, "pointwise", "cpu", "float32", "native"),
        (ALL, None, "attention", "cuda:1", BITS_16_AND_32, "triton"),
        (ALL, None, "attention", "cpu", "float32", "native"),
        (ALL, None, "second_moment", "cuda:1", BITS_16_AND_32, "triton"),
        (ALL, None, "rows", "cpu", BITS_16_AND_32, "reference"),
        (ALL, None, "lowrank", "cpu", BITS_16_AND_32, "reference"),
        (ALL, None, "second_moment", "cpu", BITS_16_AND_32, "native"),
        (ALL, None, "lowrank", "cuda", "float64", "reference"),
        (ALL, None, "second_moment", "cuda", "float64", "reference"),
        (ALL, "reference", "rows", "cuda", "float32", "reference"),
        ("native", None, "rows", "cuda", "float32", "reference"),
        (INTERPRETED, None, "rows", "cpu", "float32", "reference"),
        (INTERPRETED, None, "rows", "cuda", "float32", "reference"),
        (INTERPRETED, None, "attention", "cpu", "float32", "native"),
        (INTERPRETED, "triton", "rows", "cpu", "float32", "triton"),
        (INTERPRETED, "triton", "attention", "cpu", "float32", "triton"),
        (INTERPRETED, "triton", "solve", "cpu", "float64", "reference"),  # an op without a Triton kernel
    ],
)
def test_what_runs(there, forced, op, device, dtypes, runs, machine):
    machine(there, forced)
    for dtype in dtypes.split():
        assert dispatch.backend_for(op, device, getattr(torch, dtype)) == runs


@pytest.mark.parametrize(
    ("there", "forced", "op", "device", "dtype", "says"),
    [
        (
            "native",
            "native",
            "second_moment",
            "cpu",
            "float64",
            "has no native implementation for torch.float64 on cpu",
        ),
        ("native", "native", "second_moment", "cuda", "float32", "no native implementation for torch.float32 on cuda"),
        ("", "native", "second_moment", "cpu", "float32", f"KEDIT_FAST_BACKEND=native cannot run here: {ABSENT}"),
        ("native", "triton", "rows", "cuda", "float32", "=triton cannot run here: Triton is not installed"),
        (INTERPRETED, "triton", "lowrank", "cpu", "float64", "lowrank has no triton implementation for torch.float64"),
        (ALL, "triton", "rows", "cpu", "float32", "rows cannot run here: Triton runs on the CPU only under TRITON_INT"),
        ("native", "fast", "second_moment", "cpu", "float32", "=fast: expected one of reference, native, triton"),
        ("native", "fast", "rows", "cpu", "float32", "=fast: expected one of reference, native, triton"),
    ],
)
def test_what_is_forced_and_cannot_be_had_is_an_error(there, forced, op, device, dtype, says, machine):
    machine(there, forced)
    with pytest.raises(ValueError, match=says):
        dispatch.backend_for(op, device, getattr(torch, dtype))


def test_without_extension_the_reference_runs(machine):
    machine("")
    assert dispatch.native() is None
    assert dispatch.why_not_native() == ABSENT
    assert dispatch.backend_for("second_moment", "cpu", torch.float32) == "reference"
    keys = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    c, expected = torch.zeros(6, 6), torch.zeros(6, 6)
    assert torch.equal(second_moment_(c, keys), second_moment_ref(expected, keys))


def test_report(machine):
    machine("native")
    found = dispatch.report()
    assert (found["native"], found["instruction_sets"], found["threads"]) == (True, ["plain"], torch.get_num_threads())
    expected = {"float64": "reference", "float32": "native", "float16": "native", "bfloat16": "native"}
    assert found["ops"]["second_moment"]["cpu"] == expected
    assert found["triton"] == "Triton is not installed; pip install triton"
    machine(ALL, "native")
    assert dispatch.report()["ops"]["second_moment"]["cpu"]["float64"] == "none"
    assert dispatch.report()["triton"] is True
    machine(INTERPRETED, "triton")
    assert dispatch.report()["ops"]["lowrank"]["cpu"]["float64"] == "none"


def test_report_says_why_a_backend_is_not_used(machine, monkeypatch):
    machine("")
    monkeypatch.setattr(dispatch.openblas, "why_not", lambda: "no OpenBLAS here")
    assert dispatch.report()["native"] == ABSENT
    not_used = dispatch.report()["not_used"]
    assert not_used["second_moment"]["cpu"] == f"native: {ABSENT}"
    assert not_used["solve"]["cpu"] == "native: no OpenBLAS here"
    assert not_used["attention"]["cpu"] == f"native: {ABSENT}" and not_used["rows"]["cpu"] == ""
    machine("native")
    monkeypatch.setattr(dispatch.openblas, "why_not", str)
    not_used = dispatch.report()["not_used"]
    assert "not AMD's" in not_used["linear"]["cpu"] and not_used["second_moment"]["cpu"] == ""


def load_with(monkeypatch, module):
    """What the loader says when ``kedit_fast._native`` is ``module`` (None: cannot be imported)."""
    import kedit_fast

    monkeypatch.setitem(sys.modules, "kedit_fast._native", module)
    if module is None:
        monkeypatch.delattr(kedit_fast, "_native", raising=False)
    else:
        monkeypatch.setattr(kedit_fast, "_native", module, raising=False)
    return dispatch._load_native.__wrapped__()


def test_missing_module_is_explained(monkeypatch):
    module, reason = load_with(monkeypatch, None)
    assert module is None
    assert "KEDIT_FAST_NATIVE=1 pip install ." in reason


def test_module_of_other_sources_is_refused(monkeypatch):
    module, reason = load_with(monkeypatch, SimpleNamespace(interface=0, __file__="_native.so"))
    assert module is None
    assert "interface 0" in reason
    assert load_with(monkeypatch, SimpleNamespace(interface=dispatch.INTERFACE, __file__="_native.so"))[1] == ""


def test_built_extension_is_the_one_the_package_needs():
    if dispatch.native() is None:
        pytest.skip(f"no extension: {dispatch.why_not_native()}")
    assert dispatch.native().instruction_sets()[-1] == "plain"
