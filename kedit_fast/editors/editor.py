"""What every editor is, and what is done around its paper's algorithm: checks before any work, contexts, statistics,
parts that are kept, the Edit.

A new editor is one file: a frozen dataclass of its hyper-parameters whose ``write`` gives what it changes, and a line
in ``basics/catalog.py``. What it needs it says in class variables; what it checks besides, in ``check`` and
``check_moments``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from kedit_fast import __version__
from kedit_fast.basics import checks
from kedit_fast.basics.parts import Keep, keep_json
from kedit_fast.basics.progress import stages
from kedit_fast.editors.contexts import BARE, AnyContexts, checked_contexts
from kedit_fast.editors.hyperparameters import Hyperparameters
from kedit_fast.editors.written import ASKING, with_growth, with_written
from kedit_fast.edits.chain import chain, under, warn_of_overwritten
from kedit_fast.edits.changes import Change
from kedit_fast.edits.edit import Edit
from kedit_fast.edits.routes import Route
from kedit_fast.facts.fact import Fact, check_facts
from kedit_fast.facts.forgetting import judged_by
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.corpus import AnyCorpus
from kedit_fast.moments.given import digests, factor_bytes, moments_for
from kedit_fast.moments.second_moment import STAGES as MEASURING
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.sweep.kept import Checkpoint, asked_of, begun, check_run, fitting


class Work(NamedTuple):
    """What an editor is given. lm: with the edits below on it; contexts: groups of templates, the bare prompt first;
    moments: {layer: SecondMoment}, none where the editor reads none; independent: each fact as an edit of its own;
    keep: makes a part of the work, or finds it"""

    lm: LM
    facts: tuple[Fact, ...]
    contexts: list[list[str]]
    moments: dict[int, SecondMoment]
    independent: bool
    keep: Keep


class Found(NamedTuple):
    """How each fact's value, or weight, was found: [n] lists of steps, last loss, and P(new) with it in place."""

    steps: list[int]
    loss: list[float]
    p_new: list[float]

    @classmethod
    def of(cls, steps, loss: Tensor, nll: Tensor) -> "Found":
        """Rounded as people read it. steps, loss, nll: [n]"""
        p_new = (-nll.double()).exp()
        return cls([int(n) for n in steps], *([round(x, 5) for x in each.tolist()] for each in (loss.double(), p_new)))


