"""Benchmarks of questions against one Hugging Face forward, and one ``generate``, a prompt at a time."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.evaluation import Case, EvalReport
from kedit_fast.evaluation.benchmarks import mquake, rippleedits
from kedit_fast.evaluation.questions import CHOICES
from kedit_fast.evaluation.texts import contains, matches, normalized
from kedit_fast.facts.files import Notes
from kedit_fast.facts.formats import Question
from tests.conftest import refused
from tests.evaluation.benchmarks.records import ALL
from tests.evaluation.test_evaluate import close, make_edit, make_lm, make_owned
from tests.tiny import tiny_model, tiny_tokenizer

N = 6  # tokens written
ASKED_OF = (kf.Fact("{} is in", "Big Ben", "Rome"),)
SOURCES = [name for name in ALL if name not in ("mquake-cot",)]


def cases_of(name, tmp_path, **changes):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([ALL[name] | changes]))
    return kf.BENCHMARKS[name].load(path)


# --- the oracle: every prompt by itself -------------------------------------------------------------------------------


@torch.no_grad()
def forced(lm, prompt, answer):
    """(P, [is each token the likeliest], the likeliest tokens) behind a prompt."""
    ids, target = lm.tokenizer(prompt)["input_ids"], lm.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    rows = lm.model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1].double()
    log_p = rows.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]
    said = rows.argmax(-1).tolist()
    return log_p.mean().exp().item(), [a == b for a, b in zip(said, target, strict=True)], said


@torch.no_grad()
def written(lm, prompt, ends, n=N, accepted=()):
    ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
    made = lm.model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = lm.tokenizer.decode(made, skip_special_tokens=True)
    start = len(text) - len(text.lstrip())
    hidden = text  # ends inside an accepted answer are none
    for answer in accepted:
        hidden = re.sub(re.escape(answer), "x" * len(answer), hidden, flags=re.IGNORECASE)
    return text[: min((hidden.index(end, start) for end in ends if end in hidden[start:]), default=len(text))]


def by_hand(lm, name, case, base=None):
    """({"kind.mode": value}, what each question was answered with)."""
    benchmark = kf.BENCHMARKS[name]
    rows, said = {}, {}
    for at, (kind, prompt, answers, accepted, keeps) in enumerate(asked_by_hand(case)):
        found = {}
        if answers and answers[0] is not None:
            (p, exact, tokens), *others = [forced(lm, prompt, answer) for answer in answers]
            found = {"p": p, "token": sum(exact) / len(exact), "exact": float(all(exact))}
            found["success"] = float(all(p > other for other, _, _ in others)) if others else math.nan
            found["p_other"] = max((other for other, _, _ in others), default=math.nan)
            before = said_before(base, at, "tokens", tokens)
            found["same"] = sum(a == b for a, b in zip(tokens, before, strict=True)) / len(tokens)
            said[at, "tokens"] = tokens
        elif keeps:
            with torch.no_grad():
                top = lm.model(torch.tensor([lm.tokenizer(prompt)["input_ids"]])).logits[0, -1].argmax().item()
            found["same"], said[at, "tokens"] = float(top == said_before(base, at, "tokens", top)), top
        if kind != "choice":
            text = written(lm, prompt, benchmark.until, accepted=accepted)
            said[at, "text"] = text
            before = said_before(base, at, "text", text)
            found["same_text"] = float(normalized(text) == normalized(before))
            if accepted:
                found |= {"match": float(matches(text, accepted)), "contains": float(contains(text, accepted))}
        for mode, value in found.items():
            rows.setdefault(f"{kind}.{mode}", []).append(value)
    stays = rows.get("locality.same", []) + rows.get("same_subject.same", [])
    found = {key: mean(values) for key, values in rows.items()}
    return found | ({"kept.same": mean(stays)} if name == "knowedit" else {}), said


def said_before(base, at, what, now):
    return now if base is None else base[at, what]


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def asked_by_hand(case):
    """(kind, prompt, answers that are compared, accepted ones, whether it keeps its likeliest token)"""
    for fact in case.facts:
        new, true = fact.target_new, fact.target_true
        for kind, prompts in (("rewrite", [fact.text]), ("paraphrase", fact.paraphrases)):
            for prompt in prompts:
                yield kind, prompt, [new, *([true] if true else [])], (new,), False
        if true:
            for a, b, letters in ((new, true, ("A", "B")), (true, new, ("B", "A"))):
                yield "choice", CHOICES.format(prompt=fact.text, a=a, b=b), letters, (), False
        for one in fact.questions("neighborhood"):
            yield "locality", one.prompt, [one.answer, new], (one.answer,), False
        for one in fact.questions("same_subject"):
            yield "same_subject", one.prompt, [one.answer], (one.answer,) if one.answer else (), True
    for one in case.questions:
        accepted = () if one.answer is None else (one.answer, *one.aliases)
        yield one.kind, one.prompt, [one.answer, *one.against], accepted, True


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", [name for name in SOURCES if name not in ("mquake", "rippleedits")])
def test_equals_one_prompt_at_a_time(name, family, tmp_path):
    lm, benchmark = make_lm(family), kf.BENCHMARKS[name]
    (case,) = cases_of(name, tmp_path)
    edit = make_edit(lm, case.facts)
    report = kf.evaluate(lm, [case], edit, benchmark=benchmark, generate=N)
    before, said = by_hand(lm, name, case)
    with edit.apply(lm.model):
        after, _ = by_hand(lm, name, case, said)
    for got, want in ((report.base, before), (report.edited, after)):
        for key, column in got.items():
            if not key.startswith(("deducible", "locality_left_out")):
                assert column[0].item() == pytest.approx(want.get(key, math.nan), rel=1e-4, nan_ok=True), key
    assert report.base != report.edited and sum(not math.isnan(v) for v in before.values()) > 8
    assert any(before[key] != after[key] for key in after if key.endswith(".same")), "the edit shows nowhere"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2", "gpt_neox", "olmo2"])
def test_what_is_written_is_transformers_own_text(family):
    """Token for token, up to stop rule and end token, whatever the other texts' lengths."""
    lm = make_lm(family)
    prompts = ["Big Ben is in", "The", "Monk plays the piano in New York because he", "Where is Rome? In"]
    for until in ((), (" ",), (".", "\n")):
        probes = [kf.evaluation.probes.probe(lm, text, n_written=9, until=until) for text in prompts]
        got = kf.evaluation.written.write_probes(lm, probes)
        assert got == [written(lm, text, until, 9) for text in prompts]


