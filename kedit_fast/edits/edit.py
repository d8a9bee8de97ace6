"""An edit as data: what to add to which layers, for which facts, and how it was made.

    edit = Memit(...).edit(lm, facts)      # deltas {layer: LowRank | Dense}
    edit.save(path);  Edit.load(path)      # one safetensors file, no pickle
    kf.export_peft(edit, folder)           # a LoRA adapter; kf.merge_checkpoint: a merged checkpoint
    lm.with_edit(edit)                     # a view: base weights untouched, nothing to undo
    with edit.apply(hf_model): ...         # written into the weights, undone bit for bit at the end

Nothing in this file changes a model: the algebra of a delta is deltas.py, writing into a model is apply.py.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.files import replace_file
from kedit_fast.basics.parts import digest as digest_of
from kedit_fast.basics.printing import escaped
from kedit_fast.basics.state import own_state
from kedit_fast.basics.words import reason
from kedit_fast.edits.apply import apply_edit
from kedit_fast.edits.deltas import Delta, Dense, LowRank, written_delta
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.model.family import check_layer

FORMAT, VERSION = "kedit_fast.edit", "1"
_CONTEXTS = 'groups of templates, e.g. [["{}"], ["So. {}"]]'
PARTS = "composed_of"  # the entry of a composition's provenance that lists what it is made of
WRITTEN_FROM = "written_from"  # of the provenance of an edit as some dtype holds it: the digest of the edit itself


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """What an editor returns: the deltas of some layers and everything needed to know where they come from.

    method: the editor's name; hparams: its fields; fingerprint: of the model it was made for
    facts: the n facts it writes
    deltas: {layer: LowRank | Dense}, of the down projections, [out, in]
    values: [n, d], the v* (ROME) or z (MEMIT) of each fact; keys: {layer: [n, d_ff]}, their keys
    contexts: groups of prefix templates over which keys were averaged, [["{}"], ["... {}", ...]]
    provenance: free: who, when, why, package version, fit and iterations
    owners: None, or {layer: [r] int64}: the index of the fact that each factor belongs to (independent edits)

    hparams, contexts and provenance are kept as JSON has them (lists, string keys), so a saved edit equals its
    original. Raises ValueError where sizes disagree or a delta is not finite, TypeError for what cannot be saved.
    """

    method: str
    hparams: dict
    fingerprint: str
    facts: tuple[Fact, ...]
    deltas: dict[int, Delta]
    values: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    contexts: list[list[str]] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    owners: dict[int, Tensor] | None = None

    def __post_init__(self):
        for name in ("method", "fingerprint"):
            checks.text(name, getattr(self, name), blank=True)
        for name in ("hparams", "deltas", "keys", "provenance"):
            checks.instance(name, getattr(self, name), Mapping, "a dict")
        checks.optional(checks.instance, "owners", self.owners, Mapping, "a dict")
        for name in ("hparams", "contexts", "provenance"):
            object.__setattr__(self, name, _as_json(name, getattr(self, name)))
        for name in ("deltas", "keys", "owners"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, dict(sorted(getattr(self, name).items())))
        object.__setattr__(self, "facts", tuple(fact_list(self.facts, empty=True)))
        _as_json("facts", [fact.to_record() for fact in self.facts])  # now, not when hours of work are to be saved
        templates = [t for group in checks.items("contexts", self.contexts, _CONTEXTS) for t in (
            group if isinstance(group, list) else [None]
        )]  # fmt: skip
        if not all(isinstance(template, str) for template in templates):
            checks.refuse("contexts", self.contexts, _CONTEXTS)
        _check_parts(self)

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, ascending."""
        return tuple(self.deltas)

    def delta(self, layer: int) -> Delta | None:
        """What is added to this layer's down projection; None where the edit leaves it alone."""
        return self.deltas.get(layer)

    @own_state()
    def only(self, i: int) -> "Edit":
        """The edit of fact ``i`` alone, which nobody owns any more: the factors it owns, its value and its keys."""
        n = len(self.facts)
        i = checks.whole("i", i, most=n - 1)
        if self.owners is None and n > 1:
            raise ValueError(
                f"these {n} facts were solved together and cannot be told apart; edit the one fact by itself, "
                "or all with independent=True"
            )
        if self.owners is None:
            return self
        mine = {layer: owner == i for layer, owner in self.owners.items()}
        written = {name: [by_fact[i]] for name, by_fact in self.provenance.get("written", {}).items()}
        return replace(
            self,
            facts=self.facts[i : i + 1],
            deltas={
                layer: LowRank(delta.u[:, mine[layer]], delta.v[:, mine[layer]])
                for layer, delta in self.deltas.items()
                if mine[layer].any()
            },
            values=None if self.values is None else self.values[i : i + 1].clone(),
            keys={layer: key[i : i + 1].clone() for layer, key in self.keys.items()},
            provenance=self.provenance | ({"written": written} if written else {}),
            owners=None,
        )

    def apply(self, hf_model, *, check_fingerprint: bool = True):
        """Write W + Δ into a Hugging Face model; see ``kedit_fast.apply.apply_edit``. -> Applied, with ``undo()``."""
        return apply_edit(self, hf_model, check_fingerprint=check_fingerprint)

    def acting_on(self, lm, written: torch.dtype | None = None) -> "Edit":
        """The edit as it acts on a model, see ``LM.with_edit``. Raises ValueError where it does not fit it."""
        if self.fingerprint and self.fingerprint != lm.fingerprint:
            raise ValueError(
                f"this edit was made on {self.fingerprint} and the model is {lm.fingerprint}; open the model it was "
                "made on, or undo what was written into its weights since"
            )
        for layer, delta in self.deltas.items():
            check_layer(layer, lm.n_layers)
            if delta.shape != (lm.d_model, lm.d_ff):
                raise ValueError(
                    f"layer {layer}: the edit changes a weight of {list(delta.shape)}, this model's is "
                    f"{[lm.d_model, lm.d_ff]} ([out, in]); it was made for another model"
                )
        check_once((*lm.edits, self))
        return self if written is None else written_form(self, lambda i: lm.source.weight(i, "down"), written)

    def save(self, path) -> None:
        """Write one safetensors file, whole or not at all; a file of that name is replaced. See ``load``.

        Equal edits make equal files, byte for byte.
        """
        tensors = {name: _storable(tensor) for name, tensor in _tensors_of(self).items()}
        record = {name: getattr(self, name) for name in ("method", "hparams", "fingerprint", "contexts", "provenance")}
        record |= {"facts": [fact.to_record() for fact in self.facts], "tensors": sorted(tensors)}
        # A tensor, not the file's header: that ends at 100 MB, which 20,000 facts with 5 kB of probes each pass.
        tensors["record"] = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
        tensors["sha256"] = _sha256_of(tensors)
        with replace_file(path) as unfinished:
            # One entry: of several, safetensors writes another order each time, and equal edits are to be equal files.
            save_file(tensors, unfinished, metadata={"format": f"{FORMAT} {VERSION}"})

    @classmethod
    @own_state()
    def load(cls, path) -> "Edit":
        """The edit that ``save`` wrote, bit for bit, on the CPU.

        Raises ValueError, naming the file, if it is cut short, no edit, of another version or lacks a tensor.
        """
        tensors = _read(checks.path("path", path))
        try:
            given = tensors.pop("sha256", None)  # files of before have none
            if given is not None and not torch.equal(given, _sha256_of(tensors)):
                raise ValueError("its contents are not those that were saved: their digest is another")
            record = json.loads(bytes(tensors.pop("record").numpy()))
            expected = record.pop("tensors")
            if sorted(tensors) != expected:
                raise ValueError(f"expected the tensors {expected}, found {sorted(tensors)}")
            record["facts"] = tuple(Fact.from_record(fact) for fact in record["facts"])
            return cls(**record, **_fields_of(tensors))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged edit ({reason(error)}); expected what Edit.save wrote") from error

    def __repr__(self):
        n, layers = len(self.facts), ", ".join(map(str, self.layers)) or "none"
        ranks = sorted({delta.rank for delta in self.deltas.values()})
        rank = "-".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "0"
        size = sum(delta.nbytes for delta in self.deltas.values()) / 1e6
        kind = ", independent" if self.owners is not None else ""
        return escaped(  # method and model are as the file says
            f"Edit({self.method}, {n} fact{'s' * (n != 1)}{kind}, layers {layers}, rank {rank}, "
            f"{size:.3g} MB, model {self.fingerprint[:12] or 'unknown'})",
            one_line=True,
        )


