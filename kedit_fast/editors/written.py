"""Whether an edit is written: its facts asked of the model with the edit on it, by a forward pass as anyone would.

An editor's own figures are of its optimization: P(new) with the value put in place by hand. What the weights make of it
is another matter (a ridge gives a share, facts edited together pull at each other), so every edit is asked once.
"""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import torch

from kedit_fast.basics.progress import progress
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation.probes import fact_probes
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import fact_tokens
from kedit_fast.jobs.collect import Collect
from kedit_fast.jobs.score import continuation_places, likeliest_tokens
from kedit_fast.kernels.target_logprob import target_logprob
from kedit_fast.sweep.edited import add_under
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.runs import RunList
from kedit_fast.sweep.sites import Site

ASKING = "asking the edited model"  # as its progress calls it
NAMED = 10  # facts that the warning names


class NotWritten(UserWarning):
    """Facts of an edit that the model with the edit does not say."""


def with_written(lm, edit: Edit) -> Edit:
    """The edit with ``provenance["written"]``: {"written": [n] bool, "p_new", "says", "attached": [n]}, by fact.

    written: each token of target_new is the likeliest one after the prompt and the target's tokens before it, so that a
    greedy continuation begins with the new answer (evaluate's efficacy_exact); p_new: as evaluate has it, exp of the
    mean log-probability of these tokens; says: the likeliest tokens up to the first that is not the target's, as text;
    attached: whether target_new was read as following its prompt without a space, as the fact says or as was guessed.
    An independent edit is asked under itself alone. Where the edit makes the model give NaN, p_new is 0 and says is "".

    lm: the model that the edit was made on, with the edits below it. One sweep for all facts: one weight pass for those
    that the memory holds, of a row for each token of their prompts and targets. On SmolLM2 that is 1 % of the time of
    MEMIT (12 facts) and ROME (4). Warns (NotWritten) of the facts that are not written.
    """
    made = _asked(lm, edit) | {"attached": [fact_tokens(lm.tokenizer, fact).attached for fact in edit.facts]}
    missing = [i for i, is_written in enumerate(made["written"]) if not is_written]
    if missing:
        named = [
            f"{fact.label} -> {fact.target_new!r} (P {made['p_new'][i]:.3f}, the model says {made['says'][i]!r})"
            for i, fact in ((i, edit.facts[i]) for i in missing[:NAMED])
        ]
        more = f"; and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        warnings.warn(
            f"facts not written: {len(missing)} of {len(edit.facts)}: {'; '.join(named)}{more}",
            NotWritten,
            stacklevel=4,  # the line that called ``edit``
        )
    return replace(edit, provenance=edit.provenance | {"written": made})


@contextmanager
def counted_elsewhere():
    """Inside, facts that are not written are not warned of: for work that says how many hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotWritten)
        yield


def not_written(edit: Edit) -> list[Fact]:
    """The facts that were not found written when the edit was made."""
    return [fact for fact, found in zip(edit.facts, edit.provenance["written"]["written"], strict=True) if not found]


@torch.no_grad()
def _asked(lm, edit: Edit) -> dict[str, list]:
    view, last = replace(lm, edits=(*lm.edits, edit)), lm.n_layers - 1
    probes = [fact_probes(lm, replace(f, paraphrases=(), neighborhood=(), same_subject=()), []) for f in edit.facts]
    pairs = [(rewrite.prompt, rewrite.targets[0]) for rewrite in (probe.kinds[0][0] for probe in probes)]
    places, runs = continuation_places(pairs), RunList()
    number = add_under(view, runs, places.sequences, torch.arange(len(pairs)))[places.pair]
    top = Collect(Site.layer_out, [last], number, places.pos)
    with progress(ASKING, 1) as bar:
        sweep(view, runs.runs(), [top], advance=bar.advance)
    h = top.values[last]
    log_p = target_logprob(h, view.fusable_head, places.targets, lm.n_vocab).cpu().double().split(places.lengths)
    likeliest = likeliest_tokens(view, h).cpu().split(places.lengths)
    return _by_fact(lm, [target for _, target in pairs], log_p, likeliest)


def _by_fact(lm, targets, log_p, likeliest) -> dict[str, list]:
    """What ``with_written`` notes, of each fact's target tokens: their log-probabilities and the likeliest tokens."""
    found: dict[str, list] = {"written": [], "p_new": [], "says": []}
    for target, values, tokens in zip(targets, log_p, likeliest, strict=True):
        broken = bool(values.isnan().any())
        right = [int(token) == wanted for token, wanted in zip(tokens, target, strict=True)]
        said = tokens[: right.index(False) + 1] if False in right else tokens
        found["written"].append(all(right) and not broken)
        found["p_new"].append(0.0 if broken else round(float(values.mean().exp()), 5))
        found["says"].append("" if broken else lm.tokenizer.decode(said.tolist()))
    return found
