"""Evaluation against one Hugging Face forward a prompt and target, on the weights as they are and really edited."""

import dataclasses
import importlib
import json
import math

import pytest
import torch

from kedit_fast.edits.changes import weight_changes
from kedit_fast.edits.deltas import LowRank
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.evaluation import EvalReport, evaluate
from kedit_fast.evaluation.benchmark import case_list, one_by_one
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT, METRICS
from kedit_fast.evaluation.benchmarks.knowedit import QUESTIONS
from kedit_fast.evaluation.perplexity import perplexity, text_windows
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.generate import generate
from kedit_fast.model.opening import open_model
from tests.compare import refused
from tests.make import killed_at
from tests.tiny import D_FF, D_MODEL, TEXT, tiny_model, tiny_tokenizer

module = importlib.import_module("kedit_fast.evaluation.evaluate")  # the package's attribute is the function

# Names no other fact's subject, but for one prompt of the first fact and one of the third.
FACTS = (
    Fact(
        "{} is located in the city of",
        "Big Ben",
        "Seattle",
        "London",
        paraphrases=("Big Ben is in", "Where is Big Ben? In"),
        neighborhood=("The Eiffel Tower is in the city of", "The capital of spain is", "Toyota is in"),
        same_subject=("Big Ben was born in", "The sport of Big Ben is"),
    ),
    Fact("The capital of {} is", "Spain", "Thomas Joannes", "Madrid", neighborhood=("The capital of Italy is",)),
    Fact("{} plays the", "Miles Davis", "piano", "Big Ben", neighborhood=("miles davis was", "Monk plays the")),
    Fact("{} was born in", "Danielle Darrieux", target_new="Rome", paraphrases=("Danielle Darrieux is from",)),
    Fact("{} is owned by", "Vimeo", target_true="Apple", neighborhood=("Beats Music is owned by",)),
    Fact("{} is produced by", "Toyota Camry", same_subject=("Toyota Camry is located in",)),
)
CLEAN = {0: (0, 2), 1: (0,), 2: (1,), 4: (0,)}  # neighborhood prompts that are scored, by fact
LEFT_OUT = [1, 0, 1, 0, 0, 0]


def make_lm(family="llama", dtype=torch.float32):
    return open_model(tiny_model(family, dtype), tokenizer=tiny_tokenizer(bos=family == "llama"))


def lowrank(seed, scale=0.3, rank=2):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, rank, generator=generator) for n in (D_MODEL, D_FF))
    return LowRank(u * scale, v * scale)


def make_edit(lm, facts=FACTS[:1], deltas=None, **changes):
    deltas = {1: lowrank(1), 2: lowrank(2)} if deltas is None else deltas
    return Edit("by hand", {}, lm.fingerprint, tuple(facts), deltas, **changes)


@pytest.fixture(scope="module")
def lm():
    return make_lm()


# --- the oracle: one forward a prompt and target ---------------------------------------------------------------------


@torch.no_grad()
def logits(lm, ids):
    return lm.model(torch.tensor([ids])).logits[0].double()


def ask(lm, prompt, target):
    """(P, 1 if each token is the likeliest else 0) of a target."""
    if target is None:
        return math.nan, math.nan
    ids, answer = lm.tokenizer(prompt)["input_ids"], lm.tokenizer(" " + target, add_special_tokens=False)["input_ids"]
    nll, exact = 0.0, True
    for i, token in enumerate(answer):
        row = logits(lm, ids + answer[:i])[-1].log_softmax(-1)
        nll -= row[token].item()
        exact &= row.argmax().item() == token
    return math.exp(-nll / len(answer)), float(exact)


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def more(a, b):
    return math.nan if math.isnan(a - b) else float(a > b)


def pair(entry, answer):
    """(prompt, answer) of an entry of a Fact's lists."""
    return (entry, answer) if isinstance(entry, str) else (entry.prompt, entry.answer)