def edit_list(edits, name: str = "edits", *, empty: bool = False) -> list[Edit]:
    """Edits in their order, or one, as a list. Raises BadArgument for anything else, and for none unless ``empty``."""
    return checks.listed(name, edits, Edit, "Edits; Edit.load reads a file, compose joins several", empty=empty)


def digest(edit: Edit) -> str:
    """16 hex digits of the sha256 of an edit's deltas, bit for bit: the same before and after it is saved."""
    parts = [(layer, name, tensor) for layer, delta in edit.deltas.items() for name, tensor in vars(delta).items()]
    return digest_of(*(x for part in parts for x in part))


def written_form(edit: Edit, weight: Callable[[int], Tensor], dtype: torch.dtype) -> Edit:
    """The edit as it acts once written into weights of that dtype; weight: layer -> down projection [d, d_ff]."""
    deltas = {layer: written_delta(weight(layer), delta, dtype) for layer, delta in edit.deltas.items()}
    return replace(edit, deltas=deltas, provenance=edit.provenance | {WRITTEN_FROM: digest(edit)})


def _check_parts(edit):
    """Raises ValueError, naming the field, where an Edit's parts do not fit each other or a delta is not finite."""
    n = len(edit.facts)
    for layer, delta in edit.deltas.items():
        if not isinstance(layer, int) or layer < 0 or not isinstance(delta, LowRank | Dense):
            raise ValueError(
                f"deltas: expected {{layer: LowRank | Dense}} with layers from 0, got {layer!r}: {delta!r}"
            )
        if not all(torch.isfinite(tensor).all() for tensor in vars(delta).values()):
            raise ValueError(f"deltas of layer {layer} hold NaN or infinity; such an edit would spoil every answer")
    for delta in edit.deltas.values():
        if edit.values is not None and edit.values.shape != (n, delta.shape[0]):
            raise ValueError(f"values: expected [{n}, {delta.shape[0]}], a row a fact; got {list(edit.values.shape)}")
    for layer, key in edit.keys.items():
        width = edit.deltas[layer].shape[1] if layer in edit.deltas else key.shape[-1]
        if key.shape != (n, width):
            raise ValueError(f"keys of layer {layer}: expected [{n}, {width}], a row a fact; got {list(key.shape)}")
    if edit.owners is None:
        return
    if edit.owners.keys() != edit.deltas.keys():
        raise ValueError(
            f"owners of layers {list(edit.owners)}, deltas of layers {list(edit.deltas)}: expected the same"
        )
    for layer, owner in edit.owners.items():
        delta = edit.deltas[layer]
        if not isinstance(delta, LowRank) or owner.dtype != torch.int64 or owner.shape != (delta.rank,):
            raise ValueError(f"owners of layer {layer}: expected int64, one a factor of a LowRank; delta is {delta!r}")
        if owner.numel() and not 0 <= int(owner.min()) <= int(owner.max()) < n:
            raise ValueError(f"owners of layer {layer}: expected fact indices 0 to {n - 1}")


