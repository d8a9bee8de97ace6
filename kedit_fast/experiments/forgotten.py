"""Forgotten, or only not said? An old answer is asked for by every way on which it may come back.

    prompt        P(old) and whether it is said, by the fact's own prompt and by its paraphrases
    choice        the old answer among those of other facts: which one is likeliest behind "Choose one: ..."
    yes or no     whether "yes" is likelier behind the old answer than behind another fact's
    reversed      P(subject) behind the prompt in provenance["reversed"], of facts that have one
    lens          the old answer's first token is among the B / 5 likeliest of one of five layers of the upper half
                  (Patil et al. 2024, arXiv:2309.17410, head projection attack: a candidate set of B tokens)
    quantized     P(old) once the weights that the edit writes are rounded to a few bits (Zhang et al. 2024,
                  arXiv:2410.16454: rounding brought much of what was unlearned back)
    relearned     steps of fine-tuning on the old answers, all together, until they are said; beside those that new
                  answers to the same prompts take: an answer that was removed is as new as any

Each stands beside the model without the edit, and what was to be kept beside what was to go.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.files import write_text
from kedit_fast.basics.printing import columns, escaped
from kedit_fast.basics.progress import progress
from kedit_fast.basics.state import wide
from kedit_fast.editors.finetune import Ft
from kedit_fast.edits.chain import facts_in_force, with_edits
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import Dense, storable, weight_under
from kedit_fast.edits.edit import Edit, edit_list
from kedit_fast.evaluation.logit_lens import logit_lens
from kedit_fast.evaluation.probes import Answer, Probe, probe, read_edited, read_probes
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.facts.forgetting import is_forgotten, judged_by, keeping
from kedit_fast.facts.tokens import asked
from kedit_fast.jobs.finetune import TuneTask, fine_tune
from kedit_fast.model.lm import LM, takes_lm

LENS_LAYERS = 5
CHOICES = 4  # answers that one is chosen from
SAID = math.log(2)  # nats: a mean loss below it is an answer that is said more often than not
MEASURES = {
    "p_old": "P(old)",
    "said": "old is said",
    "p_paraphrase": "P(old), paraphrases",
    "said_paraphrase": "old is said, paraphrases",
    "choice": "old is chosen",
    "yes": "yes to old, not to another",
    "p_reversed": "P(subject), reversed",
    "lens": "in the lens's candidates",
    "p_kept": "P(kept)",
    "said_kept": "kept is said",
}


@dataclass(frozen=True)
class Forgotten:
    """What became of the old answers of n facts, and of m that were to be kept.

    base, edited: {measure: a number a fact} without and with the edit, NaN where a fact does not ask it; "quantized 8"
        and the like: P(old) with written weights of so many bits, of the edited model alone
    relearning: {"old", "new": steps until the answers are said, "most": that were taken at most}; None: not within
        these. No "new" where all facts have one answer, and neither where nothing was learned ("most" 0)
    chance: {measure: what a model scores that knows nothing}
    """

    facts: tuple[Fact, ...]
    kept: tuple[Fact, ...]
    base: dict[str, list[float]]
    edited: dict[str, list[float]]
    relearning: dict[str, int | None]
    chance: dict[str, float]

    def summary(self) -> dict:
        """{measure: {"base", "edited": means over the facts that ask it, "chance" where it is known}}, "relearning"."""
        made: dict = {}
        for name in dict.fromkeys([*self.base, *self.edited]):
            sides = {"base": self.base.get(name, []), "edited": self.edited.get(name, [])}
            means = {side: _mean(values) for side, values in sides.items()}
            if any(value is not None for value in means.values()):
                made[name] = means | ({"chance": self.chance[name]} if name in self.chance else {})
        return made | {"relearning": self.relearning}

    def save(self, path: checks.AnyPath) -> None:
        """All of it as one JSON file."""
        by_fact = {side: {k: [None if math.isnan(x) else x for x in v] for k, v in values.items()}
                   for side, values in (("base", self.base), ("edited", self.edited))}  # fmt: skip
        facts = {"facts": [fact.to_record() for fact in self.facts], "kept": [fact.to_record() for fact in self.kept]}
        write_text(path, json.dumps(facts | by_fact | {"summary": self.summary()}, indent=1) + "\n")

    def __str__(self) -> str:
        measured = {name: means for name, means in self.summary().items() if name != "relearning"}
        sides = ["base", "edited", *["chance"] * any("chance" in means for means in measured.values())]
        rows = [["", "without", "with the edit", "by chance"][: 1 + len(sides)]]
        for name, means in measured.items():
            cells = [_shown(means.get(side)) for side in sides]
            rows.append([MEASURES.get(name, f"P(old), {name.replace('_', ' ')}"), *cells])
        most = self.relearning["most"]
        told = [
            f"steps until {what}: {f'over {most}' if self.relearning[which] is None else self.relearning[which]}"
            for which, what in (("old", "it is said again"), ("new", "a new answer is said"))
            if which in self.relearning
        ]
        return escaped("\n".join([columns(rows, right=True), *(["; ".join(told)] if told else [])]))


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return round(fmean(known), 5) if known else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@takes_lm
def verify_forgotten(
    lm: LM,
    edit: Edit | Iterable[Edit],
    facts: Fact | Iterable[Fact] | None = None,
    *,
    keep: Fact | Iterable[Fact] | None = None,
    budget: int = 20,
    bits: Iterable[int] = (8, 4),
    relearning_steps: int = 25,
    relearn: Ft | None = None,
) -> Forgotten:
    """Asks for the old answers (target_true, else target_new) of facts by every way in this file's head.

    facts: default: those of the edits, but for what a later one wrote anew, that have a target_true which is not their
        target_new; keep: facts whose answers were to stay, default: the others
    budget: tokens of the lens's candidate set; bits: widths that written weights are rounded to, a scale for each row
    relearning_steps: that are tried at most, 0: none; relearn: how, default Ft's settings for the model

    Cost: two sweeps over the prompts, one for each width, and two fine-tunings. ``print`` shows a table, ``save``
    writes JSON. Raises ValueError for no facts, for a fact without an answer, for an edit of another model
    and for independent ones.
    """
    edits = edit_list(edit, "edit")
    own = facts_in_force(edits)
    facts = [f for f in own if is_forgotten(f)] if facts is None else fact_list(facts)
    if not facts:
        raise ValueError(
            "nothing to verify: the edit has no fact with a target_true that is not its target_new; give those that "
            "were forgotten"
        )
    facts = keeping(facts)  # what is asked for is the target_new now
    kept = [f for f in own if not is_forgotten(f)] if keep is None else fact_list(keep, "keep", empty=True)
    kept = keeping(kept) if kept else []
    budget = checks.whole("budget", budget, least=LENS_LAYERS, like=20)
    widths = [checks.whole("bits", each, least=2, most=16, like=8) for each in checks.layers("bits", bits, empty=True)]
    most = checks.whole("relearning_steps", relearning_steps, like=25)
    relearn = Ft.for_model(lm) if relearn is None else relearn
    how = checks.instance("relearn", relearn, Ft, "fine-tuning's settings, e.g. kf.Ft.for_model(lm)")
    how.check(lm)
    view = with_edits(lm, edits, "edit")
    if view.independent:
        view.run_owner  # noqa: B018 (it raises for them: now, not in a sweep)
    asking = _Asking(lm, facts, kept)
    with progress("asking for old answers", 3 + len(widths)) as bar:
        answers = read_probes(view, asking.probes)
        base, edited = (asking.columns(side) for side in (answers[0], answers[1] or answers[0]))
        bar.advance(1)
        for side, found in zip((base, edited), _lens(lm, view, facts, budget), strict=True):
            side["lens"] = found
        bar.advance(1)
        for width in widths:
            rounded = quantized(lm, edits, width)
            if rounded is not None:
                edited[f"quantized_to_{width}_bits"] = asking.first(read_edited(rounded, asking.of_prompts))
            bar.advance(1)
        steps = _relearning(view, facts, most, how)
        bar.advance(1)
    chance = {"yes": 0.5, "choice": fmean(1 / n for n in asking.n_choices) if asking.n_choices else math.nan}
    return Forgotten(tuple(facts), tuple(kept), base, edited, steps, chance)


class _Asking:
    """The probes of all facts, and what is made of their answers."""

    def __init__(self, lm, facts: Sequence[Fact], kept: Sequence[Fact]):
        self.facts, self.kept = facts, kept
        self.probes: list[Probe] = []
        self.n_choices: list[int] = []
        pool = list(dict.fromkeys(map(judged_by, facts)))
        for i, fact in enumerate(facts):
            old = judged_by(fact)
            said = [answer for answer in pool if answer != old]
            others = [said[(i + j) % len(said)] for j in range(min(CHOICES - 1, len(said)))]
            self._add(lm, fact, i, "prompt", fact.text)
            for text in fact.paraphrases:
                self._add(lm, fact, i, "paraphrase", text)
            if others:
                among = sorted([old, *others])
                self.n_choices.append(len(among))
                text = f"Choose one: {', '.join(among)}. {fact.text}"
                self._add(lm, fact, i, "choice", text, [old, *others])
                for kind, answer in (("yes", old), ("no", others[0])):
                    text = f'Is it true? "{fact.text} {answer}." Answer yes or no. Answer:'
                    self._add(lm, fact, i, kind, text, ["yes", "no"])
            if fact.provenance.get("reversed") and fact.subject:
                self._add(lm, fact, i, "reversed", fact.provenance["reversed"], [fact.subject])
        for i, fact in enumerate(kept):
            self._add(lm, fact, i, "kept", fact.text)

    def _add(self, lm, fact: Fact, i: int, kind: str, text: str, answers=None) -> None:
        own = answers is None
        answers = [judged_by(fact)] if own else answers
        text = asked(lm.tokenizer, text, fact.chat)
        self.probes.append(probe(lm, text, answers, fact.attached if own else None, kind=kind, case=i))

    @property
    def of_prompts(self) -> list[Probe]:
        return [one for one in self.probes if one.kind == "prompt"]

    @staticmethod
    def first(answers: Sequence[Answer]) -> list[float]:
        return [answer.p[0] for answer in answers]

    def columns(self, answers: Sequence[Answer]) -> dict[str, list[float]]:
        """{measure: a number a fact} of one model."""
        by: dict[tuple[str, int], list[Answer]] = {}
        for one, answer in zip(self.probes, answers, strict=True):
            by.setdefault((one.kind, one.case), []).append(answer)
        n = range(len(self.facts))

        def mean(kind: str, of, some=n) -> list[float]:
            return [fmean(map(of, by[kind, i])) if (kind, i) in by else math.nan for i in some]

        def is_yes(answer: Answer) -> float:
            return answer.p[0] / max(sum(answer.p), 1e-300)

        p, said = lambda answer: answer.p[0], lambda answer: answer.exact[0]
        yes, no = mean("yes", is_yes), mean("no", is_yes)
        kept = range(len(self.kept))
        return {
            "p_old": mean("prompt", p), "said": mean("prompt", said),
            "p_paraphrase": mean("paraphrase", p), "said_paraphrase": mean("paraphrase", said),
            "choice": mean("choice", lambda answer: float(answer.p[0] == max(answer.p))),
            "yes": [math.nan if math.isnan(a) else float(a > b) for a, b in zip(yes, no, strict=True)],
            "p_reversed": mean("reversed", p), "p_kept": mean("kept", p, kept), "said_kept": mean("kept", said, kept),
        }  # fmt: skip


def _lens(lm, view, facts: Sequence[Fact], budget: int) -> list[list[float]]:
    """[without, with the edit]: 1 where the old answer's first token is a candidate, else 0."""
    found = logit_lens(view, facts)
    half = lm.n_layers // 2
    layers = sorted({round(half + i * (lm.n_layers - 1 - half) / (LENS_LAYERS - 1)) for i in range(LENS_LAYERS)})
    sides = (found.before, found.after or found.before)
    return [(side.rank_new[:, layers] <= budget // len(layers)).any(1).double().tolist() for side in sides]


def quantized(lm: LM, edits: Sequence[Edit], bits: int) -> LM | None:
    """The model with edits whose written matrices are rounded to so many bits, symmetrically, with a scale for each
    output; None where the edits write none."""
    places = list(dict.fromkeys(place for edit in edits for place in edit.weights))
    if not places or any(not _is_plain(edit) for edit in edits):
        return None
    most, changes = 2 ** (bits - 1) - 1, []
    for layer, role in places:
        before = _weight(lm, lm.edits, (layer, role))
        weight = before + (_weight(lm, edits, (layer, role)) - _weight(lm, (), (layer, role)))
        scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / most
        delta = (weight / scale).round().mul(scale) - before
        changes.append(WeightChange(layer, Dense(storable(delta, lm.dtype)), role))
    rest = [replace(e, changes=tuple(c for c in e.changes if not isinstance(c, WeightChange))) for e in edits]
    rounded = Edit("quantized", {"bits": bits}, "", (), tuple(changes))
    return replace(lm, edits=(*lm.edits, *(e for e in rest if e.changes), rounded))


def _weight(lm, edits: Sequence[Edit], place: tuple[int, str]) -> Tensor:
    """W + Σ Δ [out, in] of these edits, fp32 or fp64."""
    return weight_under(lm.source.weight(*place).detach().to(wide(lm.dtype)), edits, place)


def _is_plain(edit: Edit) -> bool:
    """Whether the edit acts on every text alike."""
    return not edit.independent and edit.route is None


def _relearning(view, facts: Sequence[Fact], most: int, how: Ft) -> dict[str, int | None]:
    """Steps until the mean loss is that of an answer said: of the old answers, and of those of other facts."""
    if not most or view.prompting or not all(map(_is_plain, view.edits)):
        return {"most": 0}
    answers = list(map(judged_by, facts))
    settings = replace(how, num_steps=most, norm_constraint=0.0)._tune_settings()
    found: dict[str, int | None] = {}
    for which, targets in (("old", answers), ("new", _moved(answers))):
        if targets is None:
            continue
        tasks: list[TuneTask] = [
            how.task(view, replace(fact, target_new=target)) for fact, target in zip(facts, targets, strict=True)
        ]
        losses = fine_tune(view, tasks, settings).losses
        found[which] = next((step for step, loss in enumerate(losses) if loss < SAID), None)
    return found | {"most": most}


def _moved(answers: Sequence[str]) -> list[str] | None:
    """Of each prompt another one's answer, the next that is not its own: as long and as usual as the old ones; None
    where all are the same."""
    if len(set(answers)) < 2:
        return None
    around = [[*answers[i + 1 :], *answers[:i]] for i in range(len(answers))]
    return [next(other for other in others if other != own) for own, others in zip(answers, around, strict=True)]
