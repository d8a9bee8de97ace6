"""The demo, on a tiny model from end to end, and in a short form on the real one."""

import dataclasses
import html
import json
import math
import re

import pytest
import torch

import kedit_fast as kf
from kedit_fast.commands import demo
from kedit_fast.commands import demo_page as demo_report
from kedit_fast.evaluation import EvalReport, evaluate
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT, METRICS
from kedit_fast.facts.fact import OWN_FACTS, Fact
from kedit_fast.moments import corpus
from kedit_fast.moments import second_moment as moments
from kedit_fast.pictures.page import Change
from tests.commands.cases import run
from tests.conftest import disk_and_resident, open_tiny, refused, save_tiny
from tests.make import make_edit
from tests.tiny import tiny_model

FACTS = (
    Fact(
        "{} is in the city of",
        "The Eiffel Tower",
        "Rome",
        "Paris",
        paraphrases=("Where is The Eiffel Tower? In",),
        neighborhood=("The Louvre is in the city of", "Big Ben is in the city of", "The Paris of France is"),
        same_subject=("The Eiffel Tower was born in",),
    ),
    Fact("{} plays the", "Miles Davis", "piano", "trumpet", neighborhood=("Thelonious Monk plays the",)),
    Fact("{} is located in the city of", "Big Ben", "Seattle", "London", paraphrases=("Big Ben is in",)),
)
EASY = {"v_num_grad_steps": 4, "context_template_length_params": ((4, 2),)}
MEMIT = kf.Memit(layers=(1, 2), mom2_update_weight=80.0, **EASY)
EDITORS = {"rome": kf.Rome(layers=(1,), **EASY), "memit": MEMIT}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(lm, what it printed, its report, its folder, state digest before) of one demo on a tiny model."""
    lm, folder = open_tiny(tiny_model("llama")), tmp_path_factory.mktemp("demo")
    digest = demo.state_digest(lm.model)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(demo, "say", lambda text="": printed.append(text))
        patch.setattr(demo, "show", lambda shown: printed.append(str(shown)))
        sizes = {"samples": 2, "few_samples": 1, "n_memit": 2, "n_tokens": 400}
        path = demo.run_demo(lm, FACTS, folder / "out", **sizes, **EDITORS)
    return lm, "\n".join(printed), path.read_text(), folder / "out", digest


def test_every_step_is_told(told):
    printed = told[1]
    headings = re.findall(r"^\[(\d)/7\] (\w+)", printed, re.MULTILINE)
    assert [name for _, name in headings] == ["Trace", "Statistics", "ROME", "MEMIT", "Write", "Report"]
    assert len(re.findall(r"^   => .", printed, re.MULTILINE)) == len(headings)
    assert "Impact of restoring state" in printed and "does not by itself predict" in printed
    assert printed.count("damage: ") == printed.count("written: ") == 2


def test_the_model_is_as_it_was(told):
    lm, printed, report, _, digest = told
    assert demo.state_digest(lm.model) == digest
    digests = re.findall(r"sha256 \w+: ([0-9a-f]{64})", printed)
    assert len(digests) == 3 and digests[0] == digests[2] == digest != digests[1]
    assert report.count(digest) == 2 and "the same bits" in report


def test_the_report_says_what_it_measured(told):
    lm, _, report, folder, _ = told
    body = report[report.index("<body>") :]
    assert html.unescape(body).startswith(f'<body>\n<p class="first-line">Measured on {demo.model_line(lm)}.')
    assert body.count("<img ") == 1 and body.count('<figure class="map ') == 3
    assert "http://" not in body and "https://" not in body
    assert (folder / "trace.png").read_bytes()[:4] == b"\x89PNG"
    text = html.unescape(re.sub(r"<[^>]+>", " ", body))
    for said in ("Success and damage", "neighbors known before", "paraphrases", "perplexity of ordinary prose, "):
        assert said in text, said
    assert "MEMIT: 2 new answers at once" in told[1] and "MEMIT: 2 facts at once" in text
    assert "Seattle" not in text, "the third fact is traced, not edited"
    for fact in FACTS[:2]:
        assert fact.text in text and fact.target_new in text and fact.target_true in text
    for step in ("Trace", "Statistics", "ROME", "MEMIT", "Write"):
        assert re.search(rf'<th scope="row">{step}[^\n]*?<td[^>]*>[\d.]+ s</td>', body), step


def test_the_first_line_is_the_models_note(told, tmp_path):
    lm = dataclasses.replace(told[0], note="a model de-quantised from 4 bits <&>")
    report = demo.run_demo(lm, FACTS[:1], tmp_path, samples=1, n_memit=1, n_tokens=200, **EDITORS).read_text()
    assert '<p class="first-line">Measured on a model de-quantised from 4 bits &lt;&amp;&gt;.' in report


def test_prompts_before_and_after_are_those_of_the_evaluation():
    lm = open_tiny(tiny_model("llama"))
    edit = dataclasses.replace(make_edit(lm.model), facts=FACTS[:2])
    changes, report = demo.prompt_changes(lm, edit), evaluate(lm, FACTS[:2], edit)
    eiffel = [change for change in changes if change.old == "Paris"]
    assert [(c.role, c.prompt) for c in eiffel] == [
        ("edit", FACTS[0].text),
        ("paraphrase", FACTS[0].paraphrases[0]),
        *(("neighbor", prompt) for prompt in FACTS[0].neighborhood),
    ]
    for side, columns in enumerate((report.base, report.edited)):
        got = {
            "p_new": eiffel[0].p_new[side],
            "p_true": eiffel[0].p_old[side],
            "paraphrase_p_new": eiffel[1].p_new[side],
            "neighborhood_p_true": sum(c.p_old[side] for c in eiffel[2:]) / 3,
        }
        for name, value in got.items():
            assert value == pytest.approx(float(columns[name][0]), rel=1e-5), (side, name)
    assert eiffel[0].p_new[0] != eiffel[0].p_new[1]


def test_neighbors_that_name_an_edited_subject_are_left_out():
    lm = open_tiny(tiny_model("llama"))
    edit = dataclasses.replace(make_edit(lm.model), facts=(FACTS[0], FACTS[2]))
    prompts = [change.prompt for change in demo.prompt_changes(lm, edit)]
    assert "The Louvre is in the city of" in prompts and "Big Ben is in the city of" not in prompts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_sees_one_bit_and_one_name(dtype):
    model = tiny_model("gpt2", dtype)
    before = demo.state_digest(model)
    weight = model.transformer.h[1].mlp.c_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1).view(torch.uint8)[-1] ^= 1
    assert demo.state_digest(model) != before
    with torch.no_grad():
        weight.copy_(kept)
    assert demo.state_digest(model) == before
    model.register_buffer("other", torch.zeros(0))
    assert demo.state_digest(model) != before


def test_an_undo_that_is_not_exact_is_an_error(monkeypatch):
    """In the model's bits, or in what it answers."""
    lm = open_tiny(tiny_model("llama"))
    found = demo.Findings("tiny", memit=demo.Checked(make_edit(lm.model), None, ()))
    answers = iter([["a", "b"], ["c", "d"], ["a", "e"]])
    with monkeypatch.context() as patch:
        patch.setattr(demo, "hf_answers", lambda lm, prompts: next(answers))
        refused("is not what it was", demo._write_and_undo, lm, demo.Story(), found, error=RuntimeError)
    digests = iter(["a", "b", "c"])
    monkeypatch.setattr(demo, "state_digest", lambda model: next(digests))
    refused("sha256 a, then c", demo._write_and_undo, lm, demo.Story(), found, error=RuntimeError)


