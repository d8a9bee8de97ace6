"""What an edit was trained on tests nothing, wherever it is asked."""

from dataclasses import replace

import kedit_fast as kf
from kedit_fast.gating import Suite, gate
from tests.conftest import refused, tiny_lm
from tests.editors.cases import GROUPS
from tests.gating.cases import judged

FACT = kf.Fact("{} is in the city of", "Big Ben", "Rome", "London", phrasings=("You find {} in",), id="7")
ASKED = replace(FACT, phrasings=(), paraphrases=("The tower is in", "you  find big ben in"))
OTHER = replace(FACT, prompt="{} was built in", target_new="Oslo", phrasings=("They built {} in",))
EDITOR = kf.Memit(layers=(1,), v_num_grad_steps=2, mom2_adjustment=False)


def edit(*facts, editor=EDITOR, **options):
    return editor.edit(tiny_lm("llama"), facts, contexts=GROUPS, **options)


def test_a_paraphrase_that_was_trained_on_is_refused_by_name():
    lm, made = tiny_lm("llama"), edit(FACT)
    says = "paraphrase 'you  find big ben in' of fact 7 .* is one that the edit was trained on"
    refused(says, kf.evaluate, lm, ASKED, made)
    refused(says, kf.evaluate, lm.with_edit(made), ASKED)
    assert kf.evaluate(lm, replace(ASKED, paraphrases=ASKED.paraphrases[:1]), made).edited is not None
    assert kf.evaluate(lm, ASKED).edited is None, "without an edit nothing was trained on"
    assert kf.evaluate(lm, ASKED, edit(replace(FACT, phrasings=()))).edited is not None


def test_another_facts_phrasing_counts_unless_edits_are_independent():
    lm, both = tiny_lm("llama"), edit(FACT, OTHER, independent=True)
    asked = [replace(FACT, phrasings=(), paraphrases=("They built Big Ben in",)), OTHER]
    refused("paraphrase 'They built Big Ben in'", kf.evaluate, lm, asked, edit(FACT, OTHER))
    assert kf.evaluate(lm, asked, both).edited is not None
    refused("paraphrase 'you  find big ben in'", kf.evaluate, lm, ASKED, both)


def test_a_prompt_that_was_kept_tests_no_other_relation():
    lm = tiny_lm("llama")
    fact = replace(FACT, same_subject=("Big Ben is best known for",))
    keeping = edit(FACT, editor=replace(EDITOR, keep_factor=1.0))
    refused("same_subject prompt 'Big Ben is best known for'", kf.evaluate, lm, fact, keeping)
    refused("Big Ben is best known for", kf.evaluate, lm, fact, kf.compose([keeping, edit(OTHER)]))
    assert kf.evaluate(lm, fact, edit(FACT)).edited is not None, "nothing was kept"


def test_the_gate_refuses_it_too():
    lm, made = tiny_lm("llama"), edit(replace(FACT, paraphrases=("It is in",)), OTHER)
    refused("'you  find big ben in' is among the phrasings", judged, gate, lm, made, Suite(facts=(ASKED,)))
    suite = Suite(facts=(replace(ASKED, paraphrases=("They built Big Ben in",)),))
    refused("paraphrase 'They built Big Ben in'", judged, gate, lm, made, suite)


def test_a_saved_edit_remembers_its_phrasings(tmp_path):
    made = edit(FACT)
    made.save(tmp_path / "edit.safetensors")
    again = kf.Edit.load(tmp_path / "edit.safetensors")
    assert again.facts == (FACT,) and again.hparams["keeps"] == list(EDITOR.keeps)
    refused("trained on", kf.evaluate, tiny_lm("llama"), ASKED, again)
