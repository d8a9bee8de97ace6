"""Unlearning by gradient: the down projections of a few layers are fine-tuned until old answers are not said any more.

    L = mean over forgotten answers of f(answer) + retain_weight · mean over kept answers of -log p

A fact's target_true is forgotten (unless target_new says the same) and its target_new is kept, or taught: a fact with
target_true alone is one to forget, one with target_new alone one to keep (``forgetting``, ``keeping``); each in its
phrasings too. f by ``loss``, formulas in ``jobs/losses.py``:

    npo       negative preference optimization: Zhang et al. 2024, arXiv:2404.05868
    bounded   -log(1 - p)
    ga        gradient ascent; with facts to keep it is graddiff: Maini et al. 2024 (TOFU), arXiv:2401.06121
    rmu       representation misdirection: Li et al. 2024 (WMDP), arXiv:2403.03218
    entropy   the max-entropy defense: Patil et al. 2024, arXiv:2309.17410: no layer's logit lens knows the answer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kedit_fast.basics import checks
from kedit_fast.editors.editor import Editor, Work, Written
from kedit_fast.editors.finetune import Ft, of_layer
from kedit_fast.edits.changes import weight_changes
from kedit_fast.edits.deltas import Delta, Dense, storable
from kedit_fast.facts.fact import Fact, place
from kedit_fast.facts.forgetting import is_forgotten
from kedit_fast.facts.subjects import folded
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.jobs.finetune import TuneSettings, TuneTask, fine_tune
from kedit_fast.jobs.losses import Ascent, Bounded, Entropy, Loss, Misdirection, Preference
from kedit_fast.model.lm import LM, takes_lm

LOSSES: dict[str, tuple[str, ...]] = {  # and the settings that only this one reads
    "npo": ("beta",),
    "bounded": (),
    "ga": (),
    "graddiff": (),
    "rmu": ("alpha", "steering_coeff", "layer_id", "seed"),
    "entropy": ("lens_layers",),
}


@dataclass(frozen=True)
class Unlearn(Editor):
    """Unlearning: tunes a few layers until the old answers are not said, and others are.

    Hyper-parameters under their published names; ``edit`` does the work.

    layers: whose down projections are tuned together; num_steps: passes over all answers, an Adam step for each
        ``batch_size`` of them; both kinds are spread evenly over the batches
    loss: one of npo, bounded, ga, graddiff (which asks for facts to keep), rmu, entropy
    retain_weight: what the kept answers weigh, as a whole, against the forgotten ones (of rmu times alpha)
    beta: npo's; alpha, steering_coeff, layer_id, seed: rmu's, the weight of kept rows, the length of the direction that
        the others are drawn to, and the layer where both are read (None: the last of ``layers``)
    lens_layers: of entropy; none: all from the first tuned one on
    source: where these settings come from, for whoever reads the edit
    """

    layers: tuple[int, ...] = ()
    loss: str = "npo"
    num_steps: int = 25
    lr: float = 5e-4
    batch_size: int = 128
    retain_weight: float = 1.0
    beta: float = 0.1
    alpha: float = 1200.0
    steering_coeff: float = 6.5
    layer_id: int | None = None
    lens_layers: tuple[int, ...] = ()
    seed: int = 0
    source: str = "given"

    METHOD: ClassVar = "unlearn"
    POSITIVE: ClassVar = ("num_steps", "lr", "batch_size", "beta")
    ALG_NAMES: ClassVar = {"UNLEARN": {}}
    STAGES: ClassVar = ("unlearning",)
    NEEDS_SUBJECT: ClassVar = False
    NEEDS_NEW: ClassVar = False
    NEEDS_CONTEXTS: ClassVar = False
    mom2_adjustment: ClassVar = False
    GENTLER: ClassVar[str] = "tune in fewer num_steps or with a smaller lr"
    UNREAD: ClassVar = Ft.UNREAD

    def __post_init__(self):
        super().__post_init__()
        checks.choice("loss", self.loss, tuple(LOSSES))
        for loss, names in LOSSES.items():
            for name in names if loss != self.loss else ():
                if (value := getattr(self, name)) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} {value}: loss {self.loss!r} does not read it, {loss!r} does; leave it out"
                    )

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Unlearn":
        """Derived settings, fine-tuning's layer and rate; none are published for single matrices.

        On SmolLM2-135M, ten facts to forget and ten to keep, ten others held out (``verify_forgotten``): npo leaves
        P(old) 0.09 of 0.70 and 0.06 of 0.65 on paraphrases, and bounded, which stops after 16 of 25 steps, 0.004 and
        0.14. Kept facts are at 0.99, those held out fall from 0.90 to 0.37 and 0.44: keep what matters, or lower lr.
        Weights rounded to 8 or 4 bits bring nothing back. After bounded the old answers are still chosen among four
        (10 of 10, by npo 5), and learned again in 9 steps, where new ones take over 12, as npo's old ones do.
        """
        return cls(**of_layer({}, lm))

    def check(self, lm: LM) -> None:
        """Raises ValueError, before any work, for layers that the model lacks, or where tuning does nothing."""
        super().check(lm)
        read = [*self.lens_layers, *([] if self.layer_id is None else [self.layer_id])]
        checks.layers("lens_layers, layer_id", read, lm.n_layers, empty=True)
        if below := [layer for layer in read if layer < min(self.layers)]:
            raise ValueError(
                f"lens_layers, layer_id: layers {below} lie below the first tuned one, {min(self.layers)}, and nothing "
                "changes there; expected that one or higher"
            )
        if self.loss == "rmu" and self.layer_id is not None and self.layer_id < max(self.layers):
            above = [layer for layer in self.layers if layer > self.layer_id]
            raise ValueError(
                f"layer_id {self.layer_id}: layers {above} lie above it and would not change; leave them out, or "
                "layer_id (the last of layers)"
            )

    def check_facts(self, facts: Sequence[Fact]) -> None:
        """Raises ValueError where nothing is to be forgotten, an answer to be forgotten and kept, or graddiff has
        nothing to keep."""
        if not any(map(is_forgotten, facts)):
            raise ValueError(
                "nothing to forget: no fact has a target_true that is not its target_new; kf.forgetting(facts), "
                "or --forget OLD, makes such facts"
            )
        kept = {(*place(fact), folded(fact.target_new)) for fact in facts if fact.target_new is not None}
        for fact in filter(is_forgotten, facts):
            if (*place(fact), folded(str(fact.target_true))) in kept:
                raise ValueError(
                    f"fact {fact.label} is to forget {fact.target_true!r}, and another one of the same prompt to keep "
                    "it; leave one out"
                )
        if self.loss == "graddiff" and not any(fact.target_new is not None for fact in facts):
            raise ValueError(
                "loss 'graddiff' needs facts to keep, those with a target_new: facts + kf.keeping(others); or take "
                "'ga', which needs none"
            )

    def write(self, work: Work) -> Written:
        """All answers together: a dense Δ of each layer; rmu's direction alone is random.

        Differs: the published code trains all weights (RMU those of three layers), in epochs over a random order; here
        down projections are tuned in the order of the facts, and Δ and Adam's state are fp32 beside a narrower model.
        """
        lm = work.lm
        settings = TuneSettings(
            layers=self.layers, lr=self.lr, steps=self.num_steps, batch_size=self.batch_size, loss=self._loss(lm)
        )
        tuned = fine_tune(lm, self._tasks(lm, work.facts), settings)
        deltas: dict[int, Delta] = {i: Dense(storable(delta, lm.dtype)) for i, delta in sorted(tuned.deltas.items())}
        return Written(
            weight_changes(deltas),
            layers={
                i: {"norm": Dense(delta).norm(), "largest": delta.abs().max().item()}
                for i, delta in tuned.deltas.items()
            },
            about={"steps": len(tuned.losses), "losses": [round(loss, 5) for loss in tuned.losses]},
        )

    def _tasks(self, lm, facts) -> list[TuneTask]:
        """Both kinds side by side; their factors make the mean over all of them the loss."""
        prompts = [one for fact in facts for one in (fact, *fact.phrased())]
        old = [(one, one.target_true, False) for one in prompts if is_forgotten(one)]
        new = [(one, one.target_new, True) for one in prompts if one.target_new is not None]
        n = len(old) + len(new)
        weight = {False: n / len(old), True: self.retain_weight * n / max(1, len(new))}
        spread = sorted(
            ((at / len(some), *one) for some in (old, new) for at, one in enumerate(some)), key=lambda x: x[0]
        )
        tasks = []
        for _, one, answer, keep in spread:
            prompt, target = fact_tokens(lm.tokenizer, one).ids, fact_answer(lm.tokenizer, one, answer)
            tasks.append(TuneTask(list(prompt), target, one.label, keep, weight[keep]))
        return tasks

    def _loss(self, lm) -> Loss:
        if self.loss == "npo":
            return Preference(self.beta)
        if self.loss == "bounded":
            return Bounded()
        if self.loss == "rmu":
            layer = max(self.layers) if self.layer_id is None else self.layer_id
            return Misdirection(layer, self.steering_coeff, self.alpha, self.seed)
        if self.loss == "entropy":
            return Entropy(self.lens_layers or tuple(range(min(self.layers), lm.n_layers)))
        return Ascent()
