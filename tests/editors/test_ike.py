"""IKE: the text before a prompt written out by hand, its scores by Hugging Face's own forward, and what gets none."""

import json
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.ike import COPY, RETAIN, ROLES, UPDATE
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.evaluation.probes import probe, read_edited, read_probes
from kedit_fast.facts.tokens import answer_tokens
from kedit_fast.shipping.history import EditHistory
from tests.conftest import refused, tiny_lm
from tests.editors import cases
from tests.jobs.test_generate import counted_rows
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:facts not written", "ignore:.*too few probes")
FACTS = (
    kf.Fact(
        "{} is in the city of", "Big Ben", "Rome", "London", ["Where is Big Ben? It is in"], ["France is in"], id="0"
    ),
    kf.Fact("{} plays the", "Miles Davis", "piano", "trumpet", neighborhood=["Monk plays the"], id="1"),
)
EXAMPLES = (
    kf.Fact("{} is in the city of", "Vimeo", "London", "Paris", ["Vimeo is located in"], ["Toyota is in"]),
    kf.Fact("{} was born in", "Monk", "Rome", "Spain", ["Monk is in"], ["LeBron was born in"]),
    kf.Fact("{} is produced by", "Toyota Camry", "Apple", "Toyota"),  # nothing to show it in other words by
    kf.Fact("{} is in the city of", "big ben", "Seattle", "Paris", ["A tower is in"], ["Vimeo is in"]),
)
# Of two: the nearer one keeps a neighbor's answer, the other one is said in other words.
BEFORE = (
    "New Fact: Monk was born in Rome\nPrompt: Monk is in Rome\n\n"
    "New Fact: Vimeo is in the city of London\nPrompt: Toyota is in Paris\n\n"
    "New Fact: Big Ben is in the city of Rome\nPrompt: Big Ben is in the city of Rome\n\n"
    "New Fact: Big Ben is in the city of Rome\nPrompt: "
)
PLAIN = "New Fact: Big Ben is in the city of Rome\nPrompt: "
CALM = {"max_tokens": 115}  # the tiny models read 128


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> str:
    """A file of facts to show."""
    return fact_file(tmp_path_factory.mktemp("facts") / "examples.json", EXAMPLES)


def fact_file(path, facts) -> str:
    path.write_text(json.dumps([fact.to_record() for fact in facts]))
    return str(path)


def p_of(model, text: str, answer: str) -> float:
    """exp of the mean log-probability of an answer's tokens behind a text, by Hugging Face's own forward."""
    ids, target = tiny_tokenizer()(text)["input_ids"], answer_tokens(tiny_tokenizer(), text, answer)
    with torch.no_grad():
        logits = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1)[range(len(target)), target].mean().exp().item()


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", None), ("llama", torch.float64), ("gemma2", None)])
def test_scores_are_those_of_the_text_written_out(family, dtype, examples, monkeypatch):
    """With demonstrations and without; what names no subject is the base run."""
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, *([dtype] if dtype else []))
    for editor, before in ((kf.Ike(k=2, examples=examples, **CALM), BEFORE), (kf.IkePlain(), PLAIN)):
        edit = editor.edit(lm, FACTS)
        assert edit.changes[0].texts[0] == before and edit.method == editor.METHOD
        report = kf.evaluate(lm, FACTS, edit)
        near = 1e-8 if dtype else 1e-4
        for name, prompt, answer in (
            ("p_new", FACTS[0].text, "Rome"), ("p_true", FACTS[0].text, "London"),
            ("paraphrase_p_new", FACTS[0].paraphrases[0], "Rome"),
        ):  # fmt: skip
            expected = p_of(lm.model, before + prompt, answer)
            read = read_edited(lm.with_edit(edit), [probe(lm, prompt, [answer])])[0]
            assert read.p[0] == pytest.approx(expected, rel=near)
            assert report.edited[name][0].item() == pytest.approx(expected, rel=1e-4)
        assert torch.equal(report.edited["neighborhood_p_true"], report.base["neighborhood_p_true"])
        view = lm.with_edit(edit)
        asked = [FACTS[0].text, *FACTS[0].neighborhood]
        assert view.generate(asked, 3) == lm.generate([before + FACTS[0].text, *FACTS[0].neighborhood], 3)
        assert view.top_tokens(asked[1]) == lm.top_tokens(asked[1])


