"""One edit asked as users ask: plainly, behind a trailing space, behind a line end, in a chat.

30 facts that SmolLM2 knows, edited by MEMIT four times, each time with the prompts in one of the four forms, and each
edit asked in all four: P(new), the share whose new answer is the likeliest token by token, and the share that says it
when it writes on. The diagonal (edited in the form it is asked in) has marks; the rest is reported as it is.
"""

import dataclasses
import warnings

import torch

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import Figure, Measured, peak_matmul
from kedit_fast.basics.intervals import PROBABILITY, SHARE, interval
from kedit_fast.evaluation.texts import says
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import asked

N_FACTS, N_TOKENS = 30, 8
# At the default of 20, prompts with a trailing space end at P(new) 0.74 and 80 % exact: few words have no space before.
STEPS = 40
P_NEW, EXACT, SAID = "P(new)", "exact", "says the new answer"
MARKS = {P_NEW: ">= 0.85", EXACT: ">= 90", SAID: ">= 90"}
FORMS = {
    "plain": lambda fact: fact,
    "trailing space": lambda fact: _ending(fact, " "),
    "line end": lambda fact: _ending(fact, ":\n"),
    "chat": lambda fact: dataclasses.replace(fact, chat=True),
}


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped where the public data sets are not at hand."""
    edit_bench.check_data()
    facts = edit_bench.cut(edit_bench.draw(), 4 if options.quick else N_FACTS, 1)[0]
    lm = kf.open_model("smollm2")
    editor = dataclasses.replace(kf.Memit.for_model(lm), v_num_grad_steps=STEPS)
    return measure(lm, editor, edit_bench.statistics_of(lm, editor.layers), facts)


def measure(lm, editor, moments, facts: list[Fact]) -> Measured:
    """A case for each form edited in, with the figures of each form asked in."""
    peak, contexts, figures = peak_matmul(), None, []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="prompts that end in white space")
        in_form = {name: [form(fact) for fact in facts] for name, form in FORMS.items()}
    for edited_in, written in in_form.items():
        edit = editor.edit(lm, written, moments=moments, contexts=contexts)
        contexts = edit.contexts  # sampled once
        for asked_in, questions in in_form.items():
            values = answers(lm.with_edit(edit), questions)
            figures += [_figure(edited_in, asked_in, name, column) for name, column in values.items()]
            print(
                f"edited {edited_in}, asked {asked_in}: {', '.join(f'{f.value:.3g}' for f in figures[-3:])}", flush=True
            )
    layers, steps = ", ".join(map(str, editor.layers)), editor.v_num_grad_steps
    note = f"{len(facts)} facts, MEMIT layers {layers}, {steps} steps; {N_TOKENS} tokens written, greedily."
    return Measured(figures, peak, [note])


def answers(lm, facts: list[Fact]) -> dict[str, torch.Tensor]:
    """{measure: [n_facts]} of the model as it is."""
    columns = kf.evaluate(lm, facts, both_forms=False).edited
    texts = lm.generate([asked(lm.tokenizer, fact.text, fact.chat) for fact in facts], N_TOKENS)
    said = [float(says(text, fact.target_new)) for text, fact in zip(texts, facts, strict=True)]
    return {P_NEW: columns["p_new"], EXACT: columns["efficacy_exact"], SAID: torch.tensor(said)}


def _figure(edited_in: str, asked_in: str, name: str, column: torch.Tensor) -> Figure:
    kind = PROBABILITY if name == P_NEW else SHARE
    value, unit = edit_bench.in_percent(interval(column, kind), kind)
    mark = MARKS[name] if edited_in == asked_in else ""
    return Figure(
        f"edited: {edited_in}", f"asked: {asked_in}, {name}", value.mean, unit, value.low, value.high, value.n, mark
    )


def _ending(fact: Fact, end: str) -> Fact:
    return dataclasses.replace(fact, prompt=fact.prompt + end)
