"""Editing in rounds: facts in small batches, each on top of those before, and what is left of them after each.

The well-known experiment on lifelong editing: how many edits does a model bear, and what goes first? Edits that are
each fine by themselves pile up in the same few layers. Sequential ROME is known to collapse: weights grow, neighbors
and earlier facts fade, text becomes unlikely (Gupta et al. 2024, "Model editing at scale leads to gradual and
catastrophic forgetting"). AlphaEdit was made to withstand it (Fang et al. 2025). On SmolLM2-135M, 200
facts of CounterFact in rounds of 20: ROME collapses between 160 and 180 (perplexity 41.6, 58, 260; P(new) of earlier
facts 0.50, then 0.12; its layer has moved by 2, then 3.5 times its weight's norm); AlphaEdit ends at 42.4, 0.82, 0.46.
"""

import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from kedit_fast.basics import checks, ranks
from kedit_fast.basics.bits import digest, json_of, json_tensor
from kedit_fast.basics.files import check_place
from kedit_fast.basics.intervals import Interval, summarize
from kedit_fast.basics.log import Log
from kedit_fast.basics.parts import keep_json, keep_whole
from kedit_fast.basics.progress import Bar
from kedit_fast.editors.contexts import BARE, AnyContexts, checked_contexts
from kedit_fast.editors.editor import Editor, check_lengths, checked_facts
from kedit_fast.editors.written import counted_elsewhere
from kedit_fast.edits.compose import compose
from kedit_fast.edits.deltas import growth
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT
from kedit_fast.evaluation.evaluate import evaluate
from kedit_fast.evaluation.known import Known
from kedit_fast.evaluation.perplexity import MAX_TOKENS, text_windows
from kedit_fast.evaluation.stored import as_float, finite, summary_of_record
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.corpus import AnyCorpus
from kedit_fast.moments.given import digests
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.sweep.kept import Checkpoint, asked_of, begun, check_run

Summary = dict[str, Interval]
SIDES, FIGURES, TOLD = ("new", "old", "base"), "figures", "told"


