"""An edit as data: what to add to which layers, for which facts, and how it was made.

    edit = Memit(...).edit(lm, facts)      # its changes: Δ of a matrix, a memory (changes.py)
    edit.save(path);  Edit.load(path)      # one safetensors file, no pickle
    kf.export_peft(edit, folder)           # a LoRA adapter; kf.merge_checkpoint: a merged checkpoint
    lm.with_edit(edit)                     # a view: base weights untouched, nothing to undo
    with edit.apply(hf_model): ...         # written into the weights, undone bit for bit at the end

Nothing in this file changes a model: the algebra of a delta is deltas.py, writing into a model is apply.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kedit_fast.basics import checks
from kedit_fast.basics.bits import digest as digest_of
from kedit_fast.basics.bits import json_of, json_tensor
from kedit_fast.basics.files import reading, replace_file
from kedit_fast.basics.printing import escaped
from kedit_fast.basics.state import own_state
from kedit_fast.edits.apply import Applied, apply_edit
from kedit_fast.edits.changes import Change, WeightChange, check_owners, only_weights
from kedit_fast.edits.deltas import Delta, written_delta
from kedit_fast.edits.format import FORMAT, KINDS, VERSION, as_version_2, fields_of, read, sha256_of, tensors_of
from kedit_fast.edits.routes import Route, check_route
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.model.lm import LM, takes_lm

_CONTEXTS = 'groups of templates, e.g. [["{}"], ["So. {}"]]'
PARTS = "composed_of"  # the entry of a composition's provenance that lists what it is made of
BY_FACT = ("written", "found", "tokens")  # entries of an editor's provenance: lists by fact, or {name: such a list}
WRITTEN_FROM = "written_from"  # of the provenance of an edit as some dtype holds it: the digest of the edit itself


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """What an editor returns: what it changes, and everything needed to know where that comes from.

    method: the editor's name; hparams: its fields; fingerprint: of the model it was made for
    facts: the n facts it writes
    changes: each acts from its layer on (``changes.py``); {layer: LowRank | Dense} stands for changes of the down
        projections; kept in the order of their layers
    values: [n, d], the v* (ROME) or z (MEMIT) of each fact; keys: {layer: [n, d_ff]}, their keys
    contexts: groups of prefix templates over which keys were averaged, [["{}"], ["... {}", ...]]
    provenance: free: who, when, why, package version, fit and iterations
    route: of a routed edit, whose changes' owners are its entries: which of them acts on a prompt (``routes.py``)
    statistics: {name: tensor}, sums over what was read, which add up: what a next edit of the method goes on from

    hparams, contexts and provenance are kept as JSON has them (lists, string keys), so a saved edit equals its
    original. Raises ValueError where sizes disagree or a change is not finite, TypeError for what cannot be saved.
    """

    method: str
    hparams: dict
    fingerprint: str
    facts: tuple[Fact, ...]
    changes: tuple[Change, ...]
    values: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    contexts: list[list[str]] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    route: Route | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("method", "fingerprint"):
            checks.text(name, getattr(self, name), blank=True)
        for name in ("hparams", "keys", "provenance", "statistics"):
            checks.instance(name, getattr(self, name), Mapping, "a dict")
        object.__setattr__(self, "changes", _change_list(self.changes))
        object.__setattr__(self, "keys", dict(sorted(self.keys.items())))
        for name in ("hparams", "contexts", "provenance"):
            object.__setattr__(self, name, _as_json(name, getattr(self, name)))
        object.__setattr__(self, "facts", tuple(fact_list(self.facts, empty=True)))
        _as_json("facts", [fact.to_record() for fact in self.facts])  # now, not when hours of work are to be saved
        templates = [t for group in checks.items("contexts", self.contexts, _CONTEXTS) for t in (
            group if isinstance(group, list) else [None]
        )]  # fmt: skip
        if not all(isinstance(template, str) for template in templates):
            checks.refuse("contexts", self.contexts, _CONTEXTS)
        _check_parts(self)
        if len(self.facts) == 1 and self.independent:
            object.__setattr__(self, "changes", _unowned(self.changes, 0))

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, ascending."""
        return tuple(dict.fromkeys(change.layer for change in self.changes if change.layer is not None))

    @property
    def independent(self) -> bool:
        """Whether each part belongs to one fact of several alone; an edit of one fact is that fact's, of no owner."""
        return self.route is None and any(change.owners is not None for change in self.changes)

    @property
    def parts(self) -> tuple[Change | Route, ...]:
        """What it consists of: its changes, and the route to them, if there is one."""
        return self.changes if self.route is None else (*self.changes, self.route)

    @property
    def weights(self) -> dict[tuple[int, str], Delta]:
        """{(layer, role): Δ [out, in]} of the changes of weights."""
        return {(c.layer, c.role): c.delta for c in self.changes if isinstance(c, WeightChange)}

    @property
    def deltas(self) -> dict[int, Delta]:
        """{layer: Δ [d, d_ff]} of the down projections, where ROME, MEMIT and their kin write."""
        return {layer: delta for (layer, role), delta in self.weights.items() if role == "down"}

    @own_state()
    def only(self, i: int) -> "Edit":
        """The edit of fact ``i`` alone, which nobody owns any more: the factors it owns, its value and its keys. Of a
        routed edit the fact's entry, with the route to it."""
        n = len(self.facts)
        i = checks.place("i", i, n, "facts")
        if self.route is not None:
            return self._of_facts(self.route, [i])
        if not self.independent and n > 1:
            raise ValueError(
                f"these {n} facts were solved together and cannot be told apart; edit the one fact by itself, "
                "or all with independent=True (--independent)"
            )
        return self._some([i], changes=_unowned(self.changes, i)) if self.independent else self

    @own_state()
    def without(self, i: int) -> "Edit":
        """A routed edit without fact ``i``, which is thereby undone; the others are as they were.

        Raises ValueError for other edits, and for a fact that shares its entry with another one."""
        i = checks.place("i", i, len(self.facts), "facts")
        if self.route is None:
            raise ValueError(
                "these facts are in weights, from which none can be left out; make the edit again without it, or "
                "take facts of an independent one, edit.only(i) (kedit-fast edit only EDIT N)"
            )
        return self._of_facts(self.route, [fact for fact in range(len(self.facts)) if fact != i])

    def _of_facts(self, route: Route, facts: list[int]) -> "Edit":
        """A routed edit of some of its facts, with their entries."""
        route, entries = route.of_facts(torch.tensor(facts, dtype=torch.int64))
        changes = (change.of_entries(entries) for change in self.changes)
        return self._some(facts, changes=tuple(change for change in changes if change is not None), route=route)

    def _some(self, facts: list[int], **acting) -> "Edit":
        """What is known of some facts; acting: the changes, and the route, that are theirs."""
        kept, n = torch.tensor(facts, dtype=torch.int64), len(self.facts)

        def some(said):
            if isinstance(said, dict):
                return {name: some(by_fact) for name, by_fact in said.items()}
            return [said[i] for i in facts] if isinstance(said, list) and len(said) == n else said

        return replace(
            self,
            facts=tuple(self.facts[i] for i in facts),
            values=None if self.values is None else self.values[kept],
            keys={layer: key[kept] for layer, key in self.keys.items()},
            provenance={name: some(said) if name in BY_FACT else said for name, said in self.provenance.items()},
            **acting,
        )

    def apply(self, hf_model: nn.Module, *, check_fingerprint: bool = True) -> Applied:
        """Write W + Δ into a Hugging Face model; see ``kedit_fast.apply.apply_edit``. -> Applied, with ``undo()``."""
        return apply_edit(self, hf_model, check_fingerprint=check_fingerprint)

    @takes_lm
    def acting_on(self, lm: LM, written: torch.dtype | None = None) -> "Edit":
        """The edit as it acts on a model, see ``LM.with_edit``. Raises ValueError where it does not fit it."""
        if self.fingerprint and self.fingerprint != lm.fingerprint:
            raise ValueError(
                f"this edit was made on {self.fingerprint} and the model is {lm.fingerprint}; open the model it was "
                "made on, or undo what was written into its weights since"
            )
        for part in self.parts:
            part.check(lm)
        check_alone((*lm.edits, self))
        check_once((*lm.edits, self))
        return self if written is None else written_form(self, lm.source.weight, written)

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, copies on the CPU, as ``save`` writes them; ``from_tensors`` gives it back."""
        held = tensors_of(self)  # copied, for safetensors takes neither views with strides nor shared memory
        tensors = {name: x.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, x in held.items()}
        record = {name: getattr(self, name) for name in ("method", "hparams", "fingerprint", "contexts", "provenance")}
        record |= {"facts": [fact.to_record() for fact in self.facts], "tensors": sorted(tensors)}
        record["changes"] = [{"kind": change.kind} | change.record() for change in self.changes]
        if self.route is not None:
            record["route"] = {"kind": self.route.kind} | self.route.record()
        # A tensor, not the file's header: that ends at 100 MB, which 20,000 facts with 5 kB of probes each pass.
        tensors["record"] = json_tensor(record)
        tensors["sha256"] = sha256_of(tensors)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], version: int = VERSION) -> "Edit":
        """What ``to_tensors`` gave. Raises ValueError, and what tensors that it never gave may bring about."""
        tensors = dict(tensors)
        given = tensors.pop("sha256", None)  # files of before have none
        if given is not None and not torch.equal(given, sha256_of(tensors)):
            raise ValueError("its contents are not those that were saved: their digest is another")
        record = json_of(tensors.pop("record"))
        expected = record.pop("tensors")
        if sorted(tensors) != expected:
            raise ValueError(f"expected the tensors {expected}, found {sorted(tensors)}")
        if version == 1:
            as_version_2(record, tensors)
        return cls(**fields_of(record, tensors))

    def save(self, path: checks.AnyPath) -> None:
        """Write one safetensors file, whole or not at all; one of that name is replaced, folders made. See ``load``.

        Equal edits make equal files, byte for byte.
        """
        tensors = self.to_tensors()
        with replace_file(path) as unfinished:
            # One entry: of several, safetensors writes another order each time, and equal edits are to be equal files.
            save_file(tensors, unfinished, metadata={"format": f"{FORMAT} {VERSION}"})

    @classmethod
    @own_state()
    def load(cls, path: checks.AnyPath) -> "Edit":
        """The edit that ``save`` wrote, bit for bit, on the CPU.

        Raises ValueError, naming the file, if it is cut short, no edit, of another version or lacks a tensor.
        """
        path = checks.path("path", path)
        tensors, version = read(path)
        with reading(path, "expected what Edit.save wrote", "is a damaged edit"):
            return cls.from_tensors(tensors, version)

    def __repr__(self):
        n, layers = len(self.facts), ", ".join(map(str, self.layers)) or "none"
        ranks = sorted({delta.rank for delta in self.weights.values()})
        rank = "-".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "0"
        others = [change.kind for change in self.changes if not isinstance(change, WeightChange)]
        what = f"rank {rank}" * bool(ranks or not others) + ", " * bool(ranks and others) + ", ".join(others)
        size = sum(change.nbytes for change in self.changes) / 1e6
        kind = ", independent" * self.independent
        kind += f", routed ({self.route.kind})" if self.route is not None else ""
        return escaped(  # method and model are as the file says
            f"Edit({self.method}, {n} fact{'s' * (n != 1)}{kind}, layers {layers}, {what}, "
            f"{size:.3g} MB, model {self.fingerprint[:12] or 'unknown'})",
            one_line=True,
        )


def edit_list(edits, name: str = "edits", *, empty: bool = False) -> list[Edit]:
    """Edits in their order, or one, as a list. Raises BadArgument for anything else, and for none unless ``empty``."""
    return checks.listed(name, edits, Edit, "Edits; Edit.load reads a file, compose joins several", empty=empty)


def digest(edit: Edit) -> str:
    """16 hex digits of the sha256 of what an edit changes, bit for bit: the same before and after it is saved."""
    parts: list = []
    if edit.route is not None:
        parts = [edit.route.kind, edit.route.record(), *(x for pair in edit.route.tensors().items() for x in pair)]
    for change in edit.changes:
        tensors: dict[str, Tensor | None] = {json.dumps(change.record()): None, **change.tensors()}
        if isinstance(change, WeightChange) and change.role == "down":  # told as files of version 1 have it
            tensors = vars(change.delta)
        parts += [x for name, tensor in tensors.items() for x in (change.layer, name, tensor)]
    return digest_of(*parts)


def written_form(edit: Edit, weight: Callable[[int, str], Tensor], dtype: torch.dtype) -> Edit:
    """The edit as it acts once written into weights of that dtype; weight: (layer, role) -> [out, in]."""
    changes = [
        replace(change, delta=written_delta(weight(change.layer, change.role), change.delta, dtype))
        for change in only_weights(edit, "only one model can be written")
    ]
    return replace(edit, changes=tuple(changes), provenance=edit.provenance | {WRITTEN_FROM: digest(edit)})


def _change_list(changes) -> tuple[Change, ...]:
    """Changes in the order of their layers; of one matrix there is one."""
    if isinstance(changes, Mapping):
        changes = [WeightChange(layer, delta) for layer, delta in changes.items()]
    wanted = "changes (edits/changes.py), or {layer: LowRank | Dense}"
    changes = checks.listed("changes", changes, tuple(KINDS.values()), wanted, empty=True)
    places = [(change.layer, change.role) for change in changes if isinstance(change, WeightChange)]
    if len(set(places)) < len(places):
        raise ValueError(f"changes: several of one matrix among {places}; compose joins edits, and sums their deltas")
    return tuple(sorted(changes, key=lambda change: -1 if change.layer is None else change.layer))


def _unowned(changes: Sequence[Change], fact: int) -> tuple[Change, ...]:
    """What of the changes belongs to one fact, which nobody owns any more."""
    mine = (change.only(fact) for change in changes)
    return tuple(change for change in mine if change is not None)


def _check_parts(edit):
    """Raises ValueError, naming the field, where an Edit's parts do not fit each other."""
    n, deltas = len(edit.facts), edit.deltas
    for delta in deltas.values():
        if edit.values is not None and edit.values.shape != (n, delta.shape[0]):
            raise ValueError(f"values: expected [{n}, {delta.shape[0]}], a row a fact; got {list(edit.values.shape)}")
    for layer, key in edit.keys.items():
        width = deltas[layer].shape[1] if layer in deltas else key.shape[-1]
        if key.shape != (n, width):
            raise ValueError(f"keys of layer {layer}: expected [{n}, {width}], a row a fact; got {list(key.shape)}")
    check_route(edit.route, n, edit.changes)
    check_owners(edit.changes, n if edit.route is None else edit.route.n_entries, edit.route is not None)


def _as_json(name, value):
    """``value`` as it comes back from a file: tuples as lists, keys as strings."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} has to be plain values that JSON can hold: {error}") from error


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


def check_alone(edits: Sequence[Edit]) -> None:
    """Raises ValueError where a routed edit is to act beside another one, or beside independent edits: of each prompt
    one of them would have to say who acts."""
    owned = [edit for edit in edits if edit.route is not None or edit.independent]
    if len(owned) > 1 and any(edit.route is not None for edit in owned):
        raise ValueError(
            f"{owned[0].method} and {owned[1].method}: one routed edit acts on a model at a time, and beside no "
            "independent ones; make one edit of all facts, or leave one out (kedit-fast history rollback, of a history)"
        )


def _digests(edit: Edit) -> set[str]:
    """What an edit answers to: its digest, of a composition those of its parts, of a written form its original's."""
    parts = {part["digest"] for part in edit.provenance.get(PARTS, ())}
    original = edit.provenance.get(WRITTEN_FROM)
    return parts | ({original} if original else set()) | ({digest(edit)} if edit.changes else set())
