"""CrispEdit against its oracle: the projection from moments by hooks, and Adam with the projected gradient."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.crispedit import Projection
from kedit_fast.moments.gradient_moment import gradient_moments
from tests.conftest import refused, tiny_lm
from tests.editors.cases import FACTS, N_TOKENS, make_exact, moments, named, oracle_facts, relative, written
from tests.oracle import ultraedit as rows_oracle
from tests.oracle.access import site_module
from tests.oracle.finetune import fine_tune
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:facts not written", "ignore:the second moments of layers")
LAYERS, ENERGY, TOKENS = (1, 2), 0.8, 100
DOWN = {"gpt2": "transformer.h.{}.mlp.c_proj"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(TEXT.split()))
    return str(path)


def settings(text, **changes):
    given = dict(layers=LAYERS, lr=5e-3, num_steps=3, batch_size=3, energy_threshold=ENERGY, shuffle_seed=5)
    return kf.CrispEdit(**given | dict(gradient_tokens=TOKENS, gradient_corpus=text) | changes)


def gradient_moment(model, text, layer):
    """B by a hook: of the summed loss of the text's first tokens."""
    ids = tiny_tokenizer()(Path(text).read_text())["input_ids"][:TOKENS]
    seen = []
    handle = site_module(model, layer, "mlp_out").register_forward_hook(
        lambda module, args, out: seen.append(out.requires_grad_())
    )
    with torch.enable_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        (g,) = torch.autograd.grad(loss, seen)
    handle.remove()
    return g[0].T @ g[0] / (len(ids) - 1)


def projected(gradient, a, b, energy=ENERGY):
    """Entry by entry of the eigenvectors' coordinates."""
    (values_a, u_a), (values_b, u_b) = torch.linalg.eigh(a), torch.linalg.eigh(b)
    inside = u_b.T @ gradient @ u_a
    products = values_b[:, None] * values_a[None]
    left, threshold = energy * products.sum(), None
    for product in sorted(products.flatten().tolist(), reverse=True):
        left, threshold = left - product, product
        if left <= 0:
            break
    inside[products >= threshold] = 0
    return u_b @ inside @ u_a.T


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_crispedit_equals_the_oracle(family, text, monkeypatch):
    make_exact(monkeypatch)
    lm, editor = tiny_lm(family, torch.float64), settings(text)
    model = tiny_model(family, torch.float64).requires_grad_(False)
    a = {layer: moments()[layer].matrix.double() for layer in LAYERS}
    b = {layer: gradient_moment(model, text, layer) for layer in LAYERS}
    found = gradient_moments(lm, LAYERS, text, n_tokens=TOKENS)
    assert all(relative(found[layer], b[layer]) < 1e-10 for layer in LAYERS)
    generator = torch.Generator().manual_seed(5)
    expected = fine_tune(
        model, tiny_tokenizer(), oracle_facts(), LAYERS, lr=5e-3, steps=3, batch_size=3, by_token=True,
        orders=[torch.randperm(len(FACTS), generator=generator).tolist() for _ in range(3)],
        project=lambda layer, gradient: projected(gradient, a[layer], b[layer]),
    )  # fmt: skip
    made = editor.edit(lm, FACTS, moments=moments())
    for layer in LAYERS:
        assert relative(made.deltas[layer].delta, expected.deltas[layer]) < 1e-8
    single = editor.edit(tiny_lm(family), FACTS, moments=moments())
    assert all(relative(single.deltas[layer].delta, expected.deltas[layer]) < 1e-4 for layer in LAYERS)
    free = kf.LocFt(LAYERS, lr=5e-3, num_steps=3, batch_size=3, append_end=False, shuffle_seed=5).edit(lm, FACTS)
    assert relative(free.deltas[1].delta, made.deltas[1].delta) > 0.1