# --- the modes --------------------------------------------------------------------------------------------------------


def test_a_benchmark_writes_as_it_says_unless_told_otherwise(tmp_path):
    lm, benchmark = make_lm(), kf.BENCHMARKS["wikibigedit"]
    cases = cases_of("wikibigedit", tmp_path)
    none = kf.evaluate(lm, cases, benchmark=benchmark, generate=0)
    assert none.base["rewrite.match"].isnan().all() and not none.base["rewrite.exact"].isnan().any()
    own = kf.evaluate(lm, cases, benchmark=benchmark)
    assert not own.base["rewrite.match"].isnan().any() and not own.generations
    told = kf.evaluate(lm, cases, benchmark=benchmark, generate=3)
    assert told.generations == ((cases[0].facts[0].text, lm.generate("Where is Big Ben?", 3), None),)


def test_the_users_judge(tmp_path):
    lm, seen = make_lm(), []

    def judge(prompt, accepted, text):
        seen.append((prompt, accepted, text))
        return 0.25

    report = kf.evaluate(lm, cases_of("qaedit", tmp_path), benchmark=kf.BENCHMARKS["qaedit"], judge=judge, generate=2)
    assert report.base["rewrite.judge"].tolist() == [0.25] and seen[0][:2] == ("where is big ben", ("Rome",))
    assert "rewrite.judge" not in str(report) and " judge " in str(report)
    with pytest.raises(kf.basics.checks.BadArgument, match="judge = 5: expected a function"):
        kf.evaluate(lm, cases_of("qaedit", tmp_path), benchmark=kf.BENCHMARKS["qaedit"], judge=5)