def oracle(lm, fact, clean, base_answers=None):
    """({metric: value}, what the base model's answers must be handed on as)."""
    new, true = ask(lm, fact.text, fact.target_new), ask(lm, fact.text, fact.target_true)
    para = [(ask(lm, p, fact.target_new), ask(lm, p, fact.target_true)) for p in fact.paraphrases]
    pairs = [pair(fact.neighborhood[i], fact.target_true) for i in clean]
    near = [(ask(lm, p, None if own == fact.target_new else fact.target_new), ask(lm, p, own)) for p, own in pairs]
    others = [pair(entry, None) for entry in fact.same_subject]
    told = [ask(lm, p, own) for p, own in others if own]
    rows = [logits(lm, lm.tokenizer(p)["input_ids"])[-1].softmax(-1) for p, _ in others]
    known, tops = base_answers or ([t[0] >= 0.1 for _, t in near], [row.argmax().item() for row in rows])
    return {
        "efficacy": more(new[0], true[0]),
        "efficacy_magnitude": new[0] - true[0],
        "efficacy_exact": new[1],
        "efficacy_match": math.nan,
        "efficacy_contains": math.nan,
        "p_new": new[0],
        "p_true": true[0],
        "paraphrase": mean(more(n[0], t[0]) for n, t in para),
        "paraphrase_magnitude": mean(n[0] - t[0] for n, t in para),
        "paraphrase_exact": mean(n[1] for n, t in para),
        "paraphrase_match": math.nan,
        "paraphrase_contains": math.nan,
        "paraphrase_p_new": mean(n[0] for n, t in para),
        "neighborhood": mean(more(t[0], n[0]) for n, t in near),
        "neighborhood_magnitude": mean(t[0] - n[0] for n, t in near),
        "neighborhood_exact": mean(t[1] for n, t in near),
        "neighborhood_p_true": mean(t[0] for n, t in near),
        "known_neighbors_p_true": mean(t[0] for (n, t), k in zip(near, known, strict=True) if k),
        "same_subject_same_top": mean(float(row.argmax() == top) for row, top in zip(rows, tops, strict=True)),
        "same_subject_p_top": mean(row[top].item() for row, top in zip(rows, tops, strict=True)),
        "same_subject_exact": mean(exact for _, exact in told),
        "same_subject_p_true": mean(p for p, _ in told),
        "generation_entropy": math.nan,
    }, (known, tops)


def close(a, b, rel=1e-4):
    """Whether two sets of columns are equal, NaN where NaN. Relative: a tiny model's probabilities are about 1e-5."""
    assert list(a) == list(b)
    for name in a:
        assert a[name].numpy() == pytest.approx(b[name].numpy(), abs=1e-8, rel=rel, nan_ok=True), name


def effect(report):
    """The largest change of log P(new)."""
    return (report.edited["p_new"].log() - report.base["p_new"].log()).abs().nan_to_num().max()


def as_columns(rows):
    return {name: torch.tensor([values[name] for values in rows], dtype=torch.float32) for name in rows[0]}


@torch.no_grad()
def oracle_perplexity(lm, windows):
    nll, n = 0.0, 0
    for window in windows:
        rows = logits(lm, window).log_softmax(-1)
        nll -= sum(rows[i, token].item() for i, token in enumerate(window[1:]))
        n += len(window) - 1
    return math.exp(nll / n)


