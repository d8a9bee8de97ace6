"""Insertion or replacement? The old and the new answer, read off every layer before and after an edit.

The logit lens (nostalgebraist 2020; Geva et al. 2022) puts the residual stream after a layer through the model's final
norm and head, as if the layers above did not exist: which answer stands there already, and how high? After an edit the
new answer should be on top at the end. Whether the old one is gone, or only outvoted and still ranked high on the way,
decides how easily it comes back under other wordings, quantization or further training.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics.checks import AnyPath
from kedit_fast.basics.printing import html_text
from kedit_fast.basics.progress import progress
from kedit_fast.basics.words import ranges
from kedit_fast.edits.chain import with_edits
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.facts.tokens import answer_tokens, asked, encode
from kedit_fast.jobs.finite import check_answers
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.plan import logit_rows
from kedit_fast.sweep.rows import There
from kedit_fast.sweep.runs import RunList, add_edited, first_edited
from kedit_fast.sweep.sites import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 10  # up to this rank an answer counts as present in a layer


class Lens(NamedTuple):
    """What the layers of one model say of n facts, fp32 [n, L] each; NaN where a fact has no such answer.

    p_old, p_new: probability of the first token of the old (target_true) and of the new answer
    rank_old, rank_new: its rank among all tokens, 1 for the likeliest; NaN where the logits are NaN
    """

    p_old: Tensor
    p_new: Tensor
    rank_old: Tensor
    rank_new: Tensor


def there(lens: Lens, first: int) -> tuple[Tensor, Tensor]:
    """[n] each: 1 where the old answer is among the 10 likeliest after some layer from ``first`` on, and after the last
    one; 0 where not, NaN where the model gives NaN instead, or no old answer is known."""
    ranks = lens.rank_old[:, first:]
    found = (ranks <= TOP).double()
    present = found.amax(1)
    present = present.masked_fill(ranks.isnan().any(1) & (present == 0), torch.nan)
    return present, found[:, -1].masked_fill(ranks[:, -1].isnan(), torch.nan)


def _share(column: Tensor) -> float | None:
    return None if column.isnan().all() else float(column.nanmean())


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens:
    """The answers of facts after each layer, before and after an edit.

    facts: the n facts; before: of the model without edits; after: with them (None without an edit)
    first_layer: the lowest edited layer (None without an edit); below it both are the same
    """

    facts: tuple[Fact, ...]
    before: Lens
    after: Lens | None = None
    first_layer: int | None = None

    @property
    def still_there(self) -> Tensor:
        """[n, L] bool: the old answer is among the 10 likeliest after this layer, with the edit where there is one."""
        return (self.after or self.before).rank_old <= TOP

    def where(self, i: int) -> str:
        """One sentence on fact i: is the old answer still there, and where?"""
        lens = self.after or self.before
        fact = self.facts[i]
        if fact.target_true is None:
            return f"{fact.label}: no old answer is known (target_true)"
        ranks, layers = lens.rank_old[i], self.still_there[i].nonzero()[:, 0].tolist()
        name = repr(fact.target_true)
        if not layers:
            if broken := ranks.isnan().nonzero()[:, 0].tolist():
                return f"{name} cannot be looked for: the model gives NaN after layers {ranges(broken)}"
            return f"{name} is not among the {TOP} likeliest after any layer"
        best = min(layers, key=lambda layer: float(ranks[layer]))
        final = "" if layers[-1] < ranks.shape[0] - 1 else ", and still at the end"
        return (
            f"{name} is among the {TOP} likeliest after layers {ranges(layers)}{final}; highest after layer {best} "
            f"(rank {int(ranks[best])}, p {float(lens.p_old[i, best]):.3f})"
        )

    def summary(self) -> dict:
        """Over the facts with an old answer: n, present_before and present_after (share whose old answer is among the
        10 likeliest after some layer from the first edited one on), ends_before and ends_after (after the last); facts
        to which the edited model gives NaN are left out there, None where they are all."""
        known = [i for i, fact in enumerate(self.facts) if fact.target_true is not None]
        found: dict = {"n": len(known), "first_layer": self.first_layer}
        for name, lens in (("before", self.before), ("after", self.after)):
            if lens is None or not known:
                found |= {f"present_{name}": None, f"ends_{name}": None}
                continue
            present, ends = there(lens, self.first_layer or 0)
            found |= {f"present_{name}": _share(present[known]), f"ends_{name}": _share(ends[known])}
        return found

    def plot(self, path: AnyPath | None = None, fact: int | None = None, model: str = "") -> "Figure":
        """Median rank by layer, or one fact's, before and after; see ``lens_plot.plot_lens``. -> a Figure"""
        from kedit_fast.pictures.lens import plot_lens

        return plot_lens(self, path, fact, model)

    def _repr_html_(self) -> str:
        from kedit_fast.pictures.figure import figure_html

        lines = "".join(f"<p>{html_text(self.where(i))}</p>" for i in range(min(len(self.facts), TOP)))
        return figure_html(self.plot()) + lines

    def __repr__(self) -> str:
        n, layers = len(self.facts), self.before.p_old.shape[1]
        edit = "no edit" if self.after is None else f"edited from layer {self.first_layer}"
        return f"LogitLens({n} fact{'s' * (n != 1)}, {layers} layers, {edit})"


