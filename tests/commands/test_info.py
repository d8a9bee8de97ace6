"""``kedit-fast info``: everything it says, and that nothing stops it."""

import json

import torch

import kedit_fast as kf
from kedit_fast.commands import info
from kedit_fast.model.smollm2 import SMOLLM2
from tests.shipping.checkpoints import save_checkpoint


def test_info(model, work, said):
    shown = said("info", "--model", model, "-o", "info.json")
    found = json.loads((work / "info.json").read_text())
    for name in ("python", "packages", "devices", "native extension", "triton", "threads", "instruction sets", "cache"):
        assert name in found and name in shown
    assert found["kedit-fast"] == kf.__version__ and torch.__version__ in found["packages"]
    assert found["model"]["fingerprint"] == kf.open_model(model).fingerprint
    assert found["model"]["layers that mend, malmen, ke edit"] == "those of the network"
    assert found["model"]["layers that ike, ike-plain, ice, serac edit"] == "none: a text, no weights"
    assert not any(str(value).startswith("unknown") for value in found.values())


def test_models_with_names(work, said, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(work / "cache"))
    save_checkpoint(SMOLLM2.folder)
    shown = said("info", "-o", "info.json")
    assert f"SmolLM2-135M-Instruct in {SMOLLM2.folder}" in shown
    found = json.loads((work / "info.json").read_text())["models by name"]
    assert found["gemma3"] == (
        "Gemma-3-270M, not here yet; the first use fetches 238 MB with --accept-licence "
        "(Gemma Terms of Use, https://ai.google.dev/gemma/terms)"
    )


def test_info_says_which_build_of_torch_this_is(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu999")
    assert "torch 2.99.0+cu999, transformers" in info._packages()


def test_nothing_in_info_fails(work, said, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "abacus")
    monkeypatch.setattr(info, "LINES", (("torn", lambda: 1 / 0), *info.LINES))
    shown = said("info", "--model", "./none")
    assert "KEDIT_FAST_BACKEND=abacus: expected one of" in shown and "unknown: ZeroDivisionError" in shown
    assert "no such folder" in shown and "python" in shown


LLAMA = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
}  # fmt: skip
AT = ("--memory", "24GiB", "--device", "cuda", "--tflops", "400", "--bus", "25", "--host", "512GiB")


def test_a_plan_of_a_config_alone(work, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shown = said("info", str(tmp_path), "--plan", "edit", "--facts", "50", *AT, "-o", "plan.json")
    assert "edit, 50 facts" in shown and "141 GB in bfloat16: 80 layers of 1.71 GB" in shown
    assert "from host memory" in shown and "values" in shown and "less: " in shown and "bound by" in shown
    record = json.loads((work / "plan.json").read_text())
    assert record["placement"]["source"] == "host" and all(step["seconds"] >= 0 for step in record["steps"])


def test_a_plan_of_a_family_that_is_not_opened_says_so(said, tmp_path):
    hybrid = LLAMA | {"model_type": "qwen3_next", "hidden_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(hybrid))
    shown = said("info", "--model", str(tmp_path), "--plan", "stats", *AT)
    assert "qwen3_next models are not opened (it has layers of linear attention" in shown


def test_a_plan_measures_this_machine_and_leaves_out_times_of_others(said, model):
    assert "TFLOP/s" in said("info", model, "--plan", "trace", "--facts", "2", "--memory", "1GB")
    shown = said("info", model, "--plan", "trace", "--facts", "2", "--device", "cuda")
    assert "give --tflops and --bus" in shown or torch.cuda.is_available()
