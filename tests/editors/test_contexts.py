"""Contexts: how they are sampled, what is accepted, how they weigh."""

import pytest
import torch

import kedit_fast.editors.contexts as contexts_module
from kedit_fast.editors.contexts import checked_contexts, memit_contexts, rome_contexts
from kedit_fast.editors.located import Prompts
from kedit_fast.sweep.sites import Site
from tests.conftest import open_tiny, refused, tiny_lm
from tests.editors.cases import FACTS
from tests.oracle.access import read_value
from tests.oracle.values import in_context
from tests.tiny import tiny_model, tiny_tokenizer


def test_rome_samples_from_the_start_token():
    """Published: the bare prompt, 10 samples of 5 tokens and 10 of 10, all in one group."""
    lm = tiny_lm("gpt2")
    (group,) = rome_contexts(lm)
    assert len(group) == 21 and group[0] == "{}"
    assert all(template.endswith(". {}") and template.count("{}") == 1 for template in group[1:])
    assert len(set(group)) > 15
    assert max(map(len, group[11:])) > max(map(len, group[1:11]))


def test_memit_begins_samples_with_five_words():
    """Published: the bare prompt, and one sample of 10 tokens for each word."""
    first, second = memit_contexts(tiny_lm("gpt2"))
    assert first == ["{}"] and len(second) == 5
    for word, template in zip(("The", "Therefore", "Because", "I", "You"), second, strict=True):
        assert template.startswith(word) and template.endswith(". {}") and template.count("{}") == 1


@pytest.mark.parametrize(("make", "n_tokens"), [(rome_contexts, [1 + 4, 1 + 9]), (memit_contexts, [10])])
def test_lengths_count_the_beginning(make, n_tokens, monkeypatch):
    made, generate = [], contexts_module.generate

    def spy(lm, prompts, n_new, **options):
        assert options["temperature"] == 1.0 and options["top_k"] == 5
        made.append(min(map(len, prompts)) + n_new)
        return generate(lm, prompts, n_new, **options)

    monkeypatch.setattr(contexts_module, "generate", spy)
    make(tiny_lm("gpt2"))
    assert made == n_tokens


@pytest.mark.parametrize("make", [rome_contexts, memit_contexts])
def test_the_seed_is_all_that_is_random(make):
    lm = tiny_lm("llama")
    made = make(lm, seed=5)
    torch.manual_seed(123)
    assert make(lm, seed=5) == made != make(lm, seed=6)


def test_no_samples_leave_the_bare_prompt():
    lm = tiny_lm("gpt2")
    assert memit_contexts(lm, ()) == rome_contexts(lm, ()) == [["{}"]]


def test_braces_and_lines_of_a_sample_are_taken_out(monkeypatch):
    """A brace would be read as the prompt's place."""
    lm = tiny_lm("gpt2")
    ids = tiny_tokenizer()(" {x}\n\n{} \n y")["input_ids"]
    monkeypatch.setattr(contexts_module, "generate", lambda lm, prompts, *a, **k: [ids for _ in prompts])
    assert memit_contexts(lm, ((10, 2),))[1] == ["The x y. {}", "Therefore x y. {}"]
    checked_contexts(rome_contexts(lm, ((3, 2),)))


def test_a_tokenizer_without_start_and_end_needs_contexts():
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer()._tokenizer)
    lm = open_tiny(tiny_model("gpt2"))
    object.__setattr__(lm, "tokenizer", tokenizer)
    assert tokenizer.eos_token_id is None
    refused("give contexts=", rome_contexts, lm)


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        (["{}", "So. {}"], [["{}", "So. {}"]]),
        (("{}",), [["{}"]]),
        ("{}", [["{}"]]),
        ([["{}"], ["So. {}"]], [["{}"], ["So. {}"]]),
        ((("{}",), ("So. {}", "{} it is")), [["{}"], ["So. {}", "{} it is"]]),
    ],
)
def test_contexts_are_groups_or_one_group(given, groups):
    assert checked_contexts(given) == groups


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "groups of templates"),
        ([[]], "none empty"),
        ([["{}"], []], "none empty"),
        (["So. {}"], "first template must be the bare prompt"),
        ([["So. {}"], ["{}"]], "first template must be the bare prompt"),
        (["{}", "no place"], "'no place': expected text with one {}"),
        (["{}", "{} and {}"], "expected text with one {}"),
        (["{}", "{} and {x}", 3], "groups of templates"),
        ([["{}"], [None]], "groups of templates"),
        ([["{}"], "So. {}"], "groups of templates"),
        ([3], "groups of templates"),
        ("So. {}", "first template must be the bare prompt"),
        ([["{}", ["{}"]]], "groups of templates"),
    ],
)
def test_malformed_contexts_are_refused(given, says):
    refused(says, checked_contexts, given)


def test_prompts_are_set_in_contexts_and_weigh_by_group():
    lm, groups = tiny_lm("gpt2"), [["{}"], ["The sun. {}", "I go, {} it is", "You. {}"]]
    prompts = Prompts.of(lm, FACTS, groups)
    assert prompts.weights.tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    templates = [template for group in groups for template in group]
    tokenizer = tiny_tokenizer()
    for i, (ids, position) in enumerate(zip(prompts.sequences, prompts.lookups.tolist(), strict=True)):
        fact = FACTS[i // 4]
        assert tokenizer.decode(ids) == in_context(templates[i % 4], fact.prompt).replace("{}", fact.subject)
        assert tokenizer.decode(ids[: position + 1]).endswith(fact.subject)
    read = prompts.read(lm, averaged={Site.mlp_out: 0}, bare={Site.mlp_out: 0})
    places = zip(prompts.sequences, prompts.lookups, strict=True)
    rows = torch.stack([read_value(lm.model, ids, int(at), 0, "mlp_out") for ids, at in places])
    rows = rows.view(4, 4, -1).double()
    torch.testing.assert_close(read.bare[Site.mlp_out], rows[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(read.averaged[Site.mlp_out], rows[:, 0] / 2 + rows[:, 1:].mean(1) / 2, rtol=0, atol=1e-5)


def test_the_kl_prompt_ends_at_the_subject():
    lm = tiny_lm("gpt2")
    for fact, task in zip(FACTS, Prompts.of(lm, FACTS, [["{}"]]).value_tasks(lm), strict=True):
        assert tiny_tokenizer().decode(task.essence) == fact.subject
        assert tiny_tokenizer().decode(task.targets[0]) == f" {fact.target_new}"