def test_a_judge_is_given_a_chats_question():
    """Not what the template makes of it."""
    tokenizer, seen = copy.deepcopy(tiny_tokenizer()), []
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<me>"
    lm = kf.open_model(tiny_model("llama"), tokenizer=tokenizer)
    fact = kf.Fact("Where is {}?", "Big Ben", "Rome", chat=(("system", "Be brief."),))
    how = {"benchmark": kf.BENCHMARKS["questions"], "generate": 2}
    kf.evaluate(lm, fact, judge=lambda *given: bool(seen.append(given[:2])), **how)
    assert seen == [("Where is Big Ben?", ("Rome",))] * 2, "as a question in a chat and plainly"


@pytest.mark.parametrize("given", [7, -1, None, "yes", math.nan])
def test_a_judge_that_says_anything_else_is_refused(given):
    read, one = kf.evaluation.readings.read, kf.evaluation.probes.Probe([1], "a", accepted=("Rome",))
    answer = kf.evaluation.probes.Answer(text="Rome")
    refused("what judge gives = .*expected a number from 0 to 1", read, "judge", one, answer, answer, lambda *_: given)
    assert [read("judge", one, answer, answer, lambda *_, x=x: x) for x in (True, 0, torch.tensor(0.5))] == [1, 0, 0.5]


def test_without_paraphrases_nothing_is_counted(tmp_path):
    """Never as zero."""
    case = cases_of("wikibigedit", tmp_path, rephrase_prompt=None, locality_prompt=None, locality_ground_truth=None)
    report = kf.evaluate(make_lm(), case, benchmark=kf.BENCHMARKS["wikibigedit"], generate=0)
    summary = report.summary()
    assert summary["paraphrase.token"]["base"].n == 0 and math.isnan(summary["score"]["base"].mean)
    assert "paraphrase" not in str(report)


def test_neighbors_that_name_an_edited_subject_are_counted():
    near = ("The Louvre is in", ("Big Ben stands in", "London"), ("Monk plays the", "piano"))
    fact = kf.Fact("{} is in", "Big Ben", "Rome", "Paris", neighborhood=near)
    report = kf.evaluate(make_lm(), [fact], benchmark=kf.BENCHMARKS["questions"], generate=0)
    assert report.base["locality_left_out"].tolist() == [1]
    assert "1 of 3 neighborhood prompts left out: they name an edited subject" in report.notes
    assert "locality_left_out" not in str(report)


def test_facts_are_counted_mode_by_mode():
    facts = [
        kf.Fact("{} is in", "Big Ben", "Rome", "London"),
        *(kf.Fact("{} is in", f"Town {i}", "Rome") for i in range(5)),
    ]
    report = kf.evaluate(make_lm(), facts, benchmark=kf.BENCHMARKS["questions"], generate=0)
    (row,) = [line for line in str(report).splitlines() if line.startswith("rewrite ")]
    assert row.endswith(" 1, 6"), "one has an old answer to compare with"


def test_a_table_of_kinds_by_modes(tmp_path):
    lm, benchmark = make_lm(), kf.BENCHMARKS["zsre"]
    cases = cases_of("zsre", tmp_path)
    report = kf.evaluate(lm, cases, make_edit(lm, cases[0].facts), benchmark=benchmark, generate=2)
    lines = str(report).splitlines()
    (header,) = (line.split() for line in lines if line.startswith("asked"))
    assert header == [
        "asked",
        "success",
        "p",
        "p_other",
        "token",
        "exact",
        "match",
        "contains",
        "same",
        "same_text",
        "facts",
    ]
    assert {line.split()[0] for line in lines} >= {"rewrite", "paraphrase", "locality", "choice", "portability"}
    assert any("teacher-forced" in line and "in free writing" in line for line in report.verdict)
    report.save(tmp_path / "report.json")
    again = EvalReport.load(tmp_path / "report.json")
    assert str(again) == str(report)
    close(again.edited, report.edited, 0)
    page = report.to_html(tmp_path / "page.html")
    assert "the new answer to paraphrases" in page and "<table" in page


def test_independent_edits_are_each_cases_own(tmp_path):
    lm, name = make_lm(), "wikibigedit"
    path = tmp_path / "two.json"
    path.write_text(
        json.dumps([ALL[name], ALL[name] | {"prompt": "Who is Monk?", "subject": "Monk", "target_new": "a"}])
    )
    cases = kf.BENCHMARKS[name].load(path)
    facts = [case.facts[0] for case in cases]
    edit = make_owned(lm, facts)
    how = {"benchmark": kf.BENCHMARKS[name], "generate": 2}
    together = kf.evaluate(lm, cases, edit, **how)
    for i, case in enumerate(cases):
        alone = kf.evaluate(lm, case, edit.only(i), **how)
        close({k: v[i : i + 1] for k, v in together.edited.items()}, alone.edited)