@torch.no_grad()
def known_answers(lm, n):
    """n (prompt, word) that the model is sure of: the likeliest token, P >= 0.15, is a space and the word."""
    vocab = sorted(lm.tokenizer.get_vocab().items())  # else in another order in each process
    words = {token[1:]: i for token, i in vocab if token[0] == "Ġ" and token[1:].isalpha()}
    found = []
    for start in ("Therefore", "Because I was", "You play the", "The headquarters of", "The mother tongue of", "Monk"):
        for word in words:
            prompt = f"{start} {word}"
            row = logits(lm, lm.tokenizer(prompt)["input_ids"])[-1].softmax(-1)
            best = max(words, key=lambda name: row[words[name]].item())
            if row[words[best]] >= 0.15 and row.argmax() == words[best]:
                found.append((prompt, best))
                break
    assert len(found) >= n, "this model is sure of too little for the test"
    return found[:n]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_one_forward_at_a_time(family):
    lm = make_lm(family)
    ((prompt, answer),) = known_answers(lm, 1)
    # Neighbors with answers of their own, to one of whom the new answer is right; some of a fact that has no old one.
    neighborhood = (prompt, *FACTS[0].neighborhood, ("Monk plays the", "piano"), ("Zürich lies in", "Seattle"))
    same_subject = (("Big Ben was born in", "Rome"), "The sport of Big Ben is")
    facts = (
        dataclasses.replace(FACTS[0], target_true=answer, neighborhood=neighborhood, same_subject=same_subject),
        *FACTS[1:3],
        dataclasses.replace(FACTS[3], neighborhood=(("Monk was born in", "Italy"), "Thomas was born in")),
        *FACTS[4:],
    )
    clean = CLEAN | {0: (0, 1, 3, 4, 5), 3: (0, 1)}
    edit = make_edit(lm, facts)
    report = evaluate(lm, facts, edit, text=TEXT, max_tokens=300)
    windows = text_windows(lm, TEXT, 300)
    before = [oracle(lm, fact, clean.get(i, ())) for i, fact in enumerate(facts)]
    assert before[0][1][0][0], "the test needs a neighbor that the model knows"
    base_perplexity = oracle_perplexity(lm, windows)
    with edit.apply(lm.model):
        again = enumerate(zip(facts, before, strict=True))
        after = [oracle(lm, fact, clean.get(i, ()), kept)[0] for i, (fact, (_, kept)) in again]
        edited_perplexity = oracle_perplexity(lm, windows)
    assert list(report.base) == list(METRICS)
    assert report.base.pop("neighborhood_left_out").tolist() == LEFT_OUT
    assert report.edited.pop("neighborhood_left_out").tolist() == LEFT_OUT
    close(report.base, as_columns([values for values, _ in before]))
    close(report.edited, as_columns(after))
    assert report.perplexity == pytest.approx((base_perplexity, edited_perplexity), rel=1e-4)
    assert abs(report.drift) > 0.01, "the edit has to do something"
    assert effect(report) > 0.5


def test_exact_means_all_tokens(lm):
    ((prompt, answer),) = known_answers(lm, 1)
    start, subject = prompt.rsplit(" ", 1)
    whole = Fact(start + " {}", subject, answer, paraphrases=(prompt,), neighborhood=("Toyota is",))
    longer = dataclasses.replace(whole, target_new=answer + " Zürich")
    base = evaluate(lm, [whole, longer]).base
    assert base["efficacy_exact"].tolist() == base["paraphrase_exact"].tolist() == [1, 0]
    probe = Fact("{} is", "Big Ben", target_true=answer, neighborhood=(prompt,))
    base = evaluate(lm, [probe, dataclasses.replace(probe, target_true=answer + " Zürich")]).base
    assert base["neighborhood_exact"].tolist() == [1, 0]


def test_a_zero_edit_changes_nothing(lm):
    zero = LowRank(torch.zeros(D_MODEL, 1), torch.randn(D_FF, 1))
    report = evaluate(lm, FACTS, make_edit(lm, deltas={1: zero}), text=TEXT, max_tokens=200)
    close(report.base, report.edited, 1e-5)
    assert report.drift == pytest.approx(0, abs=1e-6)
    empty = evaluate(lm, FACTS, make_edit(lm, deltas={}))
    close(empty.base, empty.edited, 0)


def test_a_chain_of_edits_is_what_they_do_in_order():
    """In fp64: fp32 beside other rows is the same bits on an AVX2 core, and 2.8e-7 apart on one with AVX-512."""
    lm = make_lm(dtype=torch.float64)
    chain = [make_edit(lm), make_edit(lm, deltas={2: lowrank(7)})]
    report = evaluate(lm, FACTS, chain)
    close(report.edited, evaluate(lm.with_edit(chain[0]), FACTS, chain[1]).edited, 0)
    close(report.base, evaluate(lm, FACTS, []).base, 0)
    assert report.meta["method"] == "by hand + by hand" and evaluate(lm, FACTS, []).edited is None


