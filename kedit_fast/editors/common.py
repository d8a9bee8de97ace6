"""What ROME and MEMIT share in their sweeps: the facts as token sequences, their keys, the edits below a new one."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edit import Edit
from ..facts import Fact, check_facts, fact_tokens, target_tokens
from ..jobs.collect import Collect
from ..jobs.values import ValueTask
from ..sites import Site
from ..sweep.engine import sweep
from ..sweep.runs import RunList, add_sequences

ESSENCE = "{} is a"  # the prompt whose next-token distribution the KL term keeps


@dataclass(frozen=True)
class Prompts:
    """n facts in all contexts, as token sequences; what keys and values are read from.

    sequences: [n * m] prompts, fact by fact, in m contexts each (the bare one first); lookups: [n * m] positions;
    weights: [m] of each context in a key
    """

    facts: tuple[Fact, ...]
    sequences: list[list[int]]
    lookups: Tensor
    weights: Tensor

    @classmethod
    def of(cls, lm, facts: Sequence[Fact], groups: list[list[str]]) -> "Prompts":
        """Key weights: the mean within a group, then over groups."""
        templates = [t for group in groups for t in group]
        tokenized = [fact_tokens(lm.tokenizer, fact, template) for fact in facts for template in templates]
        weights = [1 / (len(groups) * len(group)) for group in groups for _ in group]
        return cls(
            tuple(facts), [list(t.ids) for t in tokenized], torch.tensor([t.lookup for t in tokenized]),
            torch.tensor(weights, dtype=torch.float64),
        )  # fmt: skip

    @property
    def n_contexts(self) -> int:
        return len(self.weights)

    @property
    def bare(self) -> Tensor:
        """[n] index of each fact's bare prompt among the sequences."""
        return torch.arange(len(self.facts)) * self.n_contexts

    def value_tasks(self, lm) -> list[ValueTask]:
        """What the values of these facts are optimized on."""
        tasks = []
        for i, fact in enumerate(self.facts):
            mine = slice(i * self.n_contexts, (i + 1) * self.n_contexts)
            essence = fact_tokens(lm.tokenizer, Fact(prompt=ESSENCE, subject=fact.subject))
            target = target_tokens(lm.tokenizer, fact.target_new)
            ids = list(essence.ids)[: essence.lookup + 1]
            tasks.append(ValueTask(self.sequences[mine], self.lookups[mine].tolist(), target, ids, fact.label))
        return tasks

    def collect(self, lm, reads: dict[Site, tuple[int, Tensor]]) -> dict[Site, Tensor]:
        """{site: rows [k, width]} at one layer each, at the lookup tokens of the sequences ``which`` [k]; one sweep."""
        runs = RunList()
        number = add_sequences(runs, self.sequences, owner=lm.run_owner)
        jobs = {
            site: Collect(site, [layer], number[which], self.lookups[which]) for site, (layer, which) in reads.items()
        }
        sweep(lm, runs.runs(), list(jobs.values()), last_layer=max(layer for layer, _ in reads.values()))
        return {site: job.values[reads[site][0]] for site, job in jobs.items()}

    def average(self, rows: Tensor) -> Tensor:
        """[n, width] fp64: rows [n * m, width] of all sequences, averaged over contexts by their weights."""
        grouped = rows.double().view(len(self.facts), self.n_contexts, -1)
        return torch.einsum("m,nmw->nw", self.weights.to(grouped.device), grouped)


def checked_facts(facts) -> list[Fact]:
    """Facts an editor can write: targets present, no contradictions. One Fact is a list of one."""
    return check_facts([facts] if isinstance(facts, Fact) else list(facts), need_new=True)


def check_lengths(lm, facts: Sequence[Fact], groups: list[list[str]]) -> None:
    """Raises ValueError where a fact in one of its contexts, with its new target behind it, is too long for the model
    or has characters that the tokenizer drops. Tokenizes all of them."""
    for fact in facts:
        target = target_tokens(lm.tokenizer, fact.target_new)
        for template in (t for group in groups for t in group):
            try:
                # the target's last token is predicted, not read
                lm.check_length(len(fact_tokens(lm.tokenizer, fact, template).ids) + len(target) - 1)
            except ValueError as error:
                raise ValueError(f"fact {fact.label} in context {template!r}: {error}") from error


def under(lm, previous, facts: Sequence[Fact]):
    """The model with an earlier edit, for an edit of ``facts`` made on top of it.

    Warns of facts that an earlier edit wrote with another target. Raises ValueError for independent edits.
    """
    if previous is not None and not isinstance(previous, Edit):
        raise TypeError(f"previous: expected an Edit, got {type(previous).__name__}; Edit.load reads a file")
    lm = lm if previous is None else lm.with_edit(previous)
    lm.run_owner  # noqa: B018 (raises for independent edits, now and not in the first sweep)
    _warn_of_overwritten(lm.edits, facts)
    return lm


def _warn_of_overwritten(edits: Sequence[Edit], facts: Sequence[Fact]) -> None:
    """A later edit may correct an earlier one, so this is no error; but nobody should do it unknowingly."""
    written = {place: fact for edit in edits for fact in edit.facts for place in _places(fact) if fact.target_new}
    pairs = []
    for fact in facts:
        earlier = (written[place] for place in _places(fact) if place in written)
        other = next((f for f in earlier if f.target_new.strip() != fact.target_new.strip()), None)
        if other is not None:
            pairs.append(f"{other.label} -> {other.target_new!r} by {fact.label} -> {fact.target_new!r}")
    if pairs:
        shown = "; ".join(pairs[:5]) + ("; ..." if len(pairs) > 5 else "")
        warnings.warn(f"{len(pairs)} facts of an earlier edit are overwritten: {shown}", stacklevel=5)


def _places(fact: Fact) -> list[tuple[str, str]]:
    """What two facts share that say something of the same relation of one subject, up to case and spacing."""
    subject, prompt = (" ".join(text.casefold().split()) for text in (fact.subject, fact.prompt))
    relation = fact.provenance.get("relation_id")
    return [(subject, prompt)] + ([(subject, f"relation {relation}")] if relation else [])


def chain(lm) -> dict:
    """{"on_top_of": the edits that a new edit stands on, in order}, for its provenance; empty where there are none.

    The new edit is right only on top of these: their keys and values are those of the edited model.
    """
    below = [
        {"method": e.method, "n_facts": len(e.facts), "layers": list(e.layers), "digest": digest(e)} for e in lm.edits
    ]
    return {"on_top_of": below} if below else {}


def digest(edit: Edit) -> str:
    """16 hex digits of the sha256 of an edit's deltas, bit for bit: the same before and after it is saved."""
    made = hashlib.sha256()
    for layer, delta in edit.deltas.items():
        for name, tensor in vars(delta).items():
            made.update(f"{layer} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()[:16]


def check_finite(rows: Tensor, facts: Sequence[Fact], what: str) -> None:
    """Raises ValueError, naming the fact, where a fact's row of rows [n, width] holds NaN or infinity."""
    bad = (~torch.isfinite(rows)).any(1).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"the {what} of fact {facts[bad[0]].label} holds NaN or infinity ({len(bad)} of {len(facts)} facts), so no "
            "edit is made; open the model in float32, or lower v_lr or clamp_norm_factor"
        )


def storable(lm, factors: Tensor) -> Tensor:
    """Factors as an Edit keeps them: fp32, or fp64 for an fp64 model."""
    return factors.to(torch.promote_types(lm.dtype, torch.float32)).cpu()