def _as_json(name, value):
    """``value`` as it comes back from a file: tuples as lists, keys as strings."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} has to be plain values that JSON can hold: {error}") from error


def _sha256_of(tensors: dict[str, Tensor]) -> Tensor:
    """[32] uint8: of all tensors of a file, bit for bit."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        made.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return torch.frombuffer(bytearray(made.digest()), dtype=torch.uint8)


def _tensors_of(edit):
    """{name in the file: tensor}; ``_fields_of`` is its inverse."""
    tensors = {} if edit.values is None else {"values": edit.values}
    for layer, delta in edit.deltas.items():
        tensors |= {f"deltas.{layer}.{part}": tensor for part, tensor in vars(delta).items()}
    tensors |= {f"keys.{layer}": key for layer, key in edit.keys.items()}
    return tensors | {f"owners.{layer}": owner for layer, owner in (edit.owners or {}).items()}


def _fields_of(tensors):
    """{field of Edit: value} from the tensors of a file."""
    fields = {"values": None, "deltas": {}, "keys": {}, "owners": {}}
    parts = {}
    for name, tensor in tensors.items():
        kind, *place = name.split(".")
        if kind == "values":
            fields["values"] = tensor
        elif kind == "deltas":
            parts.setdefault(int(place[0]), {})[place[1]] = tensor
        else:
            fields[kind][int(place[0])] = tensor
    fields["deltas"] = {layer: (Dense if "delta" in part else LowRank)(**part) for layer, part in parts.items()}
    fields["owners"] = fields["owners"] or None
    return fields


def _read(path):
    """{name: tensor} of an edit's file; ValueError if it is not one."""
    expected = f"expected a {FORMAT} file of version {VERSION}, as Edit.save writes it"
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder; {expected} (where it holds versions of edits: EditHistory(folder).current)"
        )
    try:
        with safe_open(path, "pt") as file:
            name, _, version = (file.metadata() or {}).get("format", "").partition(" ")
            if name != FORMAT:
                raise ValueError(f"{path} is a safetensors file but no edit; {expected}")
            if version != VERSION:
                raise ValueError(f"{path} is an edit of version {version}; {expected}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not iterable itself)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or no safetensors file ({error}); {expected}") from error


def _storable(tensor):
    """A contiguous copy on the CPU: safetensors takes neither views with strides nor shared memory."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def check_once(edits: Sequence[Edit]) -> None:
    """Raises ValueError where an edit is among ``edits`` twice, by itself or as part of a composition: its Δ would be
    added twice."""
    if len(edits) < 2:
        return
    seen: dict[str, int] = {}
    for number, edit in enumerate(edits, 1):
        for name in _digests(edit):
            if seen.setdefault(name, number) != number:
                raise ValueError(
                    f"edits {seen[name]} and {number} of {len(edits)} are the same, or hold the same ({name}, of "
                    f"{edit.facts[0].label if edit.facts else 'no fact'}), and its change would be made twice; leave "
                    "one of them out"
                )


def _digests(edit: Edit) -> set[str]:
    """What an edit answers to: its digest, of a composition those of its parts, of a written form its original's."""
    parts = {part["digest"] for part in edit.provenance.get(PARTS, ())}
    original = edit.provenance.get(WRITTEN_FROM)
    return parts | ({original} if original else set()) | ({digest(edit)} if edit.deltas else set())
