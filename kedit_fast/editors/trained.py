"""What trained editors share: their one setting is a network, which was trained before; an edit is one sweep."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from kedit_fast.basics import checks
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted
from kedit_fast.editors.editor import Editor, Found, Work, Written
from kedit_fast.editors.networks import Network
from kedit_fast.editors.training_step import edit_task, subject_digest
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import storable
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.gradients import gradient_packs, task_losses
from kedit_fast.model.lm import LM, takes_lm


@dataclass(frozen=True)
class Trained(Editor):
    """network: what ``train_editor`` gave, or the path of its file; layers: those that it changes, as it says itself

    An edit of several facts is the sum of theirs (MALMEN: one system); ``independent`` ones see nothing of each other.
    """

    layers: tuple[int, ...] = ()
    network: Network | None = None
    source: str = ""

    NETWORK: ClassVar[type[Network]] = Network
    STAGES: ClassVar = ("gradients",)
    GENTLER: ClassVar[str] = "edit fewer facts at once, or each by itself behind a route (kf.routed, --route names)"
    NEEDS_SUBJECT: ClassVar = False
    NEEDS_CONTEXTS: ClassVar = False
    mom2_adjustment: ClassVar = False
    UNREAD: ClassVar = dict.fromkeys(
        ("moments", "corpus", "contexts"), "a trained editor reads its network, prompts and targets alone; leave it out"
    ) | {"checkpoint": "a trained editor needs one sweep, which has no finished parts to keep; leave it out"}
    CHECKS: ClassVar = {"network": lambda network: network}  # checked where it is read

    def __post_init__(self):
        if self.network is not None:
            object.__setattr__(self, "network", self._network())
            if not self.source:
                steps = self.network.provenance.get("steps", 0)
                object.__setattr__(self, "source", f"network {self.network.digest}, trained {counted(steps, 'step')}")
        super().__post_init__()
        if self.network is not None and self.layers != self.network.layers:
            if self.layers:
                raise ValueError(
                    f"layers {self.layers}: this network changes {self.network.layers}; leave layers out, or train "
                    "one for these"
                )
            object.__setattr__(self, "layers", self.network.layers)

    def _network(self) -> Network:
        given = self.network
        if isinstance(given, str | Path):
            return self.NETWORK.load(Path(given).expanduser())
        wanted = f"a network for {self.METHOD}, of kf.train_editor(lm, facts, {self.METHOD!r}), or the path of its file"
        return checks.instance("network", given, self.NETWORK, wanted)

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Trained":
        """Without a network: nobody publishes one for this model."""
        return cls()

    @property
    def record(self) -> dict:
        """The network by its digest, and what it was trained with."""
        network = self.network
        return {"layers": self.layers, "network": network and network.digest, "source": self.source} | (
            {"training": network.settings} if network else {}
        )

    def check(self, lm: LM) -> None:
        """Raises ValueError without a network, and for one of another model."""
        if self.network is None:
            raise ValueError(
                f"{type(self).__name__} needs a network= that was trained for this model; train one: "
                f"kf.train_editor(lm, facts, {self.METHOD!r}) (kedit-fast train --method {self.METHOD})"
            )
        if self.network.fingerprint != lm.fingerprint:
            raise ValueError(
                f"network= was trained for {self.network.fingerprint} and the model is {lm.fingerprint}; train one for "
                f"this model (kedit-fast train --method {self.METHOD}), or open the model it was trained for"
            )
        super().check(lm)

    def besides(self, fact: Fact) -> list[Fact]:
        """Nothing."""
        return []

    def write(self, work: Work) -> Written:
        """The factors of all facts in one sweep forth and back, and what the network makes of them."""
        lm, network = work.lm, self.network
        assert network is not None
        if phrased := sum(bool(fact.phrasings) for fact in work.facts):
            warn(
                f"phrasings of {counted(phrased, 'fact')} are not read: a trained editor reads a fact's prompt alone, "
                "its network has learned what other wordings are",
            )
        seen = {subject_digest(fact) for fact in work.facts} & set(network.provenance.get("subjects", ()))
        if seen:
            warn(
                f"{counted(len(seen), 'subject')} of these facts: the network was trained on them, so how well they "
                "are written says nothing of others",
            )
        tasks = [edit_task(lm, fact, i if work.independent else 0) for i, fact in enumerate(work.facts)]
        packs = gradient_packs(lm, tasks, network.places)
        made = network.deltas((pack.factors for pack in packs), work.independent)
        changes = [
            WeightChange(layer, type(delta)(*(storable(x, lm.dtype) for x in vars(delta).values())), role, owners)
            for (layer, role), (delta, owners) in made.items()
        ]
        about = {"network": {"digest": network.digest} | network.provenance | {"subjects": len(seen)}}
        loss = task_losses(replace(lm, edits=(*lm.edits, Edit("in making", {}, "", work.facts, tuple(changes)))), tasks)
        return Written(changes, Found.of([1] * len(tasks), loss, loss), about=about)