def test_independent_ones_stand_before_all_that_is_asked_of_their_fact(examples):
    """So the papers score: before the neighbors too."""
    lm = tiny_lm("llama")
    edit = kf.IkePlain(examples=examples).edit(lm, FACTS, independent=True)
    assert edit.independent and edit.route is None
    report = kf.evaluate(lm, FACTS, edit)
    neighbor = PLAIN + FACTS[0].neighborhood[0]
    assert report.edited["neighborhood_p_true"][0].item() == pytest.approx(p_of(lm.model, neighbor, "London"), rel=1e-4)
    alone = edit.only(0)
    assert kf.evaluate(lm, FACTS[0], alone).edited["p_new"][0].item() == pytest.approx(report.edited["p_new"][0].item())


def test_roles_are_one_to_three_to_four_and_the_nearest_stands_last(tmp_path):
    assert [ROLES.count(role) for role in (COPY, UPDATE, RETAIN)] == [1, 3, 4]
    pool = [
        kf.Fact("{} is in the city of", f"Tower{' Zed' * i}", "Rome", "Paris", [f"Where is Tower{' Zed' * i}? In"],
                [f"Ben {i} is in"]) for i in range(40)
    ]  # fmt: skip
    editor = replace(kf.Ike(), examples=fact_file(tmp_path / "pool.json", pool))
    lm = tiny_lm("llama", layers=1)
    fact = kf.Fact("{} is in the city of", "The Eiffel Tower", "Rome")
    # the first shares the most with it: other words make a text less alike
    for options, n in (({}, 32), ({"k": 8}, 8), ({"k": 99}, 40)):
        text = replace(editor, max_tokens=10**6, **options).texts(lm, [fact])[0]
        shown = text.split("\n\n")[:-2]  # but itself, and the line before the prompt
        assert len(shown) == n
        roles = [RETAIN if "Ben" in one else UPDATE if "Where" in one else COPY for one in shown]
        assert [roles.count(role) / n for role in (COPY, UPDATE, RETAIN)] == [1 / 8, 3 / 8, 4 / 8]
        assert [one.split("Prompt")[0].count("Zed") for one in shown] == list(reversed(range(n)))
    most = 400
    cut = replace(editor, max_tokens=most).texts(lm, [fact])[0]
    whole = replace(editor, max_tokens=10**6).texts(lm, [fact])[0]
    assert whole.endswith(cut) and cut.count("New Fact") > 3
    assert most - 60 < len(lm.tokenizer(cut, add_special_tokens=False)["input_ids"]) <= most


def test_shared_ones_are_the_same_for_all(examples):
    lm = tiny_lm("llama")
    one, other = (text.split("\n\n") for text in kf.Ike(k=2, examples=examples, shared=True, **CALM).texts(lm, FACTS))
    assert one[:2] == other[:2] and "Big Ben" in one[2] and "Davis" in other[2]