def test_a_killed_evaluation_knows_other_questions(tmp_path):
    lm, benchmark = make_lm(), kf.BENCHMARKS["wikibigedit"]
    kf.evaluate(lm, cases_of("wikibigedit", tmp_path), benchmark=benchmark, generate=1, checkpoint=tmp_path / "run")
    (case,) = cases_of("wikibigedit", tmp_path)
    more = Case(case.facts, (Question("Rome is in", "Italy", kind="portability"),))
    how = {"generate": 1, "checkpoint": tmp_path / "run"}
    with pytest.raises(ValueError, match="questions"):
        kf.evaluate(lm, more, benchmark=benchmark, **how)
    with pytest.raises(ValueError, match="questions"):
        kf.evaluate(lm, case, benchmark=replace(benchmark, until=("\n",)), **how)


def test_a_killed_evaluation_knows_another_judge(tmp_path):
    """By its name, or by what it does."""
    lm, cases = make_lm(), cases_of("qaedit", tmp_path)
    how = {"benchmark": kf.BENCHMARKS["qaedit"], "generate": 1, "checkpoint": tmp_path / "run"}
    judges = [lambda prompt, accepted, text: 1.0, lambda prompt, accepted, text: 0.0, None]
    first = kf.evaluate(lm, cases, judge=judges[0], **how)
    assert kf.evaluate(lm, cases, judge=judges[0], **how).base["rewrite.judge"].tolist() == [1.0]
    for judge in judges[1:]:
        refused("holds other work: its judge is .<lambda> .*, this one's", kf.evaluate, lm, cases, judge=judge, **how)
    assert first.meta["judge"].startswith("<lambda> ") and first.meta["generate"] == 1
    known_as = kf.evaluation.readings.known_as
    assert known_as({"Rome"}.issuperset) == "set.issuperset" and known_as(type("Judge", (), {})()) == "Judge"
    assert known_as(lambda *a: "b" in {"a", "b"}) != known_as(lambda *a: "b" in {"a", "c"})


@pytest.mark.parametrize("facts, questions, says", [
    ((), (), "Case.facts is empty"),
    ((5,), (), "Case.facts = 5"),
    (ASKED_OF, ("Rome is in",), "Case.questions = 'Rome is in'"),
    (ASKED_OF, 5, "Case.questions = 5"),
])  # fmt: skip
def test_what_is_no_case_is_refused(facts, questions, says):
    refused(says, Case, facts, questions)


def test_a_case_of_one_fact_or_of_lists():
    assert Case(ASKED_OF[0]) == Case(list(ASKED_OF), []) == Case(ASKED_OF)


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([ALL["knowgic"], ALL["knowgic"] | {"chain": {"prompts": ["a"], "subjects": []}}]))
    refused(f"{path}: record 1: chain: expected prompts, subjects, answers as lists of one length",
            lambda: kf.BENCHMARKS["knowgic"].load(path))  # fmt: skip
    with pytest.warns(UserWarning, match="passed over, 1 record: .*record 1: chain"):
        assert len(kf.BENCHMARKS["knowgic"].load(path, skip_bad=True)) == 1
    path.write_text(json.dumps([ALL["knowgic"] | {"chain": ALL["knowgic"]["chain"] | {"answers": ["Monk", None]}}]))
    refused("record 0: chain: expected .* as texts, found None", lambda: kf.BENCHMARKS["knowgic"].load(path))
    path.write_text(json.dumps([{"question": "a"}]))
    refused(
        "record 0: expected an object with question, subject and object", lambda: kf.BENCHMARKS["halluedit"].load(path)
    )
    with pytest.raises(ValueError, match="n = 0"):
        kf.BENCHMARKS["halluedit"].load(path, 0)