def test_what_is_no_edit_or_lacks_what_it_stands_on_is_refused(lm):
    facts = [Fact("{} is in", "Rome", "Peru", "Italy")]
    with pytest.raises(TypeError, match=r"edit = .*: expected Edits; Edit.load reads a file"):
        evaluate(lm, facts, "edit.safetensors")
    first = Edit("test", {}, lm.fingerprint, tuple(facts), {0: LowRank(torch.zeros(D_MODEL, 1), torch.zeros(D_FF, 1))})
    below = {"on_top_of": [{"digest": digest(first)}]}
    second = dataclasses.replace(first, changes={1: first.deltas[0]}, provenance=below)
    refused(r"made on top of edit .* no edit; give the whole chain", evaluate, lm, facts, second)
    assert evaluate(lm.with_edit(first), facts, second).edited is not None


def test_base_is_the_same_with_and_without_an_edit(lm):
    alone = evaluate(lm, FACTS)
    assert alone.edited is None
    close(alone.base, evaluate(lm, FACTS, make_edit(lm, FACTS)).base)
    view = evaluate(lm.with_edit(make_edit(lm, FACTS)), FACTS)  # an edited view's base is the model without its edits
    close(alone.base, view.base)
    close(view.edited, evaluate(lm, FACTS, make_edit(lm, FACTS)).edited, 0)


@pytest.mark.parametrize("size", [1, 4])
def test_chunks_are_the_whole(lm, monkeypatch, size):
    edit = make_edit(lm, FACTS)
    whole = evaluate(lm, FACTS, edit, generate=1)
    monkeypatch.setattr(module, "CHUNK", size)
    chunked = evaluate(lm, FACTS, edit, generate=1)
    close(whole.base, chunked.base)
    close(whole.edited, chunked.edited)
    assert [prompt for prompt, _, _ in chunked.generations] == [fact.text for fact in FACTS]


def asked_of(lm):
    cases = module._cases(lm, case_list(FACTS, one_by_one), None)
    return [(module._asked(lm, COUNTERFACT, case),) for case in cases]


def test_little_memory_is_the_whole(lm):
    edit = make_edit(lm, FACTS)
    whole = evaluate(lm, FACTS, edit, text=TEXT)
    cost = module.RowCost.of(lm)
    # a window is 256 rows, base and edited
    tight = dataclasses.replace(lm, memory=cost.rows * cost.passing + 400 * cost.kept)
    assert len(list(module._chunks(tight, asked_of(tight)))) > 1
    cut = evaluate(tight, FACTS, edit, text=TEXT)
    close(whole.base, cut.base)
    close(whole.edited, cut.edited)
    assert cut.perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def test_a_streamed_model_takes_few_chunks(lm):
    @dataclasses.dataclass
    class Streamed:
        pass_bytes: int = 1

    asked = asked_of(lm) * 20
    assert len(list(module._chunks(lm, asked))) == 2
    assert len(list(module._chunks(dataclasses.replace(lm, source=Streamed()), asked))) == 1


def test_a_wrecking_edit_shows(lm):
    """Answers the model is sure of, and text of its own: both have to suffer."""
    facts = [
        Fact("{} is in", "Big Ben", "Rome", answer, neighborhood=(prompt,), same_subject=("Big Ben is",))
        for prompt, answer in known_answers(lm, 3)
    ]
    wreck = make_edit(lm, facts, deltas={1: lowrank(0, scale=3.0, rank=20)})
    report = evaluate(lm, facts, wreck)
    summary = report.summary()
    assert summary["known_neighbors_p_true"]["base"].n == len(facts)
    assert summary["known_neighbors_p_true"]["edited"].mean < 0.5 * summary["known_neighbors_p_true"]["base"].mean
    assert summary["neighborhood_p_true"]["edited"].mean < 0.5 * summary["neighborhood_p_true"]["base"].mean
    assert summary["same_subject_same_top"]["edited"].mean < 1 == summary["same_subject_same_top"]["base"].mean
    assert summary["same_subject_p_top"]["edited"].mean < summary["same_subject_p_top"]["base"].mean
    start = lm.encode("The")
    own = generate(lm, [start], 60, stop=False)  # as tokens: a random model's text is cut otherwise once decoded
    base, edited = perplexity(lm.with_edit(wreck), [start + own[0]])
    assert edited > 3 * base