def test_facts_of_edits_below_count_by_their_tokens(text, monkeypatch):
    """C and B of their targets, at the weights as they are now."""
    lm, editor = tiny_lm("llama", torch.float64), settings(text, layers=(1,))
    first = editor.edit(lm, FACTS[:3], moments=moments())
    seen = []
    of = Projection.of
    monkeypatch.setattr(Projection, "of", lambda a, b, energy: seen.append((a, b)) or of(a, b, energy))
    editor.edit(lm, FACTS[3:], moments=moments(), previous=first)
    model = tiny_model("llama", torch.float64).requires_grad_(False)
    b = gradient_moment(model, text, 1)
    with first.apply(model):
        name = "model.layers.1.mlp.down_proj"
        parts = [rows_oracle.rows(model, tiny_tokenizer(), [fact], [name], 1)[name] for fact in oracle_facts(FACTS[:3])]
    n = sum(len(part.h) for part in parts)
    x, g = (torch.cat([torch.from_numpy(getattr(part, side)) for part in parts]) for side in "hg")
    g = g * torch.tensor([float(len(part.h)) for part in parts for _ in range(len(part.h))])[:, None]
    wanted = [
        (moments()[1].matrix.double() * N_TOKENS + x.T @ x) / (N_TOKENS + n), (b * N_TOKENS + g.T @ g) / (N_TOKENS + n)
    ]  # fmt: skip
    for (values, vectors), matrix in zip(seen[0], wanted, strict=True):
        assert relative(vectors @ values.diag() @ vectors.T, matrix) < 1e-5


def test_the_projection_is_one_and_closes_the_share_that_was_asked_for():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (7, 5))
    spectra = [torch.linalg.eigh(root @ root.T) for root in (a, b)]
    gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    products = torch.outer(spectra[1][0], spectra[0][0])
    for energy in (0.5, 0.9, 1.0):
        project = Projection.of(*spectra, energy)
        once = project(gradient)
        assert relative(project(once), once) < 1e-12 if energy < 1 else not project.mask.any()
        closed = products[project.mask == 0]
        assert closed.sum() >= energy * products.sum() > closed.sum() - closed.min()
        assert relative(once + 1, projected(gradient, a @ a.T, b @ b.T, energy) + 1) < 1e-10


# ---- settings


def test_published_files_load_as_they_are(tmp_path):
    text = "alg_name: CrispEdit\nlayers: [19, 20]\nnum_steps: 25\nbatch_size: 32\nlr: 5e-4\nweight_decay: 0\n"
    text += "kl_factor: 0\nnorm_constraint: false\nobjective_optimization: target_new\nmom2_n_samples: 1000\n"
    text += "rewrite_module_tmp: model.layers.{}.mlp.down_proj.weight\nenergy_threshold: 0.99\n"
    with pytest.warns(UserWarning, match="not used: mom2_n_samples"):
        assert kf.CrispEdit.from_file(written(tmp_path, text, "crisp.yaml")) == kf.CrispEdit(layers=(19, 20))


def test_for_model_says_where_its_settings_come_from():
    known = kf.CrispEdit.for_model(named("Qwen2.5-7B-Instruct", layers=28))
    assert known == kf.CrispEdit(layers=(15, 16, 17, 18, 19), source="published for Qwen2.5-7B-Instruct")
    derived = kf.CrispEdit.for_model(tiny_lm("llama", layers=12))
    assert derived.layers == (7, 8, 9, 10, 11) and derived.source.startswith("derived")


def test_what_cannot_be_done_is_refused(no_sweep):
    lm = tiny_lm("llama")
    refused("needs second moments", kf.CrispEdit(layers=(1,)).edit, lm, FACTS)
    refused("energy_threshold", kf.CrispEdit, energy_threshold=1.5)
    refused("energy_threshold 1 closes all directions", kf.CrispEdit, energy_threshold=1)
    refused("no text of two tokens", gradient_moments, lm, (1,), ["Paris is in France"], n_tokens=1)
    refused("moments of gradients of 4 layers needs", gradient_moments, replace(lm, memory=1000), range(4), n_tokens=8)


def test_text_is_sampled_from_the_model_unless_it_is_given():
    lm, editor = tiny_lm("llama", torch.float64), kf.CrispEdit((1,), num_steps=2, gradient_tokens=20)
    first, again = (editor.edit(lm, FACTS, moments=moments()).deltas[1].delta for _ in range(2))
    assert torch.equal(first, again)
