"""The gate passes what is good and refuses what is not, for the right reason."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from kedit_fast.edits.deltas import Dense
from kedit_fast.evaluation.benchmarks.counterfact import METRICS
from kedit_fast.facts.tokens import asked
from kedit_fast.gating import Suite, gate
from kedit_fast.gating.policy import STOP, EditPolicy
from kedit_fast.gating.questions import questions
from kedit_fast.gating.report import POLICY
from kedit_fast.gating.suite import Question, Translation
from kedit_fast.gating.thresholds import FAIL, NOT_MEASURED, PASS, REPORTED
from tests.conftest import open_tiny, refused
from tests.gating import cases
from tests.gating.cases import FACT, LAYER, SIZES, SUITE, good_edit, judged, limits, make_edit, make_lm, nothing, wreck
from tests.tiny import D_FF, D_MODEL, POSITIONS, tiny_model


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.fixture(scope="module")
def passed(lm):
    return judged(gate, lm, good_edit(lm))


def independent(edit):
    """The edit, said to be of facts that do not see each other."""
    owners = torch.zeros(1, dtype=torch.int64)
    changes = [dataclasses.replace(change, owners=owners) for change in edit.changes]
    return dataclasses.replace(edit, facts=edit.facts * 2, changes=changes, values=None, keys={})


def verdicts(report):
    return {check.name: check.verdict for check in report.checks}


def test_a_good_edit_passes(passed):
    assert passed.passed and not passed.failed, str(passed)
    found = verdicts(passed)
    checked = ("wordings answered", "generalization", "specificity drop", "perplexity drift", "canary, plain", POLICY)
    for name in checked:
        assert found[name] == PASS, name
    assert found["canary, doubt"] == found["canary, long context"] == REPORTED
    assert found["portability"] == found["canary, language"] == NOT_MEASURED
    assert not {check.name for check in passed.checks} & set(METRICS), "a name of evaluate stands for one thing"
    answered = passed.check("wordings answered")
    assert (answered.value, answered.n) == (1.0, 4) and 0.50 < answered.low < 0.52  # Wilson's, 4 of 4
    assert passed.check("generalization").n == 3 and passed.check("specificity drop").n == 9
    assert passed.check("specificity drop").value == 0.0
    before, after = passed.meta["perplexity"]["written float32"]
    assert abs(passed.check("perplexity drift").value) < 1e-5
    assert math.isclose(passed.check("perplexity drift").value, after / before - 1, abs_tol=1e-6)
    assert {answer.generated for answer in passed.answers} == {True}
    assert passed.check("wordings answered").form == "written float32"


def test_an_edit_that_does_nothing_fails_by_that_and_by_nothing_else(lm):
    report = judged(gate, lm, nothing(lm))
    assert [check.name for check in report.failed] == ["wordings answered", "generalization"]
    assert report.check("wordings answered").reason == "0.00% is below 90.00%"
    assert report.check("perplexity drift").value == 0.0


@torch.no_grad()
def likeliest(lm, prompt: str) -> str:
    logits = lm.model(torch.tensor([lm.encode(prompt)])).logits
    return lm.tokenizer.decode([int(logits[0, -1].argmax())])


def test_an_edit_that_wrecks_the_model_fails_specificity_and_perplexity(lm):
    report = judged(gate, lm, wreck(lm))
    failed = {check.name for check in report.failed}
    assert {"specificity drop", "perplexity drift", POLICY} <= failed
    assert report.check("specificity drop").value > 0.5 and report.check("perplexity drift").value > 0.1
    assert report.advice.level == STOP and "layer 1" in report.advice.sentence
    lost = [x for x in report.lost if x.is_lost]
    assert len(lost) == round(9 * report.check("specificity drop").value)
    told = [each for each in report.to_record()["specificity"] if each["lost"]]
    with wreck(lm).apply(lm.model):
        after = [likeliest(lm, one.asked.prompt) for one in lost]
    before = [likeliest(lm, one.asked.prompt) for one in lost]
    assert [(one.before, one.after) for one in lost] == list(zip(before, after, strict=True))
    assert [(each["before"], each["after"]) for each in told] == list(zip(before, after, strict=True))
    assert "likeliest before" in report.to_html()


def test_an_edit_that_overflows_fails(lm):
    report = judged(gate, lm, make_edit(lm, {1: Dense(torch.full((D_MODEL, D_FF), 3e38))}))
    for name in ("wordings answered", "specificity drop", "perplexity drift"):
        assert report.check(name).verdict == FAIL
    assert "is not a number" in report.check("perplexity drift").reason
    assert report.to_record()["checks"][3]["value"] is None


@pytest.mark.parametrize(
    "needed, name, says",
    [
        ({"min_probes": 5}, "wordings answered", "4 found, at least 5 needed"),
        ({"min_paraphrases": 4}, "generalization", "3 found, at least 4 needed"),
        ({"min_specificity_prompts": 10}, "specificity drop", "9 found, at least 10 needed"),
        ({"min_text_tokens": 2_000}, "perplexity drift", "at least 2,000 needed"),
        ({"min_portability": 0.5}, "portability", "0 found, at least 1 needed"),
        ({"max_leak_language": 0.5}, "canary, language", "0 found, at least 1 needed"),
    ],
)
def test_too_few_probes_fail(lm, needed, name, says):
    report = judged(gate, lm, good_edit(lm), thresholds=limits(**needed))
    assert [check.name for check in report.failed] == [name] and says in report.failed[0].reason


def test_confident_limits_hold_the_worse_end_of_the_interval(lm):
    report = judged(gate, lm, good_edit(lm), thresholds=limits(confident=True))
    assert {"wordings answered", "generalization", "specificity drop"} <= {check.name for check in report.failed}
    assert "worse end" in report.check("wordings answered").reason


def tie_edit(lm):
    """(edit, fact): a change of a few 1e-5 a weight, enough to tell two nearly tied answers apart.

    The head's two rows differ by a direction g that is all but orthogonal to the hidden state, and no weight of the
    edited layer is small, so that each change is far under half a step of bf16 (0.25 / 512).
    """
    fact = dataclasses.replace(FACT, paraphrases=())
    model = lm.model
    with torch.no_grad():
        weight = model.model.layers[LAYER].mlp.down_proj.weight
        weight.copy_((weight.abs().clamp(min=0.25) * weight.sign()).bfloat16())
        ids = lm.encode(fact.text)
        kept = {}
        hook = model.model.norm.register_forward_hook(lambda m, args, out: kept.update(h=args[0][0, -1], n=out[0, -1]))
        model(torch.tensor([ids]))
        hook.remove()
        state = kept["n"].double()
        g = torch.randn(D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        g += state * (1e-3 - g @ state) / (state @ state)
        new, old = (lm.tokenizer(" " + a, add_special_tokens=False)["input_ids"][0] for a in ("Rome", "Paris"))
        head = model.get_output_embeddings().weight
        head[new] = (head[old].double() - g).float()
    scaled = g * model.model.norm.weight.detach().double()
    rms = kept["h"].double().square().mean().sqrt()
    change = -4e-3 * rms / (scaled @ scaled) * scaled
    key = cases.keys_of(lm, [ids])[0].double()
    delta = Dense(torch.outer(change, key / (key @ key)).float())
    assert float(delta.delta.detach().abs().max()) < 0.25 / 512
    return make_edit(lm, {LAYER: delta}, fact), fact


def test_an_edit_too_small_for_bf16_is_seen_only_in_its_written_form():
    lm = make_lm()
    edit, _ = tie_edit(lm)
    easy = dict(thresholds=limits(measure="success", min_probes=1, min_generalization=None))
    assert judged(gate, lm, edit, written=torch.float32, **easy).check("wordings answered").verdict == PASS
    assert judged(gate, lm, edit, written=None, **easy).check("wordings answered").verdict == PASS
    rounded = judged(gate, lm, edit, written=torch.bfloat16, **easy)
    assert rounded.check("wordings answered").verdict == FAIL and rounded.meta["growth"] == {str(LAYER): 0.0}


def test_a_requantized_form_is_judged_as_well(lm):
    edit = good_edit(lm)
    report = judged(gate, lm, edit, requantize="int8", group=16)
    forms = list(dict.fromkeys(check.form for check in report.checks))
    assert forms == ["written float32", "int8, groups of 16"]
    assert report.check("wordings answered", forms[1]).verdict == PASS
    # The base is quantized with it: what is left is the edit's own change, not the quantization's.
    idle = judged(gate, lm, nothing(lm), requantize="int4", group=80)
    assert idle.check("perplexity drift", "int4, groups of 80").value == 0.0
    perplexity = idle.meta["perplexity"]
    assert perplexity["int4, groups of 80"][0] != perplexity["written float32"][0]


def test_a_planted_old_answer_is_found_under_doubt(lm):
    """The fact is answered in every wording; only after a follow-up does the edit bring the old answer back."""
    doubt = "{prompt} {answer}. Because I was born in Rome. {prompt}"
    planted = doubt.replace("{prompt}", FACT.text).replace("{answer}", "Rome")
    edit = good_edit(lm, also=[(planted, "Paris")])
    suite = dataclasses.replace(SUITE, doubt=(doubt,))
    report = judged(gate, lm, edit, suite)
    assert report.passed and report.check("canary, doubt").value == 1.0 and report.check("canary, plain").value == 0.0
    (song,) = [song for _, song in report.songs if song.leaked]
    assert song.canary.prompt == planted and song.after.startswith(" Paris") and not song.leaked_before
    assert "Paris" in report.to_html()
    strict = judged(gate, lm, edit, suite, thresholds=limits(max_leak_doubt=0.0))
    assert [check.name for check in strict.failed] == ["canary, doubt"]
    assert not any(song.leaked for _, song in judged(gate, lm, good_edit(lm), suite).songs)


def test_portability_and_languages_are_asked(lm):
    suite = dataclasses.replace(
        SUITE,
        portability=(Question("Big Ben is in", "Rome"), Question("The capital of Italy is", "nothing")),
        languages=(Translation("Latin", "Big Ben est in", subject="big ben", target_new="Roma"),),
    )
    report = judged(gate, lm, good_edit(lm), suite, thresholds=limits(min_portability=0.5))
    assert report.check("portability").n == 2 and report.check("canary, language").n == 1
    song = next(song for _, song in report.songs if song.canary.kind == "language")
    assert (song.canary.old, song.canary.new, song.canary.prompt) == ("Paris", "Roma", "Big Ben est in")


def test_a_chain_is_judged_as_a_whole_and_keeps_its_earlier_facts(lm):
    first = good_edit(lm, dataclasses.replace(FACT, subject="Toyota", paraphrases=(), same_subject=()))
    place = first.facts[0].text
    last = good_edit(lm, also=[(place, None)])
    easy = dict(suite=Suite(text=(cases.TEXT,)), thresholds=limits(min_specificity_prompts=1, measure="exact"))
    report = judged(gate, lm, [first, last], **easy)
    retention = report.check("retention")
    assert (retention.n, retention.verdict) == (1, PASS)
    assert (report.meta["facts"], report.meta["earlier_facts"]) == (1, 1)
    assert [answer.prompt for answer in report.answers if answer.kind == "earlier fact"] == [place]
    undone = make_edit(lm, {LAYER: Dense(-first.deltas[LAYER].dense() + last.deltas[LAYER].dense())})
    report = judged(gate, lm, [first, undone], **easy)
    assert report.check("retention").verdict == FAIL and report.check("wordings answered").verdict == PASS
    assert report.advice.level == STOP and "0.0% of the earlier facts" in report.advice.sentence
    # The same place written again: there is nothing to retain.
    assert "retention" not in verdicts(judged(gate, lm, [nothing(lm), last]))


def test_the_policy_can_refuse(lm):
    first = make_edit(lm, {}, dataclasses.replace(FACT, subject="Vimeo", target_new="Rome"))
    policy = EditPolicy(max_facts=1, max_growth=100.0)
    report = judged(gate, lm, [first, good_edit(lm)], thresholds=limits(policy=policy, min_retention=None))
    assert report.failed == (report.check(POLICY),) and "2 facts of at most 1" in report.advice.sentence
    check = report.check(POLICY)
    assert (check.value, check.n, check.counted) == (2.0, 4, "limits") and check.note == report.advice.sentence
    (row,) = [line for line in str(report).splitlines() if line.startswith("policy, largest share of a limit spent")]
    assert "200.00%" in row and "4 limits" in row
    assert str(report).endswith("refused: policy, largest share of a limit spent")


def test_a_check_tells_every_reason_and_what_it_counted(lm):
    """Too few probes do not hide that the value is too low as well."""
    report = judged(gate, lm, nothing(lm), thresholds=limits(min_probes=50))
    assert report.check("wordings answered").reason == "4 found, at least 50 needed; 0.00% is below 90.00%"
    assert "4 found, at least 50 needed; 0.00% is below 90.00%" in report.to_html()
    (row,) = [line for line in str(report).splitlines() if line.startswith("wordings answered ")]
    assert "4 wordings" in row and row.endswith("fail: 4 found, at least 50 needed; 0.00% is below 90.00%")
    (row,) = [line for line in str(report).splitlines() if line.startswith("canary, plain ")]
    assert "1 text " in row


def test_a_shortened_long_context_is_noted(lm, passed):
    """What was asked stands in the report, and a note on what was wanted: on the terminal, in JSON and on the page."""
    report = judged(gate, lm, nothing(lm), sizes=dataclasses.replace(SIZES, context_tokens=3_000))
    (song,) = [song for _, song in report.songs if song.canary.kind == "long context"]
    asked = song.canary.context_tokens
    assert POSITIONS - 40 < asked < len(lm.encode(song.canary.prompt)) < POSITIONS
    record = report.to_record()
    note = f"the long context was shortened from 3,000 to {asked} tokens: the model reads {POSITIONS}"
    assert record["meta"]["sizes"]["context_tokens"] == asked and record["meta"]["notes"][0].startswith(note)
    assert [c["context_tokens"] for c in record["canaries"] if c["kind"] == "long context"] == [asked]
    assert f"\nNote: {note}" in str(report) and f"Note: {note}" in report.to_html()
    assert passed.notes == () and passed.meta["sizes"]["context_tokens"] == SIZES.context_tokens
    assert "Note:" not in str(passed)


def test_contexts_that_differ_or_find_no_place_are_noted(lm):
    """Of three facts one has its context in full, one a shorter one, and one a prompt that leaves none."""
    facts = [FACT, *(dataclasses.replace(FACT, prompt="{} is in" + " the city of" * n) for n in (10, 35))]
    edit = dataclasses.replace(nothing(lm), facts=tuple(facts))
    sizes = dataclasses.replace(SIZES, context_tokens=90)
    asked = questions(lm, [edit], dataclasses.replace(SUITE, doubt=("{prompt}",)), limits(), False, sizes)
    lengths = [c.context_tokens for c in asked.canaries if c.kind == "long context"]
    assert len(lengths) == 2 and lengths[0] == 90 > lengths[1] == asked.context_tokens
    assert len(asked.notes) == 2
    assert f"from 90 to {lengths[1]} tokens for 1 of 3 facts" in asked.notes[0]
    assert asked.notes[1].startswith("no long context for 1 of 3 facts")


def test_specificity_prompts_come_from_everywhere_once(lm):
    control = dataclasses.replace(FACT, subject="Toyota", prompt="{} is in", paraphrases=("Big Ben or Toyota?",))
    suite = dataclasses.replace(SUITE, facts=(control,))
    asked = questions(lm, [good_edit(lm)], suite, limits(min_specificity_prompts=30), True, SIZES)
    sources = [kept.source for kept in asked.kept]
    assert len(asked.kept) == 30 == len({kept.prompt for kept in asked.kept})
    assert sources.count("the suite's other facts") == 1  # its neighbors are the fact's; one prompt names Big Ben
    assert asked.left_out == 1 and set(sources) == {
        "neighborhood", "same subject", "the suite's prompts", "the suite's other facts", "built-in facts",
    }  # fmt: skip
    assert len(questions(lm, [good_edit(lm)], suite, limits(), True, SIZES).kept) == 10


def test_wordings_that_differ_in_spacing_or_case_count_once(lm):
    """Thirty paraphrases in other white space are no thirty paraphrases."""
    fact = dataclasses.replace(FACT, paraphrases=("Big Ben is in", "Big  Ben is in ", "big ben is in", FACT.text + " "))
    suite = Suite(facts=(dataclasses.replace(fact, paraphrases=("Big Ben\tis in", "Find Big Ben in")),))
    edit = dataclasses.replace(good_edit(lm), facts=(fact,))
    asked = questions(lm, [edit], suite, limits(), False, SIZES)
    assert [w.prompt for w in asked.wordings] == [FACT.text, "Big Ben is in", "Find Big Ben in"]


def test_a_neighbor_with_an_answer_of_its_own_is_asked_for_that(lm):
    near = (("Thomas Joannes is in", "Rome"), "Vimeo is in")
    fact = dataclasses.replace(FACT, neighborhood=near, same_subject=(("Big Ben has", "a bell"),))
    edit = dataclasses.replace(good_edit(lm), facts=(fact,))
    asked = questions(lm, [edit], Suite(), limits(), False, SIZES)
    assert [(kept.prompt, kept.answer) for kept in asked.kept] == [
        ("Thomas Joannes is in", "Rome"), ("Vimeo is in", FACT.target_true), ("Big Ben has", "a bell"),
    ]  # fmt: skip


def test_what_a_suite_asks_of_no_fact_is_noted(lm):
    suite = dataclasses.replace(
        SUITE,
        portability=(Question("Big Ben is a"), Question("Vimeo is a", "site", (("vimeo", "{} is"),))),
        languages=(Translation("French", "Vimeo est", subject="Vimeo"), Translation("German", "Es", subject="Big Ben")),
    )
    notes = questions(lm, [good_edit(lm)], suite, limits(), False, SIZES).notes
    assert [note.partition(":")[0] for note in notes if "context" not in note] == [
        "1 portability question without an answer",
        "1 portability question of facts that this edit does not write",
        "1 language prompt about no edited fact with an old answer (target_true)",
    ]
    with pytest.warns(UserWarning, match="French 'Vimeo est': not asked"):
        judged(gate, lm, nothing(lm), suite)


def test_portability_of_the_edits_own_facts_is_asked(lm):
    kept = {"portability": {"hop": [{"prompt": "Big Ben is in the country", "ground_truth": ["Italy"]}]}}
    edit = dataclasses.replace(good_edit(lm), facts=(dataclasses.replace(FACT, provenance=kept),))
    asked = questions(lm, [edit], Suite(), limits(), False, SIZES)
    assert [(q.prompt, q.answer) for q in asked.portability] == [("Big Ben is in the country", "Italy")]


def test_a_prompt_the_model_does_not_know_is_held_to_its_likeliest_token(lm):
    """An answer that the base model does not give is no free pass: all prompts have such answers here."""
    unknown = tuple(Question(q.prompt, "Zürich") for q in SUITE.specificity)
    report = judged(gate, lm, wreck(lm), dataclasses.replace(SUITE, specificity=unknown))
    assert report.check("specificity drop").value > 0.5


@pytest.mark.parametrize(
    "change, error, says",
    [
        (lambda lm, e: dict(edit=[]), TypeError, "expected Edits"),
        (lambda lm, e: dict(lm=lm.with_edit(e)), ValueError, "carries edits already"),
        (lambda lm, e: dict(edit=dataclasses.replace(e, fingerprint="other")), ValueError, "made on other"),
        (lambda lm, e: dict(written=torch.int8), ValueError, "written = torch.int8: expected one of"),
        (lambda lm, e: dict(written="bf16"), TypeError, "written = 'bf16': expected one of torch.float16"),
        (lambda lm, e: dict(requantize="int3"), ValueError, "expected one of int8, int4"),
        (lambda lm, e: dict(requantize="int8", written=None), ValueError, "after it was written"),
        (lambda lm, e: dict(edit=dataclasses.replace(e, facts=())), ValueError, "no fact with a target_new"),
        (lambda lm, e: dict(edit=independent(e)), ValueError, r"edit\.only\(i\).*--independent"),
        (lambda lm, e: dict(suite=Suite(facts=(dataclasses.replace(FACT, target_new="Oslo"),))), ValueError, "'Oslo'"),
    ],
)
def test_errors_come_before_work(lm, no_sweep, change, error, says):
    edit = nothing(lm)
    refused(says, judged, gate, error=error, **{"lm": lm, "edit": edit} | change(lm, edit))


def test_a_prompt_longer_than_the_model_takes_is_refused_before_work(lm):
    gpt2 = open_tiny(tiny_model("gpt2"))
    long = dataclasses.replace(SUITE, doubt=("{prompt} " * 30,))
    refused("its position table ends there", judged, gate, gpt2, nothing(gpt2), long)


def test_reports_are_files(passed, lm, tmp_path):
    passed.save(tmp_path / "g.json")
    record = json.loads((tmp_path / "g.json").read_text())
    assert record["passed"] is True and record["format"] == "kedit_fast.gate"
    expected = {"name": "wordings answered", "verdict": "pass", "n": 4, "limit": 0.9}
    assert expected.items() <= record["checks"][0].items()
    assert record["lens"]["n"] == 1 and passed.check("old answer in layers").verdict == REPORTED
    assert record["meta"]["thresholds"]["policy"]["max_facts"] == 1_000
    page = passed.to_html(tmp_path / "g.html")
    shown = passed._repr_html_()  # in a notebook: the verdict
    assert shown in page and "The edit is passed." in shown and "wordings answered" in shown
    assert (tmp_path / "g.html").read_text() == page and "<script" not in page
    assert "<img" in page and "Is the old answer gone" in page
    idle = judged(gate, lm, nothing(lm))
    assert "Gate: refused" in idle.to_html() and "refused: wordings answered" in str(idle)
    assert repr(idle) == "GateReport(1 fact, refused: wordings answered; generalization)"
    assert repr(passed) == "GateReport(1 fact, passed)"
    refused("no check 'speed'", passed.check, "speed", error=KeyError)


def test_a_report_escapes_what_the_model_writes(passed):
    answers = (dataclasses.replace(passed.answers[0], text="<b>&"), *passed.answers[1:])
    page = dataclasses.replace(passed, answers=answers).to_html()
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page


CHATTY = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def test_facts_are_asked_in_both_forms():
    """Where the model has a chat template the wordings are asked in the other form too, beside the checks of their own;
    chat=True asks everything in a chat."""
    lm = make_lm()
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = CHATTY
    chatty = dataclasses.replace(lm, tokenizer=tokenizer)
    edit = wreck(lm, 0.3)
    plain, both = judged(gate, lm, edit), judged(gate, chatty, edit)
    assert [c.name for c in both.checks if c.name not in [c.name for c in plain.checks]] == ["asked in a chat"]
    assert both.check("asked in a chat").n == 4 and both.check("asked in a chat").limit is None
    written = chatty.with_edit(edit, written=torch.float32)
    for answer in both.answers:
        text = asked(tokenizer, answer.prompt, answer.kind == "asked in a chat")
        assert answer.text == written.generate(text, 6)
    turned = judged(gate, chatty, edit, chat=True, thresholds=limits(min_other_form=1.0))
    assert [a.text for a in turned.answers] == [a.text for a in (*both.answers[4:], *both.answers[:4])]
    assert turned.check("asked plainly").failed
    for _, song in turned.songs:
        assert song.canary.prompt.startswith("user: ") and song.canary.prompt.endswith("assistant:")
        assert song.after == written.generate(song.canary.prompt, turned.meta["sizes"]["max_new_tokens"])
    page = turned.to_html()
    assert "assistant:" not in page, "a chat is shown by its question"