@dataclass(frozen=True)
class Round:
    """What one round wrote, and how the model stands after it.

    number: from 1; method: the editor's; n_facts: written so far, this round's with them
    new: {metric: Interval} of this round's facts; old: of a sample of earlier rounds' (n = 0 in round 1); base: of the
        model without any edit, for all these. Metrics as in ``evaluation.benchmarks.counterfact.METRICS``, and "score"
    perplexity: (base, edited) of the text, or None where none was given
    growth: {layer: ‖ΣΔ‖ / ‖W‖} (Frobenius) of all edits so far
    edit_s, evaluate_s: wall seconds of editing and of asking
    edit: everything written so far as one Edit; None in what ``from_record`` gives
    """

    number: int
    method: str
    n_facts: int
    new: Summary
    old: Summary
    base: Summary
    perplexity: tuple[float, float] | None
    growth: dict[int, float]
    edit_s: float
    evaluate_s: float
    edit: Edit | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        new = self.new["efficacy"].mean
        perplexity = "" if self.perplexity is None else f", perplexity {self.perplexity[1]:.4g}"
        return f"Round({self.number}, {self.method}, {self.n_facts:,} facts, efficacy of the new {new:.3f}{perplexity})"

    @property
    def drift(self) -> float | None:
        """Edited perplexity / base perplexity - 1; None without a text."""
        return None if self.perplexity is None else self.perplexity[1] / self.perplexity[0] - 1

    def to_record(self) -> dict:
        """Plain values, for a line of JSON; NaN and infinity are None. The edit is left out: ``edit.save`` keeps it."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "edit"}
        return finite(record | {"growth": {str(layer): value for layer, value in self.growth.items()}})

    @classmethod
    def from_record(cls, record: dict) -> "Round":
        """The round that ``to_record`` gave, without its edit; infinity has become NaN."""
        sides = {side: summary_of_record(record[side]) for side in ("new", "old", "base")}
        growth = {int(layer): as_float(value) for layer, value in record["growth"].items()}
        given = record["perplexity"]
        return cls(**record | sides | {"growth": growth, "perplexity": given and tuple(map(as_float, given))})


@takes_lm
def edit_in_rounds(
    lm: LM,
    facts: Fact | Iterable[Fact],
    editor: Editor,
    *,
    per_round: int,
    moments: Mapping[int, SecondMoment] | None = None,
    corpus: AnyCorpus | None = None,
    contexts: AnyContexts | None = None,
    text: str | Iterable[str] | None = None,
    max_tokens: int = MAX_TOKENS,
    old: int = 100,
    seed: int = 0,
    log: checks.AnyPath | None = None,
    checkpoint: Checkpoint = None,
) -> Iterator[Round]:
    """Edits facts in rounds of ``per_round``, each on top of those before; a Round as soon as it is done and judged.

    An iterator: ``list(...)`` does all rounds, and who has seen enough breaks off. Nothing is changed in the model;
    ``round.edit`` is all that was written so far, so the one before a collapse can be kept.

    editor: any of ``EDITORS``; moments, corpus, contexts: as its ``edit`` takes them. Statistics are measured once, of
        the unedited model, and contexts sampled once, in the first round
    text: for perplexity after each round; of it max_tokens tokens at most
    old: facts of earlier rounds asked again after each round, a new draw each time; seed: of these draws, and of the
        sampled contexts
    log: a .jsonl path; each round's record is added to it as soon as it is done
    checkpoint: a folder that keeps finished parts; a run that was killed goes on there when called again with the same
        arguments, and ends with the same bits. To be deleted once the last round is saved

    Edits that ``lm`` carries already count as written before round 1: they are built on and stand in ``growth``, and
    ``base`` is the model without them. Their facts are not asked.

    Raises ValueError, before any work, for what the editor refuses (facts of all rounds are looked at), per_round < 1,
    old < 0, a text too short or a checkpoint of other work; OSError for a log that cannot be written; ValueError in the
    round where a value turns NaN, which a model that has collapsed may bring about: the rounds before it have been
    given by then.
    """
    facts = check_rounds(
        lm, facts, editor, per_round=per_round, contexts=contexts, text=text, max_tokens=max_tokens, old=old, log=log
    )
    seed, checkpoint = checks.seed("seed", seed), check_run(checkpoint)
    bare = replace(lm, edits=())
    below = compose(lm.edits) if lm.edits else None
    if editor.mom2_adjustment:
        moments, corpus = editor.moments_of(bare, moments, corpus), None
    given: dict[str, Any] = {"moments": moments, "corpus": corpus, "contexts": contexts, "seed": seed}
    asked: dict[str, Any] = {"text": text, "max_tokens": max_tokens}
    run = (checkpoint, partial(_asked_for, lm, facts, editor, per_round, given, asked, old))
    lines = Log(log if ranks.first() else None)
    return _rounds(bare, facts, editor, per_round, below, given, asked, old, lines, run)


def _asked_for(lm, facts, editor, per_round: int, given: dict, asked: dict, old: int) -> dict:
    """What the rounds depend on, for the manifest of their checkpoint."""
    return asked_of(
        lm, "edit in rounds", facts, method=editor.method, hparams=editor.record, per_round=per_round, old=old,
        seed=given["seed"], contexts=given["contexts"] and checked_contexts(given["contexts"]),
        text=asked["text"] and digest(text_windows(lm, **asked)), statistics=digests(given["moments"]),
    )  # fmt: skip


def check_rounds(
    lm, facts, editor, *, per_round, contexts=None, text=None, max_tokens=MAX_TOKENS, old=100, log=None
) -> list[Fact]:
    """What ``edit_in_rounds`` refuses but for statistics, which take time to measure; gives the facts without
    duplicates."""
    checks.instance("editor", editor, Editor, "an editor, e.g. kf.Memit.for_model(lm)")
    checks.whole("per_round", per_round, least=1, like=10)
    checks.whole("old", old, like=100)
    checks.whole("max_tokens", max_tokens, least=2, like=5_120)
    editor.check(lm)
    if text is not None:
        text_windows(lm, text, max_tokens)
    if log is not None:
        check_place(log)
    facts = fact_list(facts)
    if not editor.NEEDS_NEW and any(fact.target_new is None for fact in facts):
        raise ValueError(
            f"{editor.method} in rounds: they ask whether new answers are said, and facts to forget have none "
            "(target_new); edit them at once, or on top of each other (previous=), and ask kf.verify_forgotten"
        )
    facts = checked_facts(facts, need_subject=editor.NEEDS_SUBJECT)
    for first in range(0, len(facts), per_round):
        editor.check_facts(facts[first : first + per_round])
    check_lengths(lm, facts, [[BARE]] if contexts is None else checked_contexts(contexts))
    COUNTERFACT.check_fit(lm, facts)
    return facts


def _rounds(lm, facts, editor, per_round, so_far, given, asked, old, log: Log, run) -> Iterator[Round]:
    """The work of ``edit_in_rounds``. lm: without edits; so_far: all that was written, as one edit; run: ``begun``'s"""
    weights: dict[tuple[int, str], float] = {}
    rng, bar = random.Random(given["seed"]), Bar("editing in rounds", -(-len(facts) // per_round))
    known = Known()  # the unedited model is asked for each fact, and reads the text, once
    with begun(*run) as keep:
        for number, first in enumerate(range(0, len(facts), per_round), 1):
            new, earlier = facts[first : first + per_round], rng.sample(facts[:first], min(old, first))
            work = partial(_worked, lm, editor, new, earlier, so_far, given, asked, known)
            name = f"round-{number:05d}"
            with bar.inside(f"round {number}"):
                part, is_found = keep_whole(keep, name, work)
            keep.release(name)
            known.told |= json_of(part.pop(TOLD))
            figures = json_of(part.pop(FIGURES))
            figures["perplexity"] = figures["perplexity"] and tuple(figures["perplexity"])
            figures |= {side: {name: Interval(*one) for name, one in figures[side].items()} for side in SIDES}
            edit = Edit.from_tensors(part)
            if edit.contexts:  # of the first round; fine-tuning has none
                given["contexts"] = edit.contexts
            so_far = _on_top(so_far, edit)
            (bar.resume if is_found else bar.advance)(1)
            found = Round(
                number=number, method=edit.method, n_facts=first + len(new), growth=growth(lm, [so_far], weights),
                edit=so_far, **figures,
            )  # fmt: skip
            log.add([found.to_record()], again=is_found)
            yield found


def _on_top(so_far: Edit | None, edit: Edit) -> Edit:
    return edit if so_far is None else compose([so_far, edit])


def _worked(lm, editor, new, earlier, so_far, given, asked, known: Known, keep) -> dict[str, Tensor]:
    """One round as a part: the edit of its facts, ``FIGURES``, what is a Round's own, and ``TOLD``, what the base model
    told of them. earlier: facts that are asked too; known: of earlier rounds; keep: of the round's own parts"""
    began = time.perf_counter()
    with counted_elsewhere():
        checkpoint = None if "checkpoint" in editor.UNREAD else keep
        edit = editor.edit(lm, new, previous=so_far, checkpoint=checkpoint, **given)
    edited = time.perf_counter()
    asked = asked | {"both_forms": False}
    told = keep_json(keep, "base", lambda: _told(lm, new, asked, known))
    report = evaluate(
        lm, [*new, *earlier], _on_top(so_far, edit), known=Known(known.told | told), checkpoint=keep, **asked
    )
    figures = {
        "new": _summary(report.edited, slice(0, len(new))),
        "old": _summary(report.edited, slice(len(new), None)),
        "base": _summary(report.base, slice(None)),
        "perplexity": report.perplexity,
        "edit_s": edited - began,
        "evaluate_s": time.perf_counter() - edited,
    }
    return edit.to_tensors() | {FIGURES: json_tensor(figures), TOLD: json_tensor(told)}


def _told(lm, new, asked, known: Known) -> dict[str, Any]:
    """What the base model tells of a round's facts that it has not told yet. All of it at once, and none of it with the
    earlier facts: a run that goes on after a stop then asks in the same calls, and ends with the same bits."""
    now = Known(known.told)
    evaluate(lm, new, known=now, **asked)
    return {key: value for key, value in now.told.items() if key not in known.told}


def _summary(columns: dict[str, Tensor] | None, facts: slice) -> Summary:
    assert columns is not None  # a round has an edit
    some = {name: column[facts] for name, column in columns.items()}
    return summarize(some, COUNTERFACT.metrics, COUNTERFACT.score_of)
