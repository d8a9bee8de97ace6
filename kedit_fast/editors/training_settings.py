"""What trainings of editors' networks share: their settings, and what a kind of them says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kedit_fast.basics import checks
from kedit_fast.editors.hyperparameters import Hyperparameters
from kedit_fast.editors.networks import Network
from kedit_fast.editors.training_step import ANSWER, Weights
from kedit_fast.facts.fact import ANSWERED
from kedit_fast.model.lm import LM


@dataclass(frozen=True)
class Training(Hyperparameters):
    """What trained editors' trainings share, under MEND's published names.

    layers: whose MLP matrices are changed, all of them (published: the last three)
    lr: Adam's, of the networks; lr_lr: of the step sizes; grad_clip: of the gradient's norm, all together
    cedit, cloc: the weights of the two losses, also in the loss that ends the training early
    keeps: of which kinds a fact's prompts are that must not change, by turns: its "neighborhood" and "same_subject"
        prompts, and, "answered", its own with the new answer behind, so that text goes on from there as before.
        kept_tokens: that are compared behind each, along what the model goes on with (published: one)
    batch_size: facts a step; max_iters: steps at most; val_interval: steps between two looks at the facts held out, and
        parts of the run that are kept; val_facts: of them, at most; early_stop_patience: steps without a better look
    """

    layers: tuple[int, ...] = ()
    lr: float = 1e-6
    lr_lr: float = 1e-4
    cedit: float = 0.1
    cloc: float = 1.0
    grad_clip: float = 100.0
    keeps: tuple[str, ...] = ANSWERED
    kept_tokens: int = 1
    batch_size: int = 10
    max_iters: int = 100_000
    val_interval: int = 500
    val_facts: int = 100
    early_stop_patience: int = 20_000
    source: str = "given"

    METHOD: ClassVar[str] = ""
    NETWORK: ClassVar[type[Network]] = Network
    CHECKS: ClassVar = {"keeps": lambda value: checks.choices("keeps", value, (*ANSWERED, ANSWER))}
    TOGETHER: ClassVar[bool] = False  # the facts of a step are one edit
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "lr", "grad_clip", "batch_size", "max_iters", "val_interval", "val_facts", "early_stop_patience", "kept_tokens",
    )  # fmt: skip

    @classmethod
    def for_model(cls, lm: LM) -> "Training":
        """Settings for a model; ``source`` says which."""
        raise NotImplementedError

    @classmethod
    def derived(cls, lm: LM) -> dict[str, Any]:
        """The last three layers, and rates for a thousand steps, see ``bench/results/wordings.md``."""
        layers = tuple(range(max(0, lm.n_layers - 3), lm.n_layers))
        return {"layers": layers, "source": f"derived for {lm.n_layers} layers, d_ff {lm.d_ff}"} | FOR_MINUTES

    def for_route(self) -> "Training":
        """The same for edits that are to stand behind a route (``kf.routed``), which neighbors pass by: the subject's
        other relations must not change, and neither how text goes on, behind these and behind the new answer.

        MEND on SmolLM2, 450 CounterFact facts, 480 steps in 10 minutes of one core; 100 facts of other subjects, each
        behind a route by name (``python -m bench trained``): P(new) 0.98 and 0.56 on paraphrases (MEMIT: 0.93, 0.13),
        84 % of the subjects' other answers stay (75 %), text and neighbors as they were. Kept for one token alone such
        edits write the answer over and over; kept with the neighbors, paraphrases get 0.36.
        """
        return replace(self, keeps=("same_subject", ANSWER), kept_tokens=8)

    def begin(self) -> dict[str, float]:
        """What a constraint's ascent goes on from."""
        return {}

    def weights(self, dual: Mapping[str, float]) -> Weights:
        """Of the losses of a step."""
        return Weights(self.cedit, self.cloc)

    def after_step(self, dual: dict[str, float], kl: float) -> None:
        """What a step's KL, in nats, changes."""

    def after_validation(self, dual: dict[str, float], success: float) -> None:
        """What the share of held-out facts that are written changes."""


# A thousand steps instead of the published hundred thousand, so larger ones. MEND on SmolLM2, 300 facts of CounterFact,
# 100 steps of 10 (90 s of one core), 30 other subjects: exact answers to paraphrases and KL after a neighbor are 70 %,
# 0.36 nats with lr 1e-3, 43 %, 0.11 with 3e-4. Untrained: 13 %, 1.0 with edit_lr 3e-4; 75 %, 7.4 with 1e-3.
FOR_MINUTES = {
    "lr": 1e-3, "lr_lr": 1e-5, "edit_lr": 3e-4, "max_iters": 1_000, "val_interval": 50, "early_stop_patience": 300,
}  # fmt: skip