@dataclass(frozen=True)
class Written:
    """What an editor gives: the fields of ``Edit`` that are its own.

    found: where values or weights were optimized; layers: {layer: what is to be noted of it}; about: further entries of
    the provenance; route: of a routed edit
    """

    changes: Sequence[Change]
    found: Found | None = None
    values: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    layers: dict[int, dict] = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    route: Route | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Editor(Hyperparameters):
    """An editor: its fields are its hyper-parameters, under their published names.

    METHOD: its name in files; STAGES: what ``write`` does, as its progress calls it
    NEEDS_SUBJECT, NEEDS_NEW: facts without one, or without a target_new, are refused; NEEDS_CONTEXTS: prompts are set
        in contexts
    UNREAD: {argument of ``edit``, or ``layers``: why it is refused}, for what would have no effect
    GENTLER: what moves the weights less, for the warning of an edit that moves them far
    mom2_adjustment: whether second moments are read (a field, where that can be chosen)
    """

    METHOD: ClassVar[str] = ""
    STAGES: ClassVar[tuple[str, ...]] = ()
    NEEDS_SUBJECT: ClassVar[bool] = True
    NEEDS_NEW: ClassVar[bool] = True  # a fact without it has a target_true, which is to be forgotten
    NEEDS_CONTEXTS: ClassVar[bool] = True
    FLAT_CONTEXTS: ClassVar[bool] = False  # every context weighs the same, whatever group it was given in
    UNREAD: ClassVar[dict[str, str]] = {}
    GENTLER: ClassVar[str] = "edit fewer facts at once"
    EXPERTS: ClassVar[bool] = False  # whether the class itself (none that derives from it) edits mixtures of experts
    if TYPE_CHECKING:  # fields, or class variables

        @property
        def mom2_adjustment(self) -> bool: ...

        @property
        def source(self) -> str: ...

    @takes_lm
    def edit(
        self,
        lm: LM,
        facts: Fact | Iterable[Fact],
        *,
        moments: Mapping[int, SecondMoment] | None = None,
        corpus: AnyCorpus | None = None,
        contexts: AnyContexts | None = None,
        previous: Edit | Iterable[Edit] | None = None,
        independent: bool = False,
        checkpoint: Checkpoint = None,
        seed: int = 0,
    ) -> Edit:
        """One Edit that writes all facts. Nothing is changed: use ``lm.with_edit(edit)`` or ``edit.apply(model)``.

        In the end the edited model is asked for each fact: ``provenance["written"]`` has P(new), what the model says
        and whether that is the new answer; facts that are not written are warned of (``written.with_written``).
        ``provenance["found"]``: steps, loss and P(new) of each fact where it was optimized.

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
        model, layers out of range, missing or foreign statistics, a checkpoint of other work, and for what this editor
        does not read; later, naming the fact, where a loss or a residual turns NaN.
        """
        seed = checks.seed("seed", seed)
        self.refuse(moments=moments, corpus=corpus)
        asking: dict[str, Any] = {"contexts": contexts, "independent": independent, "checkpoint": checkpoint}
        lm, facts = self.check_edit(lm, facts, previous=previous, **asking)
        warn_of_overwritten(lm.edits, facts)
        groups, checkpoint = self._groups(contexts), check_run(checkpoint)
        with stages(*(MEASURING if moments is None and self.mom2_adjustment else ()), *self.stages(groups)):
            moments = self.moments_of(lm, moments, corpus)
            asked = partial(self._asked, lm, facts, groups or seed, moments, independent)
            with begun(checkpoint, asked) as keep:
                return fitting(lm, keep, lambda lm: self._made(lm, facts, groups, moments, independent, keep, seed))

    def check_edit(
        self,
        lm: LM,
        facts: Fact | Iterable[Fact],
        *,
        contexts: AnyContexts | None = None,
        previous: Edit | Iterable[Edit] | None = None,
        independent: bool = False,
        checkpoint: Checkpoint = None,
    ) -> tuple[LM, list[Fact]]:
        """What ``edit`` refuses but for statistics, which take time to measure; gives the model with the earlier edits
        on it, and the facts."""
        independent = checks.flag("independent", independent)
        self.refuse(contexts=contexts, independent=independent, checkpoint=checkpoint)
        check_run(checkpoint)
        if not self.takes_experts(lm):
            raise ValueError(
                f"{self.method} has no form for the mixtures of experts of a {lm.config.model_type} model; kf.Memit "
                "(--method memit) edits all experts of a layer at once"
            )
        self.check(lm)
        facts = checked_facts(facts, independent, self.NEEDS_SUBJECT, self.NEEDS_NEW)
        self.check_facts(facts)
        check_lengths(lm, facts, self._groups(contexts) or [[BARE]])
        check_lengths(lm, [one for fact in facts for one in self.besides(fact)], [[BARE]])
        return under(lm, previous), facts

    def _made(self, lm, facts, groups, moments, independent: bool, keep: Keep, seed: int) -> Edit:
        """The edit, of checked arguments; groups: None for contexts that have to be sampled."""
        groups = groups or keep_json(keep, "contexts", lambda: self.sampled_contexts(lm, seed))
        written = self.write(Work(lm, tuple(facts), groups, moments, independent, keep))
        about = {"version": __version__, "layers": written.layers}
        about |= {} if written.found is None else {"found": written.found._asdict()}
        edit = Edit(
            method=self.method, hparams=self.record, fingerprint=lm.fingerprint, facts=tuple(facts),
            changes=tuple(written.changes), values=None if written.values is None else written.values.cpu(),
            keys=written.keys, contexts=groups if self.NEEDS_CONTEXTS else [],
            provenance=about | written.about | chain(lm), route=written.route, statistics=written.statistics,
        )  # fmt: skip
        return with_growth(lm, with_written(lm, edit), self.GENTLER)

    @property
    def method(self) -> str:
        """The editor's name, as files have it."""
        return self.METHOD

    @property
    def record(self) -> dict:
        """Its hyper-parameters, as an edit and a checkpoint hold them: JSON values."""
        return asdict(self)

    @classmethod
    def stages(cls, contexts: AnyContexts | None = None) -> tuple[str, ...]:
        """What ``edit`` does once it has statistics, as its progress calls it."""
        return (*(("sampling contexts",) if cls.NEEDS_CONTEXTS and contexts is None else ()), *cls.STAGES, ASKING)

    def moments_of(
        self, lm: LM, moments: Mapping[int, SecondMoment] | None, corpus: AnyCorpus | None
    ) -> dict[int, SecondMoment]:
        """The statistics of each layer; none without ``mom2_adjustment``."""
        ask = (self.layers, moments, corpus, self.is_regularized(), self.solve_bytes(lm))
        found = moments_for(lm, *ask) if self.mom2_adjustment else {}
        self.check_moments(found)
        return found

    # ---- what an editor says of itself: where the base raises, each gives its own (contexts, if it needs them)

    @classmethod
    def for_model(cls, lm: LM) -> "Editor":
        """Settings for a model, published ones where there are some; its ``source`` says which."""
        raise NotImplementedError

    def check(self, lm: LM) -> None:
        """Raises ValueError, before any work, for settings that do not fit the model."""
        self.check_layers(lm)

    def besides(self, fact: Fact) -> list[Fact]:
        """What is read of a fact besides its prompt, as facts: its phrasings."""
        return list(fact.phrased())

    def check_facts(self, facts: Sequence[Fact]) -> None:
        """Raises ValueError, before any work, for facts that are none for this editor."""

    def is_regularized(self) -> bool:
        """Whether statistics of fewer tokens than C has rows will do: something else stands on its diagonal."""
        return bool(getattr(self, "regularizer", 0.0))

    def solve_bytes(self, lm: LM) -> int:
        """Bytes on the host that layers are solved in, beside their statistics: of one factor."""
        return factor_bytes(lm)

    def check_moments(self, moments: Mapping[int, SecondMoment]) -> None:
        """Raises ValueError for statistics that this editor cannot work with."""

    def sampled_contexts(self, lm: LM, seed: int) -> list[list[str]]:
        """Groups of templates, sampled from the model."""
        raise NotImplementedError

    def write(self, work: Work) -> Written:
        """The paper."""
        raise NotImplementedError

    # ---- around it

    def takes_experts(self, lm: LM) -> bool:
        """Whether the model is no mixture of experts, or one that it can edit."""
        return lm.n_experts == 1 or not tuple(self.layers) or bool(vars(type(self)).get("EXPERTS"))

    def refuse(self, **given: Any) -> None:
        """Raises ValueError for what would have no effect: it would look like a setting."""
        for name, value in given.items():
            if name in self.UNREAD and value is not None and value is not False:
                raise ValueError(f"{name} = {checks.shown(value)}: {self.UNREAD[name]}")

    def _groups(self, contexts) -> list[list[str]] | None:
        """Contexts as groups; None where they are to be sampled."""
        if not self.NEEDS_CONTEXTS:
            return [[BARE]]
        groups = None if contexts is None else checked_contexts(contexts)
        return [[t for group in groups for t in group]] if groups and self.FLAT_CONTEXTS else groups

    def _asked(self, lm, facts, contexts, moments, independent) -> dict:
        """What an edit depends on, for the manifest of its checkpoint."""
        return asked_of(
            lm, f"edit by {self.method}", facts, hparams=self.record, independent=independent, contexts=contexts,
            statistics=digests(moments),
        )  # fmt: skip


def checked_facts(facts, independent: bool = False, need_subject: bool = True, need_new: bool = True) -> list[Fact]:
    """Facts an editor can write: targets and subjects present, no contradictions unless each is an edit of its own. One
    Fact is a list of one."""
    facts = check_facts(facts, need_new=need_new, need_subject=need_subject, together=not independent)
    for fact in facts:
        judged_by(fact)
    return facts


def check_lengths(lm, facts: Sequence[Fact], groups: list[list[str]]) -> None:
    """Raises ValueError where a fact in one of its contexts, with its new target behind it, is too long for the model
    or has characters that the tokenizer drops. Tokenizes all of them."""
    for fact in facts:
        answer = fact.target_new or fact.target_true  # of a prompt that is kept nothing follows
        target = fact_answer(lm.tokenizer, fact, answer) if answer else [0]
        for template in (t for group in groups for t in group):
            whose = f"fact {fact.label} in context {template!r}"
            try:
                tokens = fact_tokens(lm.tokenizer, fact, template).ids
            except ValueError as error:
                raise ValueError(f"{whose}: {error}") from error
            lm.check_length(len(tokens) + len(target) - 1, whose)  # the target's last token is predicted, not read
