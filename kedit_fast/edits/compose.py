"""Several edits as one: what a chain of edits does, in a single edit to save, to ship or to build on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit_fast import __version__
from kedit_fast.basics.state import own_state
from kedit_fast.edits.chain import check_chain
from kedit_fast.edits.changes import WeightChange, only_weights
from kedit_fast.edits.deltas import Delta, Dense, LowRank
from kedit_fast.edits.edit import PARTS, Edit, digest, edit_list

_BLOCK = 2**24  # elements of a dense sum held in fp64 at a time: 128 MiB


@own_state()
def compose(edits: Sequence[Edit]) -> Edit:
    """One edit that does what ``edits`` do in order: Δ = Σ Δ_i of each matrix. One edit alone is returned as it is.

    Low-rank factors are joined while that is smaller than the dense delta, else summed in fp64 and rounded once to the
    widest dtype among them, fp32 at least. The result is on the CPU. Facts are joined in order, also where a later edit
    corrects an earlier one; keys of a layer only where every edit has them, values only where all are of one method
    and of the same layers; statistics add up. An edit made on top of a composition follows that composition, not its
    parts.

    method: the methods in order, each once ("rome + memit"); hparams and contexts: those of all, where they agree, else
    empty; provenance["composed_of"]: of each part (of a composition, of its own parts) its method, layers, number of
    facts, digest, hparams and provenance.

    Raises ValueError for no edits, edits of different models or widths, independent ones, the same edit twice, and
    where an edit was made on top of others than those before it; TypeError for anything but Edits.
    """
    edits = _checked(edits)
    if len(edits) == 1:
        return edits[0]
    places = sorted({place for edit in edits for place in edit.weights})
    in_common = set.intersection(*(set(edit.keys) for edit in edits))
    return Edit(
        method=" + ".join(dict.fromkeys(name for edit in edits for name in edit.method.split(" + "))),
        hparams=_agreed([edit.hparams for edit in edits], {}),
        fingerprint=edits[0].fingerprint,
        facts=tuple(fact for edit in edits for fact in edit.facts),
        changes=tuple(
            WeightChange(
                layer, _sum(layer, [e.weights[layer, role] for e in edits if (layer, role) in e.weights]), role
            )
            for layer, role in places
        ),
        values=_values(edits),
        keys={layer: _rows([edit.keys[layer] for edit in edits]) for layer in sorted(in_common)},
        contexts=_agreed([edit.contexts for edit in edits], []),
        provenance={"version": __version__, PARTS: [part for edit in edits for part in _parts(edit)]},
        statistics=summed_statistics(edits),
    )


def summed_statistics(edits: Sequence[Edit]) -> dict[str, Tensor]:
    """{name: sum} of what edits hold to go on from, on the CPU; of several dtypes the widest. Raises ValueError for
    some of one name and two shapes."""
    total: dict[str, Tensor] = {}
    for edit in edits:
        for name, part in edit.statistics.items():
            if name in total and total[name].shape != part.shape:
                raise ValueError(
                    f"the statistics {name} of two edits are {list(total[name].shape)} and {list(part.shape)}; one of "
                    "them is damaged"
                )
            total[name] = total[name] + part.cpu() if name in total else part.cpu()
    return dict(sorted(total.items()))


def _checked(edits) -> list[Edit]:
    edits = edit_list(edits)
    for place, edit in enumerate(edits, 1):
        only_weights(edit, f"their sum acts on all (edit {place} of {len(edits)})")
        if edit.fingerprint != edits[0].fingerprint:
            raise ValueError(
                f"edit {place} was made for model {edit.fingerprint or '(not said)'}, the first one for "
                f"{edits[0].fingerprint or '(not said)'}; only edits of one model can act together"
            )
    check_chain(edits)
    return edits


def _sum(layer: int, deltas: list[Delta]) -> Delta:
    """Σ Δ_i in the smaller of its two forms; a delta alone is itself."""
    shapes = {delta.shape for delta in deltas}
    if len(shapes) > 1:
        raise ValueError(f"layer {layer}: deltas of {sorted(shapes)}; expected edits of one model, so of one shape")
    if len(deltas) == 1:
        return deltas[0]
    (d, d_ff), dtype = deltas[0].shape, _widest([t.dtype for delta in deltas for t in vars(delta).values()])
    deltas = [delta.to("cpu") for delta in deltas]
    rank = sum(delta.rank for delta in deltas)
    thin = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(thin) == len(deltas) and rank * (d + d_ff) <= d * d_ff:
        return LowRank(torch.cat([x.u.to(dtype) for x in thin], 1), torch.cat([x.v.to(dtype) for x in thin], 1))
    total = torch.empty(d, d_ff, dtype=dtype)
    height = max(1, _BLOCK // max(1, d_ff))
    for begin in range(0, d, height):
        block = slice(begin, begin + height)
        total[block] = sum(delta.part(block) for delta in deltas)
    return Dense(total)


def _widest(dtypes) -> torch.dtype:
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _rows(parts: list[Tensor]) -> Tensor:
    """Rows of all facts; of several dtypes the widest."""
    return torch.cat([rows.to("cpu") for rows in parts])


def _values(edits: list[Edit]) -> Tensor | None:
    """v* or z of all facts, where they stand for the same thing."""
    kinds = {(edit.method, edit.layers) for edit in edits}
    values = [edit.values for edit in edits if edit.values is not None]
    return None if len(kinds) > 1 or len(values) < len(edits) else _rows(values)


def _agreed(values: list, otherwise):
    return values[0] if all(value == values[0] for value in values) else otherwise


def _parts(edit: Edit) -> list[dict]:
    """What a part leaves in the provenance; a composition leaves its own parts."""
    if PARTS in edit.provenance:
        return edit.provenance[PARTS]
    return [
        {
            "method": edit.method, "layers": list(edit.layers), "n_facts": len(edit.facts), "digest": digest(edit),
            "hparams": edit.hparams, "provenance": edit.provenance,
        }
    ]  # fmt: skip