def test_demonstrations_are_read_once(examples, monkeypatch):
    """By all questions of a fact, and where they are shared by all facts': reading and writing."""
    lm = tiny_lm("llama")
    asked = [FACTS[0].text, FACTS[0].paraphrases[0], FACTS[1].text]
    for shared in (True, False):
        view = lm.with_edit(kf.Ike(k=2, examples=examples, shared=shared, **CALM).edit(lm, FACTS))
        texts = view.as_read(asked)[1]
        probes = [probe(lm, text, likeliest=True) for text in asked]
        beginnings = {tuple(ids[: n + 1]) for ids in map(lm.encode, texts) for n in range(len(ids))}
        total = sum(len(lm.encode(text)) for text in texts)
        assert len(beginnings) < (total / 2 if shared else 0.8 * total)
        rows = counted_rows(monkeypatch)
        read_probes(view, probes)
        base = {tuple(ids[: n + 1]) for ids in map(lm.encode, asked) for n in range(len(ids))}
        assert sum(rows) == len(base) + len(beginnings)
        rows.clear()
        made = view.generate(asked, 3)
        assert rows[0] == len(beginnings) and made == [view.generate(prompt, 3) for prompt in asked]
        monkeypatch.undo()


def test_what_the_edited_facts_are_asked_is_not_shown(tmp_path):
    """Neither a fact of an edited subject, nor a neighbor that names one, nor a prompt of their probes."""
    lm = tiny_lm("llama", layers=1)
    asked = kf.Fact("{} is in", "Paris", "Rome", "London", ["Paris is near"], ["France is in"])
    naming = kf.Fact("{} is in the city of", "Zürich", "Rome", "Spain", ["Zürich is"], ["the big Ben is near"])
    name = fact_file(tmp_path / "facts.json", [*EXAMPLES[2:], asked, naming])
    refused(r"no fact there can be shown.*\(or k = 0", kf.Ike(examples=name).edit, lm, FACTS)
    assert "big Ben" in kf.Ike(examples=name, **CALM).texts(lm, FACTS[1:])[0]


def test_everything_takes_it_or_says_what_instead(examples, tmp_path):
    lm = tiny_lm("llama")
    edit = kf.Ike(k=2, examples=examples, **CALM).edit(lm, FACTS)
    assert edit.provenance["tokens"][0] == len(lm.tokenizer(BEFORE)["input_ids"]) and "found" not in edit.provenance
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(edit) and loaded.hparams["k"] == 2
    history = EditHistory(tmp_path / "edits")
    history.add(loaded, "Rome")
    assert digest(history.current[0]) == digest(edit)
    with pytest.warns(UserWarning, match="too few probes"):
        judged = kf.gate(lm, loaded, written=None, sizes=kf.gating.questions.Sizes(max_new_tokens=2, context_tokens=9))
    assert judged.checks
    for act in (lambda: edit.apply(lm.model), lambda: kf.export_peft(edit, tmp_path / "x"),
                lambda: kf.compose([edit, edit])):  # fmt: skip
        refused(r"routed.*lm\.with_edit", act)
    assert lm.with_edit(edit.without(0)).top_tokens(FACTS[0].text) == lm.top_tokens(FACTS[0].text)
    assert lm.with_edit(edit.without(0)).generate(FACTS[1].text, 2) == lm.with_edit(edit).generate(FACTS[1].text, 2)


def test_settings_without_effect_are_refused(examples):
    lm = tiny_lm("llama")
    for says, options in (
        ("contexts = .*reads texts alone", {"contexts": ["{}"]}), ("corpus = .*reads texts alone", {"corpus": "self"}),
        ("checkpoint = .*no finished parts", {"checkpoint": "x"}),
    ):  # fmt: skip
        refused(says, kf.Ike().edit, lm, FACTS, **options)
    refused("route = 'near'.*names, similarity", kf.Ike, route="near")
    refused("k = -1", kf.Ike, k=-1)


def test_published_settings_files_are_read(tmp_path):
    given = {"alg_name": "IKE", "k": 16, "sentence_model_name": "encoders/all-MiniLM-L6-v2", "device": 0}
    (tmp_path / "ike.json").write_text(json.dumps(given))
    with pytest.warns(UserWarning, match="not used: device"):
        made = kf.Ike.from_json(tmp_path / "ike.json")
    assert (made.k, made.retriever) == (16, "encoders/all-MiniLM-L6-v2")