class ReadLens:
    """``values`` [4, k, L]: p and rank of two tokens after each layer, at places run [k], pos [k].

    targets: [k, 2] int64, -1 where there is none. Rows of logits are made and dropped, so nothing of [k, V] is kept.
    """

    def __init__(self, lm, run: Tensor, pos: Tensor, targets: Tensor):
        self._lm, self.run, self.pos, self.targets = lm, run, pos, There(targets)
        self._found = torch.full((4, len(run), lm.n_layers), torch.nan, device=lm.device)

    @property
    def values(self) -> Tensor:
        """On the CPU."""
        return self._found.cpu()

    def sites(self, layer):
        return (Site.layer_out,)

    def reads(self, layer):
        return self.run, self.pos

    def at(self, site, layer, x, call):
        which, row = call.find(self.run, self.pos)
        step = logit_rows(self._lm)
        for places, rows in zip(which.split(step), row.split(step), strict=True):
            if len(places):
                self._found[:, places, layer] = self._read(x[rows], self.targets.on(x.device)[places])
        return None

    def _read(self, h: Tensor, targets: Tensor) -> Tensor:
        """[4, k]: p and rank of each of two targets after hidden states h [k, d]."""
        logits = self._lm.head(h).float()
        ids = targets.to(logits.device)
        mine = logits.gather(1, ids.clamp(min=0))
        p = (mine - logits.logsumexp(1, keepdim=True)).exp()
        # Counted one target at a time: [k, 2, V] of comparisons would be twice what there is room for.
        ranks = [1 + (logits > mine[:, i : i + 1]).sum(1) for i in (0, 1)]
        rank = torch.stack(ranks, 1).float().where(~p.isnan(), torch.nan)
        unknown = ids < 0
        p, rank = (values.masked_fill(unknown, torch.nan) for values in (p, rank))
        return torch.cat([p.T, rank.T])


@takes_lm
@torch.no_grad()
def logit_lens(lm: LM, facts: Fact | Iterable[Fact], edit: Edit | None = None) -> LogitLens:
    """The first tokens of each fact's old and new answer after every layer, at the last token of its prompt.

    edit: an Edit on top of those that ``lm`` carries; "before" is the model without any of them. To see the edit as it
    will be once written: ``logit_lens(lm.with_edit(edit, written=torch.bfloat16), facts)``.

    One sweep for all facts, without and with the edit; a head a row and layer. Raises ValueError where the model
    without edits gives NaN after some layer, for no facts, a fact without answers, an edit for another model or
    independent edits; TypeError for anything but Facts.
    """
    facts = fact_list(facts)
    for fact in facts:
        if not (fact.target_new or fact.target_true):
            raise ValueError(f"fact {fact.label} has neither target_new nor target_true: no answer to look for")
    lm = lm if edit is None else with_edits(lm, [edit], "edit")
    texts = [asked(lm.tokenizer, fact.text, fact.chat) for fact in facts]
    prompts = [encode(lm.tokenizer, text) for text in texts]
    answers = [
        [_first(lm, text, answer, f.attached) for answer in (f.target_true, f.target_new)]
        for text, f in zip(texts, facts, strict=True)
    ]
    targets = torch.tensor(answers)
    lm, texts, owners = lm.as_read(texts)
    read = [encode(lm.tokenizer, text) for text in texts]
    runs = RunList()
    base, edited = add_edited(lm, runs, prompts, owners, read, [len(ids) - 1 for ids in read])
    n = 1 + (edited is not base)
    last = torch.tensor([len(ids) - 1 for ids in (*prompts, *read)[: n * len(facts)]])
    job = ReadLens(lm, torch.cat([base, edited][:n]), last, targets.repeat(n, 1))
    with progress("logit lens, share of layers", 1) as bar:
        sweep(lm, runs.runs(), [job], advance=bar.advance)
    before, *rest = (Lens(*half) for half in job.values.chunk(n, dim=1))
    seen = torch.stack(before[:2], 1).where(targets[:, :, None] >= 0, 0.0)
    check_answers(replace(lm, edits=()), seen, prompts.__getitem__)
    if not rest:
        return LogitLens(tuple(facts), before)
    # The edited runs own no rows below the first edited layer: there they are the base runs, where they read the same.
    other, first = torch.tensor([a != b for a, b in zip(prompts, read, strict=True)]), first_edited(lm) or 0
    shared = (torch.arange(lm.n_layers) < first) & ~other[:, None]
    after = Lens(*(torch.where(shared, b, a) for b, a in zip(before, rest[0], strict=True)))
    return LogitLens(tuple(facts), before, after, 0 if other.any() else first)


def _first(lm, prompt: str, answer: str | None, attached: bool | None) -> int:
    return -1 if answer is None else answer_tokens(lm.tokenizer, prompt, answer, attached)[0]