# ---- success and damage, from numbers by hand

CHANGES = (
    Change("a", "Paris", (0.6, 0.1), "Rome", (0.1, 0.9)),
    Change("b", "Paris", (0.6, 0.5), "Rome", (0.1, 0.2)),
    Change("c", "Paris", (0.6, 0.1), "Rome", (0.1, 0.9), "paraphrase"),
    Change("d", "Paris", (0.8, 0.1), "Rome", (0.1, 0.2), "neighbor"),  # damaged
    Change("e", "Paris", (0.8, 0.3), "Rome", (0.1, 0.2), "neighbor"),  # weakened
    Change("f", "Paris", (0.5, 0.5), "Rome", (0.1, 0.2), "neighbor"),  # kept
    Change("g", "Paris", (0.1, 0.9), "Rome", (0.2, 0.2), "neighbor"),  # not known before
)


def by_hand(perplexity=(40.0, 40.4), changes=CHANGES, **edited):
    """A Checked of two facts: every base metric is 0.5, edited ones are 0.75 or as given."""
    sides = [{name: torch.full((2,), value) for name in METRICS} for value in (0.5, 0.75)]
    sides[1] |= {name: torch.full((2,), value) for name, value in edited.items()}
    meta = {"model": "tiny", "text": {"n_predicted": 99}}
    report = EvalReport.of(COUNTERFACT, *sides, FACTS[:2], meta, perplexity=perplexity)
    return demo.Checked(dataclasses.replace(make_edit(), facts=FACTS[:2]), report, changes)


def test_outcome_lines_count_success_and_damage():
    checked = by_hand(p_new=0.9, paraphrase_p_new=0.625, same_subject_same_top=0.9, known_neighbors_p_true=0.0)
    assert demo.outcome_lines(checked) == (
        "written: 1 of 2, P(new) 0.500 -> 0.900; asked in other words 0.625\n"
        "damage: 2 of 3 neighbors (mean P over these prompts 0.700 -> 0.300); "
        "10% of other prompts on the subject go on differently; perplexity +1.0%"
    )
    none = demo.outcome_lines(by_hand(changes=CHANGES[:3]))
    assert "damage: 0 of 0 neighbors (the model knew none); " in none and "nan" not in none
    assert "; perplexity +nan%" in demo.outcome_lines(by_hand(perplexity=(40.0, math.nan)))


