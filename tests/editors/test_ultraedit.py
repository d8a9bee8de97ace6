"""UltraEdit and StableEdit against their oracle, in turns and at once; what an edit keeps of what was seen."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.ultraedit import Seen, ridge
from kedit_fast.facts.tokens import fact_answer
from tests.conftest import open_tiny, refused, tiny_lm
from tests.editors.cases import FACTS, GROUPS, make_exact, moments, named, oracle_facts, relative, written
from tests.jobs.test_gradients import LLAMA, MODULES
from tests.oracle import ultraedit as oracle
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:facts not written")
LINES = [line.split() for line in TEXT.replace(". ", ".\n").splitlines()]
MANY = [
    kf.Fact(prompt=" ".join(["{}", *words[1:-1]]), subject=words[0], target_new=words[-1].strip("."))
    for words in LINES
    if len(words) > 4
][:16]
PLACES = {"gpt2": "down", "llama": "gate+up+down", "gemma2": "gate+up"}


def modules(family, editor):
    paths = MODULES.get(family, LLAMA)
    return {place: paths[place[1]].format(place[0]) for place in editor.places}


def compare(made, expected, names, tolerance=1e-8):
    assert set(made.weights) == set(names)
    for place, name in names.items():
        assert relative(made.weights[place].dense(), expected[name]) < tolerance, place


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("cls", [kf.UltraEdit, kf.StableEdit])
def test_in_turns_it_equals_the_oracle(family, cls, monkeypatch):
    """Two turns, the second on top of the first, of more tokens than gradients are wide: 2 or 4 matrices of a shape."""
    make_exact(monkeypatch)
    model, tok = tiny_model(family, torch.float64).requires_grad_(False), tiny_tokenizer()
    editor = cls((1, 2), (PLACES[family],), lr=1e-3, alpha=0.7, loss_batch=3)
    names, lm = modules(family, editor), tiny_lm(family, torch.float64)
    turns, seen, below = [MANY, FACTS], [], None
    for facts in turns:
        seen.append(oracle.rows(model, tok, oracle_facts(facts), list(names.values()), 3))
        expected = oracle.deltas(seen[-1], seen, lr=1e-3, alpha=0.7, whitens=cls.WHITENS)
        made = editor.edit(lm, facts, previous=below)
        compare(made, expected, names)
        oracle.add(model, expected)
        below = made if below is None else [below, made]
    for out, width in {lm.shape_of(role) for _, role in editor.places}:
        n, squares = (made.statistics[f"{cls.METHOD}.{out}x{width}.{part}"] for part in ("n", "gg"))
        assert n + below[0].statistics[f"{cls.METHOD}.{out}x{width}.n"] > out + 1 and squares.ndim == 1 + cls.WHITENS
    narrow = replace(editor, layers=(3,), roles=("down",))
    expected = oracle.rows(tiny_lm(family).model, tok, oracle_facts(), list(modules(family, narrow).values()), 3)
    wanted = oracle.deltas(expected, [expected], lr=1e-3, alpha=0.7, whitens=cls.WHITENS)
    compare(narrow.edit(tiny_lm(family), FACTS), wanted, modules(family, narrow), 1e-4)


def test_whitening_begins_when_more_were_seen_than_a_gradient_is_wide():
    lm, editor = tiny_lm("llama", torch.float64), kf.StableEdit((1, 2), lr=1e-3)
    plain = kf.UltraEdit((1, 2), lr=1e-3)
    few, warm = FACTS[:2], editor.warm_up(lm, MANY)
    assert relative(editor.edit(lm, few).deltas[1].dense(), plain.edit(lm, few).deltas[1].dense()) < 1e-12
    whitened = editor.edit(lm, few, previous=warm)
    assert int(sum(e.statistics["stableedit.48x80.n"] for e in (warm, whitened))) > 49
    diagonal = plain.edit(lm, few, previous=plain.warm_up(lm, MANY))
    assert relative(whitened.deltas[1].dense(), diagonal.deltas[1].dense()) > 0.1


def test_what_was_seen_adds_up(tmp_path):
    """Turns, a composition of them, a file, and all facts at once: the same mean and covariance."""
    lm = tiny_lm("gpt2", torch.float64)
    editor = kf.StableEdit((1, 2), ("down",), lr=1e-9, loss_batch=1)  # changes too small to be felt
    turns = [editor.warm_up(lm, MANY[:10]), editor.warm_up(lm, MANY[10:14])]
    whole = editor.warm_up(lm, MANY[:14])
    turns[0].save(tmp_path / "first.safetensors")
    turns[0] = kf.Edit.load(tmp_path / "first.safetensors")
    for name, total in whole.statistics.items():
        assert relative(turns[0].statistics[name] + turns[1].statistics[name], total) < 1e-12
    below = [*turns, editor.edit(lm, FACTS[:2], previous=turns)]
    joined = kf.compose(below)
    at_once = editor.edit(lm, FACTS[2:], previous=editor.warm_up(lm, [*MANY[:14], *FACTS[:2]]))
    last = editor.edit(lm, FACTS[2:], previous=joined)
    for place, delta in last.weights.items():
        assert relative(delta.dense(), at_once.weights[place].dense()) < 1e-6
    assert not kf.Memit((1,), v_num_grad_steps=2).edit(lm, FACTS, moments=moments(), contexts=GROUPS).statistics


def test_a_warm_up_is_needed_to_go_on_and_not_to_use_what_was_edited(recwarn):
    lm, editor = tiny_lm("llama", torch.float64), kf.StableEdit((1,), lr=1e-3)
    warm = editor.warm_up(lm, MANY)
    first = editor.edit(lm, FACTS[:2], previous=warm)
    alone, beside = (kf.evaluate(lm, FACTS[:1], each).summary() for each in (first, [warm, first]))
    assert repr(alone) == repr(beside)
    second = editor.edit(lm, FACTS[2:], previous=[warm, first])
    assert [each["n_facts"] for each in second.provenance["on_top_of"]] == [2]
    with_it = kf.compose([warm, first])
    again = editor.edit(lm, FACTS[2:], previous=with_it)
    assert relative(again.deltas[1].dense(), second.deltas[1].dense()) < 1e-10
    refused("give its warm-up, too, before it", editor.edit, lm, FACTS[2:], previous=first)
    assert not [one for one in recwarn if "made without those before it" in str(one.message)]


def test_a_batch_s_loss_is_the_mean_over_its_tokens():
    lm, editor = tiny_lm("llama", torch.float64), kf.UltraEdit((1,), loss_batch=2)
    g = {n: replace(editor, loss_batch=n).read(lm, FACTS).rows[1, "down"][1] for n in (1, 2)}
    a, b, c, d = (len(fact_answer(tiny_tokenizer(), fact)) for fact in FACTS)
    weight = torch.tensor([a / (a + b)] * a + [b / (a + b)] * b + [c / (c + d)] * c + [d / (c + d)] * d)
    assert b > 1
    assert relative(g[2], g[1] * weight[:, None]) < 1e-6


@pytest.mark.parametrize("t", [3, 200])
def test_both_ways_to_solve_are_one(t):
    generator = torch.Generator().manual_seed(0)
    h, v = (torch.randn(t, width, generator=generator, dtype=torch.float64) for width in (80, 48))
    whole = torch.linalg.solve(h.T @ h + 0.5 * torch.eye(80, dtype=torch.float64), h.T @ v).T
    assert relative(ridge(h, v, 0.5).dense(), whole) < 1e-12


def test_whitened_gradients_have_unit_covariance():
    g = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.randn(
        6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    sums = Seen.sums("x", torch.randn(200, 3, dtype=torch.float64), g, True)
    spread = Seen.of("x", (6, 3), sums).normalized(torch.zeros(1, 3, dtype=torch.float64), g)[1]
    assert relative(spread.T @ spread / (200 - 7), torch.eye(6, dtype=torch.float64)) < 1e-8


def test_phrasings_are_trained_on():
    lm, editor = tiny_lm("llama", torch.float64), kf.UltraEdit((1,), lr=1e-3)
    phrased = replace(FACTS[0], phrasings=("Who sees the {} sees",))
    other = replace(FACTS[0], prompt="Who sees the {} sees")
    made = editor.edit(lm, [phrased, FACTS[1]])
    assert len(made.provenance["found"]["loss"]) == 2
    assert relative(made.deltas[1].dense(), editor.edit(lm, [FACTS[0], FACTS[1], other]).deltas[1].dense()) < 1e-10


def test_the_edit_says_what_was_done():
    lm = tiny_lm("llama", torch.float64)
    made = kf.UltraEdit((1, 2), ("up", "down"), lr=0.05).edit(lm, FACTS)
    asked = made.provenance["written"]["p_new"]
    assert made.provenance["found"]["p_new"] == pytest.approx(asked, abs=1e-5)
    assert made.provenance["layers"]["1"]["up"]["tokens"] == 14
    model = open_tiny(tiny_model("llama", torch.float64)).model
    with made.apply(model):
        pass


# ---- settings


def test_for_model_says_where_its_settings_come_from():
    known = kf.StableEdit.for_model(named("Meta-Llama-3-8B-Instruct", "llama", layers=32))
    assert known.source == "published for Meta-Llama-3-8B-Instruct" and known.alpha == 1.0
    assert known.places[:2] == [(11, "gate"), (12, "gate")] and known.places[-1] == (24, "up")
    mistral = named("Mistral-7B-v0.3", "mistral", layers=32)
    assert (kf.StableEdit.for_model(mistral).alpha, kf.UltraEdit.for_model(mistral).alpha) == (10.0, 1.0)
    for family, role in (("gpt2", "down"), ("llama", "gate+up"), ("phi3", "gate_up")):
        derived = kf.UltraEdit.for_model(tiny_lm(family, layers=12))
        assert derived.layers == (8, 9, 10) and derived.roles == (role,) and derived.source.startswith("derived")


def test_published_files_load(tmp_path):
    text = "name: stableedit\nlr: 1e-6\nbatch_size: 128\ntoken: ans\ncache_dir: cache\nalpha: 10.0\n"
    text += "RunningMeanStd_mode: stable\npreheat_mode: start\nsave_checkpoint: False\n"
    with pytest.warns(UserWarning, match="not used: batch_size, cache_dir"):
        assert kf.StableEdit.from_file(written(tmp_path, text, "stable.yaml")) == kf.StableEdit(alpha=10.0)
    refused("RunningMeanStd_mode", kf.UltraEdit.from_file, tmp_path / "stable.yaml")


def test_what_cannot_be_done_is_refused(no_sweep):
    lm = tiny_lm("llama")
    refused("one for all 2 layers, or one for each", kf.UltraEdit((1, 2), ("up",) * 3).edit, lm, FACTS)
    refused("'gate_up'", kf.UltraEdit((1,), ("gate_up",)).edit, lm, FACTS)
    refused("independent", kf.UltraEdit((1,)).edit, lm, FACTS, independent=True)
    refused("moments", kf.UltraEdit((1,)).edit, lm, FACTS, moments=moments())
    refused("alpha", kf.UltraEdit, alpha=0.0)


def test_damaged_statistics_are_refused(no_sweep):
    lm, editor = tiny_lm("llama"), kf.StableEdit((1,))
    whole = Seen.sums("stableedit", torch.ones(3, 80).double(), torch.ones(3, 48).double(), True)
    warm = kf.Edit("stableedit", {}, lm.fingerprint, (), (), statistics=whole)
    for name, part in (("h", torch.zeros(3)), ("n", torch.tensor(torch.nan)), ("gg", torch.zeros(80, 80))):
        damaged = replace(warm, statistics=whole | {f"stableedit.48x80.{name}": part})
        refused(rf"damaged \({name}\)", editor.edit, lm, FACTS, previous=damaged)
    less = replace(warm, statistics={name: part for name, part in whole.items() if not name.endswith(".g")})
    refused(r"damaged \(g\)", editor.edit, lm, FACTS, previous=less)
    other = replace(warm, statistics=whole | {"stableedit.48x80.h": torch.zeros(3)})
    refused(r"are \[80\] and \[3\]", kf.compose, [warm, other])


def test_a_single_token_has_no_variance():
    refused("one token has no variance", kf.UltraEdit((1,)).edit, tiny_lm("llama"), FACTS[:1])