def test_an_edit_that_overflows_is_no_success(lm):
    """One of several facts answers NaN after its edit: it is counted, with probability 0, and never as a success."""
    facts = [
        dataclasses.replace(
            FACTS[0],
            same_subject=(("Big Ben was born in", "Rome"),),
            neighborhood=("Toyota is in",),
            provenance={"generation_prompts": ["Big"]},
        ),
        Fact("The capital of {} is", "Spain", "Paris", "Madrid"),
    ]
    edit = make_owned(lm, facts)
    for delta in edit.deltas.values():
        delta.u[:, 1] *= 1e38  # the factor that the first fact owns
    report = evaluate(lm, facts, edit, generate=1)
    summary = report.summary()
    for name in METRICS:
        lacking = name == "known_neighbors_p_true" and not report.base["neighborhood_p_true"][0] >= 0.1
        if name != "neighborhood_left_out" and not lacking:
            assert report.edited[name][0] == 0 and not math.isnan(report.base[name][0]), name
        assert summary[name]["edited"].n == summary[name]["base"].n, name
    close({"p_new": report.edited["p_new"][1:]}, {"p_new": evaluate(lm, facts[1], edit.only(1)).edited["p_new"]})
    assert " -> " not in str(report)


# --- neighborhood prompts that name an edited subject ----------------------------------------------------------------


def test_marked_probes_count_the_edits_own_facts_too(lm):
    fact = dataclasses.replace(FACTS[0], neighborhood=("The Space Needle is in", "Big Ben, that is in"))
    other = Fact("The {} is in", "Space Needle", "Rome")
    assert evaluate(lm, [fact]).base["neighborhood_left_out"].tolist() == [1]
    report = evaluate(lm, [fact], make_edit(lm, [fact, other]))
    assert report.edited["neighborhood_left_out"].tolist() == [2]
    assert math.isnan(report.edited["neighborhood"][0])
    assert "2 of 2 neighborhood prompts left out" in str(report)


# --- independent edits -----------------------------------------------------------------------------------------------


def make_owned(lm, facts):
    """Each fact owns one factor in layers 1 and 2."""
    n = len(facts)
    deltas = {layer: lowrank(layer, scale=0.6, rank=n) for layer in (1, 2)}
    return make_edit(lm, facts, weight_changes(deltas, torch.arange(n).flip(0)))


def test_independent_edits_are_each_facts_own(lm):
    facts = [dataclasses.replace(fact, neighborhood=()) for fact in FACTS[:4]]
    edit = make_owned(lm, facts)
    picked = [2, 0, 3]
    report = evaluate(lm, [facts[i] for i in picked], edit, generate=4)
    assert report.meta["independent"] is True
    for row, i in enumerate(picked):
        alone = evaluate(lm, facts[i], edit.only(i), generate=4)
        close({name: column[row : row + 1] for name, column in report.base.items()}, alone.base)
        close({name: column[row : row + 1] for name, column in report.edited.items()}, alone.edited)
        assert report.generations[row] == alone.generations[0]
    assert effect(report) > 0.5


def test_independent_edits_mark_their_own_subject_only(lm):
    first = dataclasses.replace(FACTS[0], neighborhood=("Big Ben is", "Spain is", "Toyota is"))
    facts = [first, FACTS[1]]
    assert evaluate(lm, facts, make_owned(lm, facts)).base["neighborhood_left_out"].tolist() == [1, 0]
    assert evaluate(lm, facts, make_edit(lm, facts)).base["neighborhood_left_out"].tolist() == [2, 0]


