"""Hyper-parameter files: EasyEdit's YAML as it is published, what of it is not used, and files of other methods."""

import warnings

import pytest

import kedit_fast as kf
from tests.conftest import refused
from tests.editors.cases import written

MODULES = """
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
"""
MOM2 = """
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
"""
VALUES = """
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
kl_factor: 0.0625
"""
ROME = (
    """# a comment
alg_name: "ROME"
model_name: "./hugging_cache/llama-2-7b"
stats_dir: "./data/stats"
device: 1
layers: [5]
clamp_norm_factor: 4
mom2_adjustment: false
context_template_length_params: [[5, 10], [10, 10]]
model_parallel: false
fp16: false
"""
    + VALUES
    + MODULES
    + MOM2
)
MEMIT = (
    """alg_name: "MEMIT"
model_name: "./hugging_cache/llama-2-7b"
device: 0
layers: [4, 5, 6, 7, 8]
clamp_norm_factor: 0.75
layer_selection: "all"
mom2_adjustment: true
mom2_update_weight: 15000
batch_size: 10
"""
    + VALUES
    + MODULES
    + MOM2
)
ALPHAEDIT = (
    MEMIT.replace("MEMIT", "AlphaEdit") + 'P_loc: "./null_space_project.pt"\nnullspace_threshold: 2e-2\nL2: 10\n'
)
FT = """alg_name: "FT"
model_name: "./hugging_cache/llama-2-7b"
device: 0
layers: [21]
num_steps: 25
batch_size: 1
max_length: 30
lr: 5e-4
weight_decay: 0
kl_factor: 0
norm_constraint: false
""" + MODULES.replace("down_proj", "down_proj.weight")
COMMON = dict(v_num_grad_steps=25, v_lr=0.5, v_loss_layer=31, v_weight_decay=1e-3, kl_factor=0.0625)
SPREAD = COMMON | dict(layers=(4, 5, 6, 7, 8), clamp_norm_factor=0.75, mom2_update_weight=15_000)


@pytest.mark.parametrize(
    ("editor", "text", "made", "unused"),
    [
        (kf.Rome, ROME, kf.Rome(layers=(5,), mom2_adjustment=False, **COMMON), "device, model_parallel, fp16, mom2"),
        (kf.Rome, ROME.replace('"ROME"', '"R-ROME"'),
         kf.Rome(layers=(5,), mom2_adjustment=False, key="averaged", **COMMON), "model_name, stats_dir, device"),
        (kf.Memit, MEMIT, kf.Memit(**SPREAD), "layer_selection, batch_size, mom2_dataset"),
        (kf.AlphaEdit, ALPHAEDIT, kf.AlphaEdit(**SPREAD, nullspace_threshold=0.02, L2=10), "P_loc"),
        (kf.Ft, FT, kf.Ft(layers=(21,), num_steps=25, batch_size=1, lr=5e-4), "model_name, device, max_length"),
    ],
)  # fmt: skip
def test_easyedits_yaml_loads_as_it_is(editor, text, made, unused, tmp_path):
    path = written(tmp_path, text, "llama-7b.yaml")
    with pytest.warns(UserWarning) as said:
        assert editor.from_file(path) == made
    (line,) = [str(warning.message) for warning in said]
    assert line.startswith(f"{path}: not used: ") and unused in line and "\n" not in line
    assert "module paths (they follow from the model)" in line and "rewrite_module_tmp" not in line
    assert ("the projection of P_loc is computed from the statistics" in line) == (editor is kf.AlphaEdit)
    assert said[0].filename == __file__, "the line that read the file"
    with pytest.warns(UserWarning):
        assert editor.from_json(path) == made


