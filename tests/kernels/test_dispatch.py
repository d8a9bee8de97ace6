"""Which backend runs, what forcing one does, and that the package works without its extension."""

import sys
from types import SimpleNamespace

import pytest
import torch

from kedit_fast.kernels import dispatch
from kedit_fast.kernels.second_moment import second_moment_, second_moment_ref

ABSENT = "the extension was not built"


@pytest.fixture
def force(monkeypatch):
    """Sets or unsets KEDIT_FAST_BACKEND for the test."""

    def set_backend(name):
        if name is None:
            monkeypatch.delenv("KEDIT_FAST_BACKEND", raising=False)
        else:
            monkeypatch.setenv("KEDIT_FAST_BACKEND", name)

    set_backend(None)
    return set_backend


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(dispatch, "_load_native", lambda: (None, ABSENT))


@pytest.fixture
def with_native(monkeypatch):
    """A stand-in where the extension is not built: only the choice is tested here."""
    module = SimpleNamespace(instruction_sets=lambda: ["plain"], has_openmp=lambda: True, is_amd=lambda: False)
    monkeypatch.setattr(dispatch, "_load_native", lambda: (module, ""))


def test_device_and_dtype_decide(force, with_native):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert dispatch.backend_for("second_moment", "cpu", dtype) == "native"
    assert dispatch.backend_for("second_moment", "cpu", torch.float64) == "reference"
    assert dispatch.backend_for("rows", "cpu", torch.float32) == "reference"


def test_without_extension_the_reference_runs(force, without_native):
    assert dispatch.native() is None
    assert dispatch.why_not_native() == ABSENT
    assert dispatch.backend_for("second_moment", "cpu", torch.float32) == "reference"
    keys = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    c, expected = torch.zeros(6, 6), torch.zeros(6, 6)
    assert torch.equal(second_moment_(c, keys), second_moment_ref(expected, keys))
    assert dispatch.report()["native"] == ABSENT


def test_forced_reference(force, with_native):
    force("reference")
    assert dispatch.backend_for("second_moment", "cpu", torch.float32) == "reference"


def test_forced_native(force, with_native):
    force("native")
    assert dispatch.backend_for("second_moment", "cpu", torch.bfloat16) == "native"
    assert dispatch.backend_for("rows", "cpu", torch.float32) == "reference", "an op without native code"
    with pytest.raises(ValueError, match=r"no native implementation for torch.float64 on cpu"):
        dispatch.backend_for("second_moment", "cpu", torch.float64)
    with pytest.raises(ValueError, match=r"no native implementation for torch.float32 on cuda"):
        dispatch.backend_for("second_moment", "cuda", torch.float32)


def test_forced_but_missing(force, without_native):
    force("native")
    with pytest.raises(ValueError, match=f"KEDIT_FAST_BACKEND=native cannot run here: {ABSENT}"):
        dispatch.backend_for("second_moment", "cpu", torch.float32)


@pytest.fixture
def triton(monkeypatch):
    """Sets whether Triton is installed and whether it interprets."""

    def set_triton(installed=True, interprets=False):
        monkeypatch.setattr(dispatch, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interprets else "0")

    return set_triton


def test_triton_serves_gpus(force, with_native, triton):
    triton()
    for op in ("rows", "lowrank", "second_moment"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert dispatch.backend_for(op, "cuda:1", dtype) == "triton"
            assert dispatch.backend_for(op, "cpu", dtype) != "triton"
    assert dispatch.backend_for("rows", "cuda", torch.float64) == "triton"
    assert dispatch.backend_for("lowrank", "cuda", torch.float64) == "reference"
    assert dispatch.backend_for("second_moment", "cuda", torch.float64) == "reference"
    force("reference")
    assert dispatch.backend_for("rows", "cuda", torch.float32) == "reference"


def test_without_triton_the_reference_serves_gpus_and_says_so(force, with_native, triton):
    triton(installed=False)
    assert dispatch.backend_for("rows", "cuda", torch.float32) == "reference"
    assert dispatch.report()["triton"] == "Triton is not installed; pip install triton"
    triton()
    assert dispatch.report()["triton"] is True
    triton(installed=False)
    force("triton")
    with pytest.raises(ValueError, match="KEDIT_FAST_BACKEND=triton cannot run here: Triton is not installed"):
        dispatch.backend_for("rows", "cuda", torch.float32)


def test_the_interpreter_runs_only_where_it_is_forced(force, with_native, triton):
    triton(interprets=True)
    assert dispatch.backend_for("rows", "cpu", torch.float32) == "reference"
    assert dispatch.backend_for("rows", "cuda", torch.float32) == "reference"
    force("triton")
    assert dispatch.backend_for("rows", "cpu", torch.float32) == "triton"
    assert dispatch.backend_for("solve", "cpu", torch.float64) == "reference", "an op without a Triton kernel"
    with pytest.raises(ValueError, match=r"lowrank has no triton implementation for torch.float64 on cpu"):
        dispatch.backend_for("lowrank", "cpu", torch.float64)
    assert dispatch.report()["ops"]["lowrank"]["cpu"]["float64"] == "none"
    triton()
    with pytest.raises(ValueError, match=r"rows cannot run here: Triton runs on the CPU only under TRITON_INTERPRET=1"):
        dispatch.backend_for("rows", "cpu", torch.float32)


@pytest.mark.parametrize("op", ["second_moment", "rows"])
def test_unknown_name(op, force, with_native):
    force("fast")
    with pytest.raises(ValueError, match="KEDIT_FAST_BACKEND=fast: expected one of reference, native, triton"):
        dispatch.backend_for(op, "cpu", torch.float32)


def test_report(force, with_native):
    found = dispatch.report()
    assert found["native"] is True
    assert found["instruction_sets"] == ["plain"]
    assert found["threads"] == torch.get_num_threads()
    expected = {"float64": "reference", "float32": "native", "float16": "native", "bfloat16": "native"}
    assert found["ops"]["second_moment"]["cpu"] == expected
    force("native")
    assert dispatch.report()["ops"]["second_moment"]["cpu"]["float64"] == "none"


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


def test_report_says_why_a_backend_is_not_taken(force, without_native, monkeypatch):
    monkeypatch.setattr(dispatch.openblas, "why_not", lambda: "no OpenBLAS here")
    not_used = dispatch.report()["not_used"]
    assert not_used["second_moment"]["cpu"] == f"native: {ABSENT}"
    assert not_used["solve"]["cpu"] == "native: no OpenBLAS here"
    assert not_used["attention"]["cpu"] == ""


def test_report_says_why_a_backend_is_not_chosen(force, with_native, monkeypatch):
    monkeypatch.setattr(dispatch.openblas, "why_not", str)
    not_used = dispatch.report()["not_used"]
    assert "not AMD's" in not_used["linear"]["cpu"] and not_used["second_moment"]["cpu"] == ""
