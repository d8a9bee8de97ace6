"""GRACE against its oracle; what its codebook does with prompts that are near each other; what must not change."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.grace import codebook
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.edits.routes import distances, prompt_features
from kedit_fast.evaluation.probes import probe, read_edited, read_probes
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.sweep.sites import Site
from tests.conftest import close, open_tiny, refused, tiny_lm
from tests.editors import cases
from tests.editors.cases import FACTS, relative
from tests.make import bits, same_bits
from tests.oracle import grace as oracle
from tests.tiny import tiny_model, tiny_tokenizer

EDITOR = kf.Grace(layers=(2,), n_iter=8, eps=0.5)
STRANGE = ["The capital of France is", "Zürich is located in"]
pytestmark = pytest.mark.filterwarnings("ignore:facts not written")


def tokens(facts):
    tok = tiny_tokenizer()
    return [list(fact_tokens(tok, fact).ids) for fact in facts], [fact_answer(tok, fact) for fact in facts]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_it_equals_the_oracle(family, monkeypatch):
    """Keys, radii, values, and every answer: to prompts that are hit and that are not."""
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    edit = EDITOR.edit(lm, FACTS)
    prompts, targets = tokens(FACTS)
    book = oracle.codebook(lm.model, 2, prompts, targets, 0.5, 1.0, 8)
    for i, entry in enumerate(book):
        assert (
            relative(edit.route.keys[i], entry.key) < 1e-8 and relative(edit.changes[0].values[i], entry.value) < 1e-8
        )
    narrow = EDITOR.edit(tiny_lm(family), FACTS)
    assert relative(narrow.changes[0].values, torch.stack([entry.value for entry in book])) < 1e-4
    asked = [fact.text for fact in FACTS] + STRANGE
    answers = read_edited(lm.with_edit(edit), [probe(lm, text, ["cheese boat"], likeliest=True) for text in asked])
    behind = probe(lm, asked[0], ["cheese boat"]).answers[0]
    for text, said in zip(asked, answers, strict=True):
        log_p = oracle.answer(lm.model, 2, book, lm.encode(text), behind[:-1]).log_softmax(-1)
        p = log_p[range(len(behind)), behind].mean().exp()
        assert said.p[0] == pytest.approx(p.item(), rel=1e-8) and said.top == int(log_p[0].argmax())


def test_what_is_written_behind_a_prompt_goes_on_from_its_value():
    lm = tiny_lm("llama", torch.float64)
    edit = EDITOR.edit(lm, FACTS)
    book = oracle.codebook(lm.model, 2, *tokens(FACTS), 0.5, 1.0, 8)
    asked = [fact.text for fact in FACTS] + STRANGE
    for text, written in zip(asked, lm.with_edit(edit).generate(asked, 3), strict=True):
        said: list[int] = []
        for _ in range(3):
            said.append(int(oracle.answer(lm.model, 2, book, lm.encode(text), said)[-1].argmax()))
        assert written == lm.tokenizer.decode(said, skip_special_tokens=True)


def test_radii_widen_for_one_answer_and_part_for_two():
    rows = torch.tensor([[0.0], [1.5], [1.2], [9.0], [9.4]])
    book = codebook(rows, ["a", "a", "b", "c", "d"], 1.0)
    assert book.entry.tolist() == [0, 0, 1, 2, 3] and book.made_by == [0, 2, 3, 4] and book.n_split == 2
    # the first widens to 1.5, then parts from the third in the middle; the last two part at 9.2
    close("radii", book.radius, torch.tensor([0.6 - 1e-5, 0.6, 0.2 - 1e-5, 0.2]))
    phrased = codebook(rows, "aaaaa", 1.0, whose=[0, 1, 1, 1, 1])
    # the third is a phrasing of the second fact, near the first one's key: it gets its own, and its own fact's joins
    assert phrased.entry.tolist() == [0, 0, 1, 2, 2] and phrased.radius.tolist() == pytest.approx([1.5, 1.0, 1.0])
    assert codebook(rows, "abcde", 0.01).radius.tolist() == pytest.approx([0.01] * 5)


def test_a_prompt_that_widened_a_radius_is_in_it_whatever_is_asked_beside_it():
    lm = tiny_lm("llama")
    ends = ("in the city of", "located in", "a tower in", "the", "in London, the capital of", "of")
    facts = [kf.Fact(prompt=f"{{}} is {end}", subject="Big Ben", target_new="Rome") for end in ends]
    rows = prompt_features(lm, [fact.text for fact in facts], 2, Site.mlp_key)
    for fact, far in zip(facts[1:], distances(rows[:1], rows[1:])[0], strict=True):
        edit = replace(EDITOR, n_iter=1, eps=0.7 * float(far)).edit(lm, [facts[0], fact])
        assert edit.route.entry.tolist() == [0, 0]
        assert edit.route.radius.tolist() == pytest.approx([float(far)], rel=1e-4)
        for beside in ([], ["x"], ["The", "Big Ben is", "You play the piano"]):
            assert lm.with_edit(edit).owners([fact.text, *beside]).tolist()[0] == 0


def test_misses_are_the_base_model_and_the_weights_stay():
    model = tiny_model("llama")
    lm, before = open_tiny(model), bits(model)
    edit = EDITOR.edit(lm, FACTS)
    assert same_bits(model, before)
    base, edited = read_probes(lm.with_edit(edit), [probe(lm, text, ["Rome"], likeliest=True) for text in STRANGE])
    assert base == edited
    assert sum(edit.provenance["written"]["p_new"]) > 2 * sum(kf.evaluate(lm, FACTS).base["p_new"].tolist())
    wide = EDITOR.edit(lm, FACTS[:1], contexts=None)
    always = replace(wide, route=replace(wide.route, radius=wide.route.radius + 1e6))
    assert lm.with_edit(always).top_tokens(STRANGE[0]) != lm.top_tokens(STRANGE[0])


def test_a_phrasing_has_a_key_of_its_own_and_goes_with_its_fact(tmp_path):
    lm = tiny_lm("llama")
    phrased = replace(FACTS[1], phrasings=("Every day {} does the sport of",))
    edit = EDITOR.edit(lm, [FACTS[0], phrased, FACTS[3]])
    assert edit.route.n_entries == 4 and edit.route.entry.tolist() == [0, 1, 3]
    assert edit.route.entries_of.tolist() == [0, 1, 1, 2]
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(edit)
    asked = [FACTS[0].text, phrased.text, phrased.phrased()[0].text, FACTS[3].text]
    assert lm.with_edit(loaded).owners(asked).tolist() == [0, 1, 2, 3]
    assert lm.with_edit(loaded.only(1)).owners(asked).tolist() == [-1, 0, 1, -1]
    without = lm.with_edit(loaded.without(1))
    assert without.owners(asked).tolist() == [0, -1, -1, 1]
    assert without.generate(asked, 2) == [
        lm.with_edit(e).generate(a, 2) if e else lm.generate(a, 2)
        for a, e in zip(asked, [loaded, None, None, loaded], strict=True)
    ]


def test_settings(tmp_path):
    derived = kf.Grace.for_model(tiny_lm("gpt2"))
    assert len(derived.layers) == 1 and "derived" in derived.source
    known = kf.Grace.for_model(cases.named("gpt-j-6B", layers=28, family="gptj"))
    assert (known.layers, known.n_iter) == ((25,), 200)
    file = tmp_path / "grace.yaml"
    lines = ["alg_name: GRACE", "inner_params: ['model.layers[27].mlp.down_proj.weight']", "edit_lr: 1.0", "n_iter: 50"]
    lines += ["eps: 1.0", "dist_fn: euc", "val_init: cold", "replacement: replace_last", "num_pert: 8", "dropout: 0.0"]
    file.write_text("\n".join(lines))
    assert kf.Grace.from_file(file) == kf.Grace(layers=(27,), n_iter=50)
    file.write_text("\n".join(lines).replace("euc", "cos"))
    refused("dist_fn = 'cos': not done here; expected 'euc'", kf.Grace.from_file, file)
    file.write_text("\n".join(lines).replace("mlp.down_proj", "mlp.up_proj"))
    refused("beside a down projection", kf.Grace.from_file, file)
    refused("one layer", kf.Grace, layers=(1, 2))
    refused("expected one of.*replace_last|replacement", kf.Grace, replacement="replace_all")
    refused("edit.only", EDITOR.edit, tiny_lm("llama"), FACTS, independent=True)
    assert EDITOR.edit(tiny_lm("llama"), FACTS[:1]).changes[0].site is Site.mlp_out