UNIFIED = {
    "layers": [17], "clamp_norm_factor": 0.75, "layer_selection": "all", "fact_token": "subject_last",
    "v_num_grad_steps": 20, "v_lr": 0.5, "v_loss_layer": 47, "v_weight_decay": 0.5, "kl_factor": 0.0625,
    "mom2_adjustment": True, "mom2_update_weight": 10_000, "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "mom2_dataset": "wikipedia", "calculate_objective_value": False, "add_prev_edits": False,
    "update_norm_lambda": 20, "emmet_lambda": 0.2, "prob_cutoff": 0, "norm_control": 0,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*not used")
def test_files_of_emmet_and_encore(tmp_path):
    common = {"layers": (17,), "v_loss_layer": 47, "mom2_update_weight": 10_000, "update_norm_lambda": 20}
    path = written(tmp_path, UNIFIED, "gpt2-xl.json")
    assert kf.Emmet.from_file(path) == kf.Emmet(**common, emmet_lambda=0.2, keep_previous=False)
    assert kf.Encore.from_file(path) == kf.Encore(**common, hits=0, keep_previous=False)
    early = written(tmp_path, UNIFIED | {"prob_cutoff": -2}, "early.json")
    assert kf.Encore.from_file(early).hits == 2
    refused("prob_cutoff = -2: expected 0", kf.Emmet.from_file, early)
    refused(
        "norm_control = 1: expected 0", kf.Encore.from_file, written(tmp_path, UNIFIED | {"norm_control": 1}, "n.json")
    )
    for wrong in (0.5, "fast", 3):
        bad = written(tmp_path, UNIFIED | {"prob_cutoff": wrong}, "bad.json")
        refused("bad.json.*prob_cutoff", kf.Encore.from_file, bad)
    refused(
        "add_prev_edits|keep_previous", kf.Emmet.from_file, written(tmp_path, UNIFIED | {"add_prev_edits": 3}, "p.json")
    )


def test_a_file_of_fields_alone_says_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = written(tmp_path, "layers: [3]\nv_lr: .1", "rome.yaml")
        assert kf.Rome.from_file(path) == kf.Rome.from_file(written(tmp_path, {"layers": [3], "v_lr": 0.1}))
        assert kf.Rome.from_file(path) == kf.Rome(layers=(3,), v_lr=0.1)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize(
    ("editor", "name"), [(kf.Memit, "ROME"), (kf.AlphaEdit, "MEMIT"), (kf.Rome, "EMMET"), (kf.Ft, "LoRA"), (kf.Rome, 3)]
)
def test_the_settings_of_another_method_are_refused(editor, name, suffix, tmp_path):
    path = written(tmp_path, {"alg_name": name, "layers": [1]}, f"file.{suffix}")
    refused(rf"holds settings of {name} \(alg_name\), not of {editor.__name__}; expected", editor.from_file, path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layers: [1", "is not YAML"),
        ("layers: [1]\nlayers: [2]", "'layers' is there twice"),
        ("a: &a [1, 2]\nlayers: *a", "an alias in line 2; write the value out"),
        ("layers: !!python/object/apply:os.system ['true']", "is not YAML .*could not determine a constructor"),
        ("- 1\n- 2", "holds an array in YAML; expected an object"),
        ("", "holds null in YAML"),
        ("[" * 5000, "is not YAML"),
        ("v_lr: fast", "v_lr = 'fast': expected a finite number"),
        ("v_num_grad_steps: 2e1", "v_num_grad_steps = '2e1': expected a whole number"),
        ("fact_token: 5e-1", "fact_token = '5e-1'"),
        ("v_num_grad_step: 20", r"Rome has no field \['v_num_grad_step'\]"),
        ("mom2_update_weight: 15000", r"Rome has no field \['mom2_update_weight'\]"),
        ("1: 2", r"Rome has no field \['1'\]"),
    ],
)
def test_a_yaml_file_that_is_none(text, says, tmp_path):
    path = written(tmp_path, text, "llama-7b.yaml")
    with pytest.raises(ValueError, match=says) as error:
        kf.Rome.from_file(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 800


def test_json_beyond_the_stack_is_refused(tmp_path):
    refused("is not JSON", kf.Rome.from_file, written(tmp_path, "[" * 100_000))
