"""Concept scrubbing against hooks on a plain Hugging Face model, and folded into weights."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors import leace as leace_module
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.edits.erasures import BiasChange, ErasureChange
from kedit_fast.jobs.collect import collect
from kedit_fast.sweep.runs import RunList, add_under
from kedit_fast.sweep.sites import Site
from tests.conftest import close, disk_and_resident, open_tiny, refused, save_tiny, tiny_lm
from tests.editors.cases import make_exact, relative
from tests.make import bits, same_bits
from tests.oracle.leace import scrub, scrubbed
from tests.tiny import PROMPTS, tiny_model

SITES = ("layer_out", "attn_out", "mlp_out", "mlp_in", "mlp_key")
FACTS = [kf.Fact(p.template, p.subject, p.answer.strip()) for p in PROMPTS]
BEFORE = ("", "I think: ", "The sun. ", "So ", "Because ", "In Spain, ", "London. ", "A piano and ")
TEXTS = [f"{before}{fact.text}" for fact in FACTS for before in BEFORE]
LABELS = [i % 3 for i, _ in enumerate(TEXTS)]
Z = torch.nn.functional.one_hot(torch.tensor(LABELS), 3).double()
EXACT = dict(shrinkage=False, constrain_cov_trace=False)


def rows_at(lm, texts, layer, site):
    runs = RunList()
    ids = [lm.encode(text) for text in texts]
    number = add_under(lm, runs, ids)
    return collect(lm, runs.runs(), Site(site), [layer], number, torch.tensor([len(each) - 1 for each in ids]))[layer]


def covariance(x, z=Z):
    x = x.double()
    return ((x - x.mean(0)).T @ (z - z.mean(0)) / len(x) / x.std(0).mean()).abs().max().item()


@pytest.mark.parametrize(
    ("family", "site"),
    [*((family, "layer_out") for family in ("gpt2", "llama", "gemma2")), *(("llama", site) for site in SITES[1:])],
)
def test_layers_are_scrubbed_one_after_the_other(family, site, monkeypatch):
    make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    # gemma2's layer 0 sees a window: rows of texts that end alike are apart by roundings of its float32 rotary table
    # alone, 1e-8, whose variance is below what a covariance in fp64 holds beside the others'
    layers = (1, 2, 3) if family == "gemma2" else (0, 2, 3)
    edit = kf.leace(lm, TEXTS, LABELS, layers, site=site, **EXACT)
    view = lm.with_edit(edit)
    for layer in layers:
        assert covariance(rows_at(lm, TEXTS, layer, site)) > 1e-2
        assert covariance(rows_at(view, TEXTS, layer, site)) < 1e-10
    found = scrub(lm.model, [lm.encode(text) for text in TEXTS], Z, list(layers), site)
    for change in edit.changes:
        P, mu = found[change.layer]
        made = torch.eye(len(mu)).to(P) - change.left @ change.right
        assert relative(made, P) < 1e-8 and relative(change.mu, mu) < 1e-8
    text = TEXTS[1]
    with scrubbed(lm.model, found, site):
        expected = lm.model(torch.tensor([lm.encode(text)])).logits[0, -1].log_softmax(-1)
    got = torch.tensor([p for _, p in view.top_tokens(text, k=5)]).log()
    close("view", got, expected.topk(5).values.float())


def test_in_single_precision():
    lm = tiny_lm("llama")
    view = lm.with_edit(kf.leace(lm, TEXTS, LABELS, (1, 2)))
    assert covariance(rows_at(view, TEXTS, 2, "layer_out")) < 1e-6


@pytest.mark.parametrize("site", ["layer_out", "mlp_out"])
def test_texts_that_do_not_fit_together_come_in_packs(site, monkeypatch, tmp_path):
    lm = tiny_lm("gpt2", torch.float64)
    whole = kf.leace(lm, TEXTS, LABELS, (0, 1, 3), site=site)
    monkeypatch.setattr(leace_module, "free", lambda lm: 40_000)
    assert len(leace_module._packs(lm, [(lm.encode(t), 1) for t in TEXTS], Z, "last")) > 3
    parts = kf.leace(lm, TEXTS, LABELS, (0, 1, 3), site=site)
    for a, b in zip(parts.changes, whole.changes, strict=True):
        assert relative(a.left @ a.right, b.left @ b.right) < 1e-9


def test_layers_that_are_read_from_disk(tmp_path):
    disk, resident = disk_and_resident(save_tiny(tmp_path / "model", tiny_model("llama", layers=6)))
    edits = [kf.leace(lm, TEXTS, LABELS, (1, 3)) for lm in (disk, resident)]
    assert digest(edits[0]) == digest(edits[1])


def test_which_rows_are_fitted():
    lm = tiny_lm("llama", torch.float64)
    labels = [i % 2 for i, _ in enumerate(FACTS)]
    edits = {where: kf.leace(lm, FACTS, labels, 1, positions=where) for where in ("last", "subject", "all")}
    n_tokens = sum(len(lm.encode(fact.text)) for fact in FACTS)
    assert [edit.provenance["n_rows"] for edit in edits.values()] == [len(FACTS), len(FACTS), n_tokens]
    assert len({digest(edit) for edit in edits.values()}) == 3
    assert edits["last"].provenance["layers"]["1"]["rank"] == 1 and edits["last"].hparams["positions"] == "last"
    assert 0 < edits["last"].provenance["layers"]["1"]["removed"] < 1


def test_rows_that_are_all_the_same_have_nothing_to_erase():
    with pytest.warns(UserWarning, match="erases nothing.*positions=") as told:
        edit = kf.leace(tiny_lm("llama"), TEXTS[:1] * 4, [0, 1, 0, 1], 1)
    assert told[0].filename == __file__ and edit.provenance["layers"]["1"] == {"rank": 0, "removed": 0.0}


# ---- folded


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "phi3"])
@pytest.mark.parametrize("site", ["mlp_out", "mlp_in", "mlp_key"])
def test_folded_it_is_the_same(family, site):
    """Into weights and, where the model has them, biases; without a mean where it has none."""
    model = tiny_model(family, torch.float64)
    lm, before = open_tiny(model), bits(model)
    biased = family in ("gpt2", "gptj")
    edit = kf.leace(lm, TEXTS, LABELS, (1, 2), site=site, affine=biased)
    folded = kf.fold(lm, edit)
    assert {type(change) for change in folded.changes} == ({WeightChange, BiasChange} if biased else {WeightChange})
    expected = [rows_at(lm.with_edit(edit), TEXTS[:3], 3, "layer_out"), rows_at(lm, TEXTS[:3], 3, "layer_out")]
    view = rows_at(lm.with_edit(folded), TEXTS[:3], 3, "layer_out")
    assert relative(view, expected[0]) < 1e-7 < relative(expected[1], expected[0])
    with folded.apply(model):
        assert relative(rows_at(lm, TEXTS[:3], 3, "layer_out"), expected[0]) < 1e-7
    assert same_bits(model, before)


def test_without_a_bias_or_a_matrix_it_says_what_to_do(tmp_path):
    lm = open_tiny(tiny_model("llama"))
    refused("has no bias.*affine=False", kf.fold, lm, kf.leace(lm, TEXTS, LABELS, 1, site="mlp_out"))
    for site in ("layer_out", "attn_out"):
        edit = kf.leace(lm, TEXTS, LABELS, 1, site=site)
        refused(f"{site} is no input or output of a matrix.*mlp_out", kf.fold, lm, edit)
    edit = kf.leace(lm, TEXTS, LABELS, 1, site="mlp_out", affine=False)
    folded = kf.fold(lm, edit)
    kf.export_peft(folded, tmp_path / "adapter", model=lm)
    above = kf.leace(lm.with_edit(folded), TEXTS, LABELS, 2, site="mlp_out", affine=False)
    refused("stands on other edits", kf.fold, lm, above)
    refused("holds no erasure", kf.fold, lm, folded)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_mixtures_of_experts_are_scrubbed_and_not_folded(family):
    lm = tiny_lm(family)
    for site in ("mlp_in", "mlp_out"):
        edit = kf.leace(lm, TEXTS, LABELS, 1, site=site, affine=False)
        assert covariance(rows_at(lm.with_edit(edit), TEXTS, 1, site)) < 1e-5
        refused("layer 1 is a mixture of experts.*lm.with_edit", kf.fold, lm, edit)


# ---- as an edit


def test_it_is_saved_and_is_no_change_of_weights(tmp_path):
    model = tiny_model("gpt2")
    lm = open_tiny(model)
    edit = kf.leace(lm, TEXTS, LABELS, (1, 2))
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(edit) and "erasure" in repr(loaded) and loaded.facts == ()
    base, erased = (rows_at(view, TEXTS[:1], 3, "layer_out") for view in (lm, lm.with_edit(loaded)))
    assert relative(erased, base) > 1e-3
    for meet in (lambda e: e.apply(model), lambda e: kf.compose([e, replace(e, provenance={"another": 1})])):
        refused("an erasure at layer 1, which is no change of weights.*lm.with_edit.*kf.fold", meet, loaded)
    for part in (loaded.only, loaded.without):
        refused("i = 0: there are no facts", part, 0)
    report = kf.evaluate(lm, [replace(FACTS[0], target_new="Rome")], loaded)
    assert report.edited is not None
    folded = kf.fold(lm, kf.leace(lm, TEXTS, LABELS, 1, site="mlp_out"))
    refused("a bias at layer 1, which is no change of weights", kf.compose, [folded, edit])
    folded.save(tmp_path / "folded.safetensors")
    assert digest(Edit.load(tmp_path / "folded.safetensors")) == digest(folded)
    bare = open_tiny(tiny_model("llama"))
    shift = Edit("x", {}, "", (), [change for change in folded.changes if isinstance(change, BiasChange)])
    refused("this model has none", shift.apply, bare.model, check_fingerprint=False)


def test_bad_input_is_refused(no_sweep):
    lm = tiny_lm("llama")
    refused("of one class", kf.leace, lm, TEXTS, [0] * len(TEXTS), 1)
    refused("expected one for each of 80 prompts, got 2", kf.leace, lm, TEXTS, [0, 1], 1)
    refused(r"\['A'\] is no class", kf.leace, lm, TEXTS[:2], [["A"], ["B"]], 1)
    refused("float32 .80.; expected whole numbers", kf.leace, lm, TEXTS, torch.rand(len(TEXTS)), 1)
    refused("site = 'embed': expected one of layer_out", kf.leace, lm, TEXTS, LABELS, 1, site="embed")
    refused("read and not written: choose mlp_out", kf.leace, tiny_lm("mixtral"), TEXTS, LABELS, 1, site="mlp_key")
    refused("layers 0 to 3", kf.leace, lm, TEXTS, LABELS, 4)
    refused("is a text; give Facts", kf.leace, lm, TEXTS, LABELS, 1, positions="subject")
    refused("svd_tol", kf.leace, lm, TEXTS, LABELS, 1, svd_tol=-1)
    refused("expected .width, k.", ErasureChange, 1, torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3))
    refused("NaN", ErasureChange, 1, torch.zeros(3, 1), torch.zeros(1, 3), torch.full((3,), torch.nan))
    refused("roles", BiasChange, 1, torch.zeros(3), "sideways")
    wrong = Edit("leace", {}, "", (), [ErasureChange(1, torch.zeros(3, 1), torch.zeros(1, 3), torch.zeros(3))])
    refused("rows 3 wide, this model's layer_out is 48", lm.with_edit, wrong)
    refused(
        "is 3 wide, and this model's down projection gives 48",
        lm.with_edit,
        replace(wrong, changes=[BiasChange(1, torch.zeros(3))]),
    )
