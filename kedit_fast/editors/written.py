"""Whether an edit is written, and how far it moves the weights, before it is handed over.

An editor's own figures are of its optimization: P(new) with the value put in place by hand. What the weights make of it
is another matter (a ridge gives a share, facts edited together pull at each other), so every edit's facts are asked
once of the model with the edit on it, by a forward pass as anyone would.
"""

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from statistics import median

from kedit_fast.basics.progress import progress
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted, first_few
from kedit_fast.edits.deltas import growth
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation.probes import Answer, Probe, probe, read_edited
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.forgetting import judged_by
from kedit_fast.facts.tokens import asked, fact_tokens

ASKING = "asking the edited model"  # as its progress calls it
NAMED = 10  # facts that the warning names
REACHED = 0.5  # P(new) at a value from which on it is not the value that fails
# ‖Δ‖ / ‖W‖ of a layer. 100 facts by MEMIT move SmolLM2-135M's most changed layer by 0.38, and its perplexity by 1.9 %.
MOST_GROWTH = 0.5


class NotWritten(UserWarning):
    """Facts of an edit that the model with the edit does not say."""


class Overgrown(UserWarning):
    """An edit that moves a weight so far that the model is likely to collapse."""


def with_growth(lm, edit: Edit, gentler: str) -> Edit:
    """The edit with ``provenance["growth"]``: {layer: ‖Δ‖ / ‖W‖} of the matrix that it moves furthest.

    Warns (Overgrown) where that is more than ``MOST_GROWTH``; gentler: what is to be done then. Independent and routed
    edits are no one change of the weights, what changes none has none, and packed weights (a quantized model's) have
    no norm to be read.
    """
    moved = {} if edit.independent or edit.route is not None else growth(lm, [edit], {})
    if not moved:
        return edit
    layer = max(moved, key=moved.__getitem__)
    if moved[layer] > MOST_GROWTH:
        warn(
            f"the edit moves the weights of layer {layer} by {moved[layer]:.0%} of their norm; beyond "
            f"{MOST_GROWTH:.0%} models collapse: evaluate it with a text before you use it, or {gentler}",
            Overgrown,
        )
    return replace(edit, provenance=edit.provenance | {"growth": {str(i): round(x, 6) for i, x in moved.items()}})


def with_written(lm, edit: Edit) -> Edit:
    """The edit with ``provenance["written"]``: {"written": [n] bool, "p_new", "says", "attached": [n]}, by fact.

    written: each token of target_new is the likeliest one after the prompt and the target's tokens before it, so that a
    greedy continuation begins with the new answer (evaluate's efficacy_exact); p_new: as evaluate has it, exp of the
    mean log-probability of these tokens; says: the likeliest tokens up to the first that is not the target's, as text;
    attached: whether target_new was read as following its prompt without a space, as the fact says or as was guessed.
    A fact without target_new is one to be forgotten: all of this is of target_true, and written is that it is not said.
    An independent edit is asked under itself alone. Where the edit makes the model give NaN, p_new is 0 and says is "".

    lm: the model that the edit was made on, with the edits below it. One sweep for all facts: one weight pass for those
    that the memory holds, of a row for each token of their prompts and targets. On SmolLM2 that is 1 % of the time of
    MEMIT (12 facts) and ROME (4). Warns (NotWritten) of the facts that are not written.
    """
    made = _asked(lm, edit) | {"attached": [fact_tokens(lm.tokenizer, fact).attached for fact in edit.facts]}
    missing = [i for i, is_written in enumerate(made["written"]) if not is_written]
    if missing:
        named = [
            f"{fact.label} -> {_shown(fact)} (P {made['p_new'][i]:.3f}, the model says {made['says'][i]!r})"
            for i, fact in ((i, edit.facts[i]) for i in missing)
        ]
        warn(
            f"facts not written: {len(missing)} of {len(edit.facts)}: {first_few(named, NAMED)}"
            f"{_in_vain(lm, edit) or _too_slow(edit, missing)}",
            NotWritten,
        )
    return replace(edit, provenance=edit.provenance | {"written": made})