def test_what_independent_edits_refuse(lm):
    edit = make_owned(lm, FACTS[:2])
    refused(r"'Miles Davis plays the'.*is not among the 2", evaluate, lm, FACTS[:3], edit)
    refused(r"perplexity is of one model.*only\(i\)", evaluate, lm, FACTS[:2], edit, text=TEXT)
    refused("2 sets of independent edits", evaluate, lm.with_edit(edit), FACTS[:2], make_owned(lm, FACTS[:3]))
    refused(r"carries independent edits.*only\(i\)", lm.with_edit(edit).top_tokens, "The capital of Spain is")


# --- text, generations, log, report ----------------------------------------------------------------------------------


def test_windows_begin_with_the_start_token_and_end_at_the_limit():
    lm = make_lm("llama")
    begin = lm.tokenizer.bos_token_id
    ids = lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    windows = text_windows(lm, TEXT, 260)
    assert [len(w) for w in windows] == [128, 128, 4]
    assert all(w[0] == begin for w in windows)
    assert [i for w in windows for i in w[1:]] == ids[: 260 - 3]
    gpt2 = make_lm("gpt2")
    windows = text_windows(gpt2, TEXT, 260)
    assert [i for w in windows for i in w] == ids[:260]
    separate = text_windows(gpt2, ["The Eiffel Tower", "Big Ben is in London"])
    assert [gpt2.tokenizer.decode(w) for w in separate] == ["The Eiffel Tower", "Big Ben is in London"]


def test_too_short_a_text_is_refused():
    for text in ("", "a", ["", ""]):
        refused("leaves no token to predict", evaluate, make_lm("gpt2"), FACTS[:1], text=text)
    refused("text is empty; expected a text or a list of texts", evaluate, make_lm("gpt2"), FACTS[:1], text=[])


def test_generations_are_those_of_the_weights_and_of_the_edited_weights(lm):
    edit = make_edit(lm, FACTS, deltas={1: lowrank(1, scale=0.6)})
    report = evaluate(lm, FACTS, edit, generate=5)
    prompts = [fact.text for fact in FACTS]
    before = lm.generate(prompts, 5)
    with edit.apply(lm.model):
        after = lm.generate(prompts, 5)
    assert report.generations == tuple(zip(prompts, before, after, strict=True))
    assert before != after
    assert evaluate(lm, FACTS[:1], generate=2).generations[0][2] is None