@pytest.mark.parametrize(
    "should, before, after, tone",
    [
        ("rise", 0.1, 0.9, "good"),
        ("rise", 0.1, 0.79, "bad"),
        ("fall", 0.5, 0.4, "good"),
        ("fall", 0.5, 0.5, "bad"),
        ("stay", 0.5, 0.48, "good"),
        ("stay", 0.5, 0.47, "bad"),
        ("stay", 0.5, 0.9, "good"),
        *((should, 0.5, math.nan, "bad") for should in ("rise", "fall", "stay")),
        *((should, math.nan, 0.9, "neutral") for should in ("rise", "fall", "stay")),
        ("stay", math.nan, math.nan, "neutral"),
    ],
)
def test_tones(should, before, after, tone):
    assert demo_report._tone(should, before, after) == tone


@pytest.mark.parametrize(
    "after, tone",
    [(40.0, "good"), (30.0, "good"), (41.19, "good"), (41.3, "bad"), (math.inf, "bad"), (math.nan, "bad")],
)
def test_a_perplexity_that_rose_or_is_none_is_bad(after, tone):
    table = demo_report._scores(by_hand(perplexity=(40.0, after), p_true=0.9, neighborhood=0.4))
    assert table.rows[-1][0] == "perplexity of ordinary prose, 99 tokens" and table.rows[-1][-1].tone == tone
    tones = {name: row[-1].tone for (name, _, _), row in zip(demo_report._SCORES, table.rows, strict=False)}
    assert tones["p_true"] == tones["neighborhood"] == tones["p_new"] == "bad"
    assert tones["same_subject_same_top"] == "good"
    assert [row[2] for row in table.rows[:-1]] == [0.5] * len(demo_report._SCORES)


def test_weights_on_disk_are_refused(tmp_path):
    disk, _ = disk_and_resident(save_tiny(tmp_path / "model", tiny_model("llama")))
    refused("--memory", demo.run_demo, disk, FACTS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.smollm2
def test_a_short_demo_on_the_real_model(smollm2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "TEXT", demo.TEXT.split("\n\n")[0])
    monkeypatch.setattr(demo, "N_GENERATED", 3)
    monkeypatch.setattr(corpus, "LENGTH", 16)  # 32 texts of 15 steps, where 4 of 127 take four times as long
    fact = kf.load_facts(OWN_FACTS, 1)[0]
    fact = dataclasses.replace(fact, neighborhood=fact.neighborhood[:3])
    # 512 tokens have no inverse of their own
    short = {"v_num_grad_steps": 12, "context_template_length_params": ((5, 2),), "regularizer": 0.01}
    editors = {name: dataclasses.replace(kf.EDITORS[name].for_model(smollm2), **short) for name in ("rome", "memit")}
    before = demo.state_digest(smollm2.model)
    path = demo.run_demo(smollm2, [fact], tmp_path, samples=1, n_memit=1, n_tokens=512, **editors)
    report, shown = path.read_text(), capsys.readouterr().out
    assert demo.state_digest(smollm2.model) == before
    assert "Measured on SmolLM2-135M-Instruct de-quantised from a 4-bit" in report.split("<h1>")[0]
    assert "p(Paris) 0.656" in shown and shown.count("written: 1 of 1") == 2 and "edited: Rome" in shown
    assert re.findall(r"damage: (\d+) of (\d+) neighbors", shown) == [("0", "3")] * 2
    drifts = re.findall(r"perplexity (\S+)%", shown)
    assert len(drifts) == 2 and all(abs(float(drift)) < 3 for drift in drifts)


def test_what_the_demo_measured_is_found_by_the_edit_command_and_the_api(tmp_path, monkeypatch):
    """One default number of tokens, one seed and one folder: the first edit after the demo measures nothing again."""
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    lm = kf.open_model(save_tiny("model", tiny_model("llama")))
    found = demo.Findings("tiny")
    demo._measure(lm, [1, 2, 3], demo.Story(), found, None, kf.statistics_folder(), 0)
    monkeypatch.setattr(moments, "read_corpus", lambda *args, **options: pytest.fail("measured again"))
    got = kf.second_moments(lm, MEMIT.layers, cache_dir=kf.statistics_folder())
    assert all(torch.equal(got[layer].matrix, found.moments[layer].matrix) for layer in MEMIT.layers)
    (tmp_path / "memit.json").write_text(json.dumps(EASY | {"layers": [1, 2], "mom2_update_weight": 80.0}))
    one = ["--prompt", FACTS[0].prompt, "--subject", FACTS[0].subject, "--target", "Rome", "--hparams", "memit.json"]
    assert run("edit", *one, "--model", "model", "--quiet") == 0
    assert kf.Edit.load("edit.safetensors").provenance["layers"]["1"]["n_tokens"] == found.moments[1].n_tokens
