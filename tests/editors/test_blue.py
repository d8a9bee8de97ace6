"""BLUE: each boundary layer is written for values of its own."""

import pytest
import torch

import kedit_fast as kf
from tests.conftest import refused, tiny_lm
from tests.editors import cases
from tests.editors.cases import FACTS, GROUPS, matrices, moments, oracle_facts, relative
from tests.oracle.memit import memit_update
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
SETTINGS = {"v_lr": 1.0, "v_num_grad_steps": 4, "clamp_norm_factor": 0.4}
OPTIMIZATION = {"lr": 1.0, "steps": 4, "clamp": 0.4}
WEIGHT = 5.0
EDITOR = kf.MemitBlue(layers=(0, 2), mom2_update_weight=WEIGHT, **SETTINGS)
ALPHA = kf.AlphaEditBlue(layers=(0, 2), nullspace_threshold=0.0, nullspace_share=0.5, L2=0.3, **SETTINGS)


def edit(lm, facts=FACTS, editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": GROUPS} | options)


def projected(C, K):
    """(P K^T K + L2 I)^-1 P K^T for the smaller half of C's directions."""
    null = torch.linalg.eigh(C).eigenvectors[:, : len(C) // 2]
    P = null @ null.T
    return torch.linalg.solve(P @ K.T @ K + 0.3 * torch.eye(len(C), dtype=C.dtype), P @ K.T)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(("editor", "inverse"), [(EDITOR, None), (ALPHA, projected)], ids=["memit", "alphaedit"])
def test_blue_equals_the_oracle(family, editor, inverse, monkeypatch):
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    made = edit(lm, editor=editor)
    expected = memit_update(
        lm.model, tiny_tokenizer(), oracle_facts(), GROUPS, (0, 2), matrices(), WEIGHT, boundary=True, inverse=inverse,
        pull_back=family in cases.POST_NORM, **OPTIMIZATION,
    )  # fmt: skip
    assert relative(made.values, expected.z) < 1e-7, "those of the last layer, on the model with the first one edited"
    for layer in EDITOR.layers:
        assert relative(made.deltas[layer].dense(), expected.deltas[layer]) < 1e-7


def test_independent_ones_are_those_of_each_fact_alone():
    lm = tiny_lm("gpt2", torch.float64)
    together = edit(lm, independent=True)
    for i, fact in enumerate(FACTS):
        assert cases.apart(together.only(i), edit(lm, [fact])) < 1e-7


def test_settings_for_a_model():
    lm = tiny_lm("gpt2")
    for name in ("memit", "alphaedit"):
        plain, blue = kf.EDITORS[name].for_model(lm), kf.EDITORS[f"{name}-blue"].for_model(lm)
        assert blue.layers == (plain.layers[0], plain.layers[-1]) and blue.source.endswith("; boundary layers")
    published = kf.MemitBlue.for_model(cases.named("gpt2-xl", layers=48))
    assert published.layers == (13, 17) and published.mom2_update_weight == 20_000


def test_published_settings_and_files(tmp_path):
    xl = cases.named("gpt2-xl", layers=48)
    assert kf.AlphaEditBlue.for_model(xl).L2 == 80 and kf.AlphaEdit.for_model(xl).L2 == 10
    assert kf.Rect.for_model(xl).source == "memit's, published for gpt2-xl"
    assert kf.MemitBlue.from_file(cases.written(tmp_path, {"layers": [13, 17], "blue": True})).layers == (13, 17)
    refused("blue = False: expected true", kf.MemitBlue.from_file, cases.written(tmp_path, {"blue": False}))
    assert kf.BetaEdit.from_file(cases.written(tmp_path, {"lambda2": 7.0, "lambda1": 5.0})).L2 == 7.0