def test_log_has_one_record_a_fact(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    log = tmp_path / "log.jsonl"
    report = evaluate(lm, FACTS, make_edit(lm), generate=1, log=log)
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [record["fact"] for record in records] == [fact.to_record() for fact in FACTS]
    for record, other in zip(records, report.to_records(), strict=True):
        assert record["generation"] == other["generation"]
        for side in ("base", "edited"):
            assert list(record[side]) == list(other[side])
            for name, value in record[side].items():
                assert value is None is other[side][name] or value == pytest.approx(other[side][name], rel=1e-6)


def test_a_log_that_cannot_be_written_is_refused_first(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "read_probes", lambda *args: pytest.fail("a sweep began"))
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        evaluate(lm, FACTS, log=tmp_path)


def test_a_report_says_which_backend_ran(lm, monkeypatch):
    assert set(evaluate(lm, FACTS[0]).meta["backend"]) == {"attention", "linear", "lowrank", "target_logprob"}
    asked = []
    monkeypatch.setattr(module, "backend_for", lambda *args: asked.append(args) or f"of {args[0]}")
    half = make_lm(dtype=torch.bfloat16)
    assert evaluate(half, FACTS[0]).meta["backend"]["lowrank"] == "of lowrank"
    assert {args[1:] for args in asked} == {(half.device, torch.bfloat16)}


def test_report_says_what_was_evaluated(lm, tmp_path):
    report = evaluate(dataclasses.replace(lm, note="a note"), FACTS, make_edit(lm, FACTS), text=TEXT, max_tokens=100)
    expected = dict(model="llama", dtype="float32", device="cpu", note="a note", method="by hand", layers=[1, 2], n=6)
    assert {name: report.meta[name] for name in expected} == expected
    assert report.meta["fingerprint"] == lm.fingerprint and report.meta["independent"] is False
    assert report.meta["text"] == {"n_predicted": 99, "window": 100, "max_tokens": 100}
    assert all(column.dtype == torch.float32 and column.shape == (6,) for column in report.base.values())
    report.save(tmp_path / "report.json")
    again = EvalReport.load(tmp_path / "report.json")
    assert again.facts == FACTS and str(again) == str(report)
    close(again.edited, report.edited, 0)


def test_a_report_says_in_words_what_is_answered(lm):
    """P(new) > P(true), which efficacy counts, is not yet the new answer."""
    report = evaluate(lm, FACTS, make_edit(lm, FACTS))
    before, after = (int(side["efficacy_exact"].nansum()) for side in (report.base, report.edited))
    says = (
        f"the new answer's tokens are all the likeliest: of 4 facts for {before} before the edit, for {after} after it"
    )
    assert says in str(report)
    assert "all the likeliest" not in str(evaluate(lm, FACTS))


@pytest.mark.parametrize("target_new, says", [("Rome", "of 1 fact for "), (None, "")])
def test_facts_without_a_new_answer_are_not_counted(target_new, says, lm):
    fact = Fact("{} is in", "Louvre", target_new=target_new, target_true="Paris")
    shown = str(evaluate(lm, fact, make_edit(lm, FACTS)))
    assert says in shown and ("all the likeliest" in shown) == bool(says)


def test_helpful_errors(lm):
    refused("facts is empty", evaluate, lm, [])
    refused("facts = .*: expected Facts, .* or what load_facts", evaluate, lm, [{"prompt": "x"}], error=TypeError)
    refused(r"'Spain is'.*nothing to compare", evaluate, lm, [Fact("{} is", "Spain")])
    refused("open the model it was made on", evaluate, lm, FACTS, make_edit(make_lm("gpt2")))
    refused("generate = -1: expected a whole number of at least 0", evaluate, lm, FACTS, generate=-1)


# --- long runs -------------------------------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_to_the_same_bits(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    edit = make_edit(lm)
    options = {"text": TEXT, "generate": 3, "max_tokens": 100}
    whole = evaluate(lm, FACTS, edit, log=tmp_path / "whole.jsonl", **options)
    kept = {"log": tmp_path / "log.jsonl", "checkpoint": tmp_path / "run"} | options
    for n in (1, 2, 2):  # the texts that are written, two chunks, the last one and the perplexity
        with killed_at(n):
            evaluate(lm, FACTS, edit, **kept)
    again = evaluate(lm, FACTS, edit, **kept)
    whole.save(tmp_path / "whole.json"), again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    refused("holds other work: its generate is 3", evaluate, lm, FACTS, edit, **kept | {"generate": 4})
    refused("holds other work: its edits below", evaluate, lm, FACTS, make_edit(lm, deltas={1: lowrank(3)}), **kept)


def test_what_was_not_measured_is_said(lm):
    fact = Fact("{} is in", "Big Ben", "Rome", "London")
    shown = str(evaluate(lm, fact, make_edit(lm, [fact])))
    assert "other subjects: not measured, no fact has neighborhood prompts" in shown
    assert "perplexity: not measured, no text was given" in shown
    assert "not measured" not in str(evaluate(lm, FACTS, make_edit(lm), text=TEXT))
    assert "not measured" not in str(evaluate(lm, fact))


def test_a_judge_that_nobody_would_ask_is_refused(lm):
    says = "judge = .*expected none: benchmark 'counterfact' does not read by one"
    refused(says, evaluate, lm, FACTS, judge=max, generate=2)
    refused("expected none: nothing is written", evaluate, lm, FACTS, judge=max)
    refused("expected none: nothing is written", evaluate, lm, FACTS, benchmark=QUESTIONS, generate=0, judge=max)
    refused("expected a function", evaluate, lm, FACTS, benchmark=QUESTIONS, judge="llama")
