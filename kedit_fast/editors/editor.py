"""What an editor does around its paper's algorithm: checks before any work, contexts, statistics, the Edit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from torch import Tensor

from kedit_fast import __version__
from kedit_fast.basics import checks
from kedit_fast.basics.parts import Checkpoint, Keep, check_checkpoint, digest, keep_json, make_now
from kedit_fast.basics.progress import stages
from kedit_fast.editors.hyperparameters import Settings
from kedit_fast.editors.written import ASKING, with_written
from kedit_fast.edits.chain import chain
from kedit_fast.edits.changes import weight_changes
from kedit_fast.edits.deltas import Delta
from kedit_fast.edits.edit import Edit
from kedit_fast.model.lm import takes_lm
from kedit_fast.moments.second_moment import STAGES as MEASURING


@dataclass(frozen=True)
class Written:
    """What an editor computed for n facts; the fields of ``Edit`` that are its own.

    notes: for the provenance, of each layer; about: further entries of it
    owner: [r] the fact that each factor of each delta belongs to, for independent edits
    """

    deltas: dict[int, Delta]
    values: Tensor
    keys: dict[int, Tensor]
    notes: dict[int, object]
    about: dict = field(default_factory=dict)
    owner: Tensor | None = None


@dataclass(frozen=True)
class Editor(Settings):
    """An editor that locates facts at the subject's last token: ROME, MEMIT and their kin.

    A subclass names its ``METHOD`` and says how contexts are made (``_contexts``) and facts written (``_write``).
    """

    METHOD: ClassVar[str] = ""
    STAGES: ClassVar[tuple[str, ...]] = ()

    @takes_lm
    def edit(
        self,
        lm,
        facts: Sequence,
        *,
        moments=None,
        corpus=None,
        contexts=None,
        previous: Edit | Sequence[Edit] | None = None,
        independent: bool = False,
        checkpoint=None,
        seed: int = 0,
    ) -> Edit:
        """One Edit that writes all facts. Nothing is changed: use ``lm.with_edit(edit)`` or ``edit.apply(model)``.

        In the end the edited model is asked for each fact: ``provenance["written"]`` has P(new), what the model says
        and whether that is the new answer; facts that are not written are warned of (``written.with_written``).

        moments: {layer: SecondMoment}, or corpus: text to measure them over ("self": sampled from the model); neither
            is read with mom2_adjustment=False
        contexts: groups of templates [["{}"], ["... {}", ...]]; None generates them from ``seed``
        previous: an edit, or several in order, that this one is made on top of (as those that ``lm`` carries); apply
            all, in order: ``provenance["on_top_of"]`` says which. A fact of them that gets another target is warned of
        independent: each fact as an edit of its own that sees no other, all computed together; ``edit.only(i)`` takes
            one, ``evaluate`` asks each fact under its own. Facts may then contradict each other
        checkpoint: a folder that keeps finished parts; a run that was killed goes on there when called again with the
            same arguments, and ends with the same bits. To be deleted once the edit is saved

        Raises ValueError, before any work, for facts that contradict each other, lack a target or are too long for the
        model, layers out of range, missing or foreign statistics, a checkpoint of other work; later, naming the fact,
        where a loss or a residual turns NaN.
        """
        seed = checks.seed("seed", seed)
        if checkpoint is not None:
            check_checkpoint(checkpoint)
        lm, facts, groups = self._prepared(lm, facts, contexts, previous, independent)
        with stages(*(MEASURING if moments is None and self.mom2_adjustment else ()), *self.stages(groups)):
            moments = self.moments_of(lm, moments, corpus)
            keep = self._keep(checkpoint, lm, facts, groups or seed, moments, independent)
            groups = groups or keep_json(keep, "contexts", lambda: self._contexts(lm, seed))
            written = self._write(lm, facts, groups, moments, independent, keep)
            edit = Edit(
                method=self.METHOD, hparams=asdict(self), fingerprint=lm.fingerprint, facts=tuple(facts),
                changes=weight_changes(written.deltas, written.owner),
                values=written.values.cpu(), keys=written.keys, contexts=groups,
                provenance={"version": __version__, "layers": written.notes} | written.about | chain(lm),
            )  # fmt: skip
            return with_written(lm, edit)

    @classmethod
    def stages(cls, contexts=None) -> tuple[str, ...]:
        """What ``edit`` does once it has statistics, as its progress calls it."""
        return (*(("sampling contexts",) if contexts is None else ()), *cls.STAGES, ASKING)

    def _keep(self, folder, lm, facts, contexts, moments, independent) -> Keep:
        """The checkpoint's folder, or none."""
        if folder is None:
            return make_now
        return Checkpoint(folder, {
            "method": self.METHOD, "hparams": asdict(self), "version": __version__, "model": lm.fingerprint,
            "dtype": str(lm.dtype), "device": lm.device.type, "memory": lm.memory, "weights": lm.source.name,
            "independent": independent, "number of facts": len(facts),
            "facts": digest(*(fact.to_record() for fact in facts)), "contexts": contexts,
            "statistics": {layer: digest(moment.matrix) for layer, moment in moments.items()}, **chain(lm),
        })  # fmt: skip

    def _contexts(self, lm, seed: int) -> list[list[str]]:
        """Groups of templates, sampled from the model."""
        raise NotImplementedError

    def _write(self, lm, facts, groups, moments, independent: bool, keep: Keep) -> Written:
        """The paper."""
        raise NotImplementedError