@contextmanager
def counted_elsewhere():
    """Inside, neither facts that are not written nor far moves are warned of: for work that says how many hold, and how
    far the weights have moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotWritten)
        warnings.simplefilter("ignore", Overgrown)
        yield


def not_written(edit: Edit) -> list[Fact]:
    """The facts that were not found written when the edit was made."""
    return [fact for fact, found in zip(edit.facts, edit.provenance["written"]["written"], strict=True) if not found]


def failures(edit: Edit) -> list[str]:
    """What was found when the edit was made that speaks against shipping it: facts that are not written, and a weight
    that it moves too far. Empty where nothing was found, or nothing was recorded."""
    said = []
    made, grown = edit.provenance.get("written"), edit.provenance.get("growth")
    flags = made.get("written") if isinstance(made, dict) else None
    if isinstance(flags, list) and len(flags) == len(edit.facts) and (missing := not_written(edit)):
        named = first_few((fact.label for fact in missing), NAMED)
        said.append(f"{len(missing)} of {counted(len(edit.facts), 'fact')} not written: {named}")
    if isinstance(grown, dict) and all(isinstance(moved, float | int) for moved in grown.values()):
        layer, most = max(grown.items(), key=lambda each: each[1], default=("", 0))
        if most > MOST_GROWTH:
            said.append(f"it moves the weights of layer {layer} by {most:.0%} of their norm")
    return said


def _in_vain(lm, edit: Edit) -> str:
    """What is to be said of values at the model's last layer: they are read by their own token alone, so that their
    gradient is 0 unless the subject ends the prompt."""
    if edit.values is None or max(edit.layers, default=0) < lm.n_layers - 1:
        return ""
    return (
        f". Layer {lm.n_layers - 1} is the model's last: what is written there at the subject reaches no token behind "
        "it; take lower layers"
    )


def _too_slow(edit: Edit, missing: Sequence[int]) -> str:
    """What is to be said where the values of most of these facts do not say the new answer either: their optimization
    ended too early, and a rate is a step in the units of the model's states."""
    if edit.values is None or "v_lr" not in edit.hparams:
        return ""
    reached = median(edit.provenance["found"]["p_new"][i] for i in missing)
    if reached >= REACHED:
        return ""
    return (
        f". Their values themselves end at P {reached:.2f} (the median): take more v_num_grad_steps, a larger "
        "clamp_norm_factor, or a v_lr that fits the size of this model's states (v_lr_relative=True counts it in "
        "shares of them: 0.1 to 0.5)"
    )


def _shown(fact: Fact) -> str:
    return repr(fact.target_new) if fact.target_new is not None else f"not {fact.target_true!r}"


def _asked(lm, edit: Edit) -> dict[str, list]:
    probes = [
        probe(lm, asked(lm.tokenizer, fact.text, fact.chat), [judged_by(fact)], fact.attached, owner=i)
        for i, fact in enumerate(edit.facts)
    ]
    with progress(ASKING, 1) as bar:
        answers = read_edited(replace(lm, edits=(*lm.edits, edit)), probes, bar.advance)
    return _by_fact(lm, edit.facts, probes, answers)


def _by_fact(lm, facts: Sequence[Fact], probes: list[Probe], answers: list[Answer]) -> dict[str, list]:
    """What ``with_written`` notes of each fact, by what the model with the edit answers to its prompt."""
    found: dict[str, list] = {"written": [], "p_new": [], "says": []}
    for fact, one, answer in zip(facts, probes, answers, strict=True):
        both = zip(one.answers[0] or (), answer.said[0], strict=False)  # nothing is said where the model answers NaN
        n_right = len(list(takewhile(lambda tokens: tokens[0] == tokens[1], both)))
        found["written"].append((answer.exact[0] == 1) == (fact.target_new is not None))
        found["p_new"].append(round(answer.p[0], 5))
        found["says"].append(lm.tokenizer.decode(answer.said[0][: n_right + 1]))
    return found