def test_the_two_protocols_of_zsre(tmp_path):
    (wrong,), (true,) = (cases_of(name, tmp_path) for name in ("zsre", "zsre-true"))
    assert (wrong.facts[0].target_new, wrong.facts[0].target_true) == ("Rome", "London")
    assert (true.facts[0].target_new, true.facts[0].target_true) == ("London", None) and not true.questions
    ((neighbor,),) = (
        one.facts[0].questions("neighborhood") for one in cases_of("zsre-true", tmp_path, loc_ans="London")
    )
    assert neighbor[:2] == ("nq question: who plays the piano?", "London"), "the same answer as the edit's is one"
    assert wrong.facts[0].questions("neighborhood")[0].prompt == "nq question: who plays the piano", "as EasyEdit asks"
    assert [(one.kind, one.prompt, one.answer) for one in wrong.questions] == [
        ("portability", "In which country is Big Ben?", "Italy")
    ]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([ALL["zsre"] | {"answers": []}]))
    refused("record 0: answers: expected the true answer", lambda: kf.BENCHMARKS["zsre-true"].load(path))


def test_kinds_of_portability(tmp_path):
    (case,) = cases_of("knowedit", tmp_path)
    assert [one.kind for one in case.questions] == ["logical", "alias", "portability"]
    assert case.facts[0].neighborhood[0].answer == "Madrid"


def test_questions_of_halluedit(tmp_path):
    (case,) = cases_of("halluedit", tmp_path)
    kinds = {one.kind: one for one in case.questions}
    assert list(kinds) == ["multiple_choice", "yes", "no", "reversed", "2_hops", "kept"]
    assert kinds["multiple_choice"].answer == "B" and kinds["multiple_choice"].against == ("A", "C")
    assert (kinds["no"].answer, kinds["no"].against) == ("No", ("Yes",)) and kinds["kept"].answer is None
    assert case.facts[0].target_true == "London" and case.facts[0].paraphrases == ("In which place is Big Ben?",)


def test_links_of_a_chain_and_what_can_be_deduced(tmp_path):
    lm = make_lm()
    (case,) = cases_of("knowgic", tmp_path)
    assert [(one.kind, one.prompt) for one in case.questions] == [
        ("chain", "Big Ben was built by"), ("chain", "Monk lives in"), ("context", "Monk plays the")
    ]  # fmt: skip
    with torch.no_grad():  # a chain that this model answers
        tops = [lm.top_tokens(one.prompt, 1)[0][0] for one in case.questions]
    answers = {"prompts": ["{} was built by"], "subjects": ["Big Ben"], "answers": [tops[0].strip()]}
    (known,) = cases_of("knowgic", tmp_path, chain=answers)
    report = kf.evaluate(lm, [case, known], benchmark=kf.BENCHMARKS["knowgic"], generate=2)
    assert (
        report.base["chain.exact"].tolist() == report.base["deducible.exact"].tolist() == [0, float(tops[0][0] == " ")]
    )


# --- MQuAKE -----------------------------------------------------------------------------------------------------------


def test_a_case_of_mquake(tmp_path):
    (case,) = cases_of("mquake", tmp_path)
    assert [(one.kind, one.prompt, one.answer) for one in case.questions][:3] == [
        ("hop, edited", "Big Ben is in", "Rome"), ("hop", "Where is Rome?", "Italy"),
        ("multi_hop", "In which country is Big Ben?", "Italy"),
    ]  # fmt: skip
    assert "portability" not in case.facts[0].provenance
    lm = make_lm()
    asked = {one.kind: one for one in kf.BENCHMARKS["mquake"].probes(lm, case)}
    assert asked["multi_hop"].text.endswith("\nQuestion: Name the country of Big Ben.\nAnswer:")
    assert asked["multi_hop"].text.startswith("Question: ") and asked["hop, edited"].text == "Big Ben is in"
    thinking = {one.kind: one for one in kf.BENCHMARKS["mquake-cot"].probes(lm, case)}
    assert thinking["multi_hop"].text.endswith("\nThoughts:") and thinking["hop"].text.endswith("\nAnswer:")
    assert thinking["multi_hop"].accepted == ("Italy", "Italia")
    assert thinking["multi_hop"].answers == () == thinking["old"].answers, "no answer in the place of a thought"
    assert thinking["hop"].answers and asked["multi_hop"].answers
    blank = ALL["mquake"]["new_single_hops"][1] | {"question": ""}
    (case,) = cases_of("mquake", tmp_path, new_single_hops=[ALL["mquake"]["new_single_hops"][0], blank])
    assert [one.kind for one in case.questions][:2] == ["hop, edited", "multi_hop"]


