"""``kedit-fast info``: everything it says, and that nothing stops it."""

import json

import torch

import kedit_fast as kf
from kedit_fast.commands import info


def test_info(model, work, said):
    shown = said("info", "--model", model, "-o", "info.json")
    found = json.loads((work / "info.json").read_text())
    for name in ("python", "packages", "devices", "native extension", "triton", "threads", "instruction sets", "cache"):
        assert name in found and name in shown
    assert found["kedit-fast"] == kf.__version__ and torch.__version__ in found["packages"]
    assert found["model"]["fingerprint"] == kf.open_model(model).fingerprint
    assert not any(str(value).startswith("unknown") for value in found.values())


def test_info_says_which_build_of_torch_this_is(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu999")
    assert "torch 2.99.0+cu999, transformers" in info._packages()


def test_nothing_in_info_fails(work, said, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "abacus")
    monkeypatch.setattr(info, "LINES", (("torn", lambda: 1 / 0), *info.LINES))
    shown = said("info", "--model", "./none")
    assert "KEDIT_FAST_BACKEND=abacus: expected one of" in shown and "unknown: ZeroDivisionError" in shown
    assert "no such folder" in shown and "python" in shown