def test_an_answer_behind_thoughts_is_read_there(tmp_path):
    (case,) = cases_of("mquake-cot", tmp_path)
    benchmark, Answer = kf.BENCHMARKS["mquake-cot"], kf.evaluation.probes.Answer
    probes = benchmark.probes(make_lm(), case)
    thought = " It is in Rome, which is not in England.\nAnswer: Italy\n"
    answers = [Answer(p=(0.1,) * len(one.answers), exact=(0.0,) * len(one.answers), said=((0,),) * len(one.answers),
                      text=thought) for one in probes]  # fmt: skip
    found = benchmark.values(case, probes, answers, answers)
    assert (found["multi_hop.match"], found["multi_hop.contains"], found["any_of_three.match"]) == (1, 1, 1)
    assert (found["old.match"], found["old.contains"]) == (0, 0)
    for name in ("multi_hop.token", "multi_hop.exact", "any_of_three.exact", "old.exact"):
        assert math.isnan(found[name]), name


def test_columns_of_mquake_by_hand(tmp_path):
    (case,) = cases_of("mquake", tmp_path)
    Probe, Answer = kf.evaluation.probes.Probe, kf.evaluation.probes.Answer
    kinds = ["hop, edited", "hop", "multi_hop", "old", "multi_hop", "old"]
    accepted = [("Rome", "Roma"), ("Italy",), ("Italy",), ("England", "Britain"), ("Italy",), ("England", "Britain")]
    texts = ["Rome, of course", "Italy", "France", "France", "It lies there.\nAnswer: Italy\n", "Britain"]
    exact = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    probes = [Probe([1], "", ([1],), kind, accepted=a) for kind, a in zip(kinds, accepted, strict=True)]
    answers = [Answer((0.1,), (e,), ((1,),), text=text) for e, text in zip(exact, texts, strict=True)]
    assert mquake.columns(case, probes, answers, answers) == {
        "instance.exact": 0, "instance.match": 0, "instance.contains": 1,
        "any_of_three.exact": 1, "any_of_three.match": 1, "any_of_three.contains": 1,
        "old.exact": 0, "old.match": 1, "old.contains": 1,
        "multi_hop.token": 1, "multi_hop.exact": 0.5, "multi_hop.match": 0.5, "multi_hop.contains": 0.5,
    }  # fmt: skip
    unwritten = [answer._replace(text=None) for answer in answers]
    found = mquake.columns(case, probes, unwritten, unwritten)
    assert math.isnan(found["instance.match"]) and found["any_of_three.exact"] == 1


# --- RippleEdits ------------------------------------------------------------------------------------------------------


def test_ripples_by_hand(tmp_path):
    benchmark = kf.BENCHMARKS["rippleedits"]
    (case,) = cases_of("rippleedits", tmp_path)
    (fact,) = case.facts
    assert (fact.prompt, fact.subject, fact.target_new) == ("The name of the child of {} is", "Kanye West", "Monk")
    probes, Answer = benchmark.probes(make_lm(), case), kf.evaluation.probes.Answer

    def values(said, base=None):
        def answers(texts):
            return [Answer(text=texts.get(one.text, "")) for one in probes]

        return rippleedits.columns(case, probes, answers(said), answers(said | (base or {})))

    said = {fact.text: "Monk", "Monk's father is": "Ye!", "Kanye is a": "man", "Monk is": "7, a son"}
    assert values(said) == {
        "LG": 1.0, "LG executed": 2, "RS": 0.0, "RS executed": 1,
        **{f"{n} executed": 0 for n in ("CI", "CII", "SA", "PV")},
        **{n: pytest.approx(math.nan, nan_ok=True) for n in ("CI", "CII", "SA", "PV")},
    }  # fmt: skip
    assert values(said | {"Monk is": "a 7"})["LG"] == 0.5, "each answer that is asked for"
    assert values(said | {"Monk's father is": "ye"})["LG"] == 0.5, "upper and lower case are told apart"
    assert values(said, {"Kanye is a": "?"})["LG executed"] == 1, "a condition is of the model without the edit"
    assert values(said | {fact.text: "no"}) == {}, "the edit itself does not hold"
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{"edit": {"prompt": "He is it.", "original_fact": {"prompt": "He is that."}}}]))
    refused("record 0: edit: prompt: expected 'The ... of SUBJECT is ANSWER.'", lambda: benchmark.load(path))


@pytest.mark.parametrize("relation, sentence, subject, prompt, new", [
    ("COUNTRY", "The name of the country which Dome of the Rock is associated with is Israel.", "Dome of the Rock",
     "The name of the country which {} is associated with is", "Israel"),
    ("COUNTRY_OF_CITIZENSHIP", "The name of the country of citizenship of Henry V of England is France.",
     "Henry V of England", "The name of the country of citizenship of {} is", "France"),
    ("AUTHOR", "The name of the author of Lord of the Flies is Ann Lee.", "Lord of the Flies",
     "The name of the author of {} is", "Ann Lee"),
    ("HEAD_OF_STATE", "The name of the head of state of Spain is Ann.", "Spain",
     "The name of the head of state of {} is", "Ann"),
    ("EMPLOYER", "The name of the employer of Ann Lee is Twitter, Inc..", "Ann Lee",
     "The name of the employer of {} is", "Twitter, Inc."),
    ("SIBLING", "The names of the siblings of Prince are Tyka Nelson.", "Prince",
     "The names of the siblings of {} are", "Tyka Nelson"),
    ("AWARD_RECEIVED", "The name of the award Lionel Messi won is Nobel Prize.", "Lionel Messi",
     "The name of the award {} won is", "Nobel Prize"),
    ("LEAGUE", "The name of the league which Chelsea F.C. plays in is Serie A.", "Chelsea F.C.",
     "The name of the league which {} plays in is", "Serie A"),
    ("FOLLOWED_BY", "2022 in film is followed by 2024 in film.", "2022 in film", "{} is followed by", "2024 in film"),
    ("FOLLOWS", "The Life of Brian is here follows Jabberwocky.", "The Life of Brian is here", "{} follows",
     "Jabberwocky"),
])  # fmt: skip
def test_the_fact_of_a_ripple_is_read_off_its_sentence(relation, sentence, subject, prompt, new):
    """In every form, with an old fact or, as in RECENT, without."""
    recent = rippleedits.fact_of({"relation": relation, "prompt": sentence})
    assert recent == {"prompt": prompt, "subject": subject, "target_new": new, "target_true": None}
    old = prompt.replace("{}", subject)
    for true in (f"{new} and more", "x", ""):  # an answer that begins as the new one does; and none
        edit = {"relation": relation, "prompt": sentence, "original_fact": {"prompt": f"{old} {true}."}}
        assert rippleedits.fact_of(edit) == recent | {"target_true": true or None}


def test_what_is_no_ripple_is_refused():
    """Whatever stands where something else should, the record is named and can be passed over."""
    benchmark = kf.BENCHMARKS["rippleedits"]

    def places(value, at=()):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*at, key)
            if isinstance(one, dict | list):
                yield from places(one, (*at, key))

    for at in places(ALL["rippleedits"]):
        for wrong in (None, 5, "x", [5], {"a": 1}, [[]]):
            record = json.loads(json.dumps(ALL["rippleedits"]))
            inside = record
            for key in at[:-1]:
                inside = inside[key]
            inside[at[-1]] = wrong
            try:
                benchmark.probes(make_lm(), benchmark.read(record, 0, Notes()))
            except ValueError as error:
                assert str(error)


def test_a_ripple_without_a_spelling_is_never_said(tmp_path):
    query = {"prompt": "The father of Monk is", "answers": [{"value": "K", "aliases": []}]}
    more = {"test_condition": "AND", "test_queries": [query]}
    (case,) = cases_of("rippleedits", tmp_path, Logical_Generalization=[more], Relation_Specifity=[])
    probes, Answer = kf.BENCHMARKS["rippleedits"].probes(make_lm(), case), kf.evaluation.probes.Answer
    said = [Answer(text="Monk, K") for _ in probes]
    found = rippleedits.columns(case, probes, said, said)
    assert (found["LG"], found["LG executed"]) == (0, 1)
