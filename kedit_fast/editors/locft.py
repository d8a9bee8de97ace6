"""LocFT-BF: localized fine-tuning, breadth first (Yang et al. 2025, Fine-tuning Done Right in Model Editing,
arXiv:2509.22072).

Fine-tuning as everybody else does it: passes over all facts in batches, reshuffled each time, instead of one fact after
the other until it is said; one matrix in a layer that suits the model; and the end token behind each target, so that
the model stops there. The loss and Adam are ``Ft``'s; a batch below 0.01 nats moves nothing, and a pass whose mean is
below is the last one.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kedit_fast.editors.finetune import Ft, Known, check_down, of_layer
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.finetune import TuneSettings, TuneTask
from kedit_fast.model.lm import LM, takes_lm


@dataclass(frozen=True)
class LocFt(Ft):
    """LocFT-BF: fine-tuning of one well-chosen layer, passes over batches of all facts, to the end token.

    ``Ft``'s hyper-parameters, and

    batch_size: facts in a step; of no more facts than that every pass is one step, and nothing is random
    append_end: whether the model's end token is trained as the target's last token (published: it is)
    shuffle_seed: of the order of the facts in each pass
    """

    batch_size: int = 100
    append_end: bool = True
    shuffle_seed: int = 0

    METHOD: ClassVar = "locft-bf"
    ALG_NAMES: ClassVar = {"LocFT-BF": {}, "LocFT": {}}
    IN_FILES: ClassVar = {
        "layer": lambda value: {"layers": (value,)},
        "rewrite_module": lambda value: _only_down(value),
    }

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "LocFt":
        """Published layer where there is one for this model, else derived settings; ``source`` says which.

        Derived: a layer at a tenth of the depth, ``Ft``'s rate, and batches of 25, so that a hundred facts are more
        than one step a pass. On SmolLM2-135M, 100 facts in 25 passes: batches of 100 at layer 5 say 62 of them (S 40),
        batches of 25 all (S 62, perplexity + 12 %), at layer 3 97 (S 68, + 7 %), at layer 21 96 (S 49, + 15 %).
        (Published are layers at 0.21 and 0.69 of the depth, and batches of 100 for thousands of facts; of Mistral a
        whole layer, which is no one matrix.)
        """
        return cls(**of_layer(PUBLISHED, lm, layers=(round(0.1 * lm.n_layers),), batch_size=25))

    @property
    def method(self) -> str:
        """Its own name, whatever else is set."""
        return self.METHOD

    def check(self, lm: LM) -> None:
        """Raises ValueError for a tokenizer that names no end token."""
        super().check(lm)
        if self.append_end and lm.tokenizer.eos_token_id is None:
            raise ValueError(
                "this tokenizer names no end token (eos_token), which LocFT-BF trains behind each target; set one, or "
                "append_end to False"
            )

    def task(self, lm: LM, fact: Fact) -> TuneTask:
        """The target and the end token after the prompt."""
        task = super().task(lm, fact)
        return replace(task, target=[*task.target, lm.tokenizer.eos_token_id]) if self.append_end else task

    def _tune_settings(self) -> TuneSettings:
        return replace(super()._tune_settings(), shuffle=self.shuffle_seed)


def _only_down(value: Any) -> dict:
    """Of a file's module: nothing, where it is a down projection. Raises ValueError."""
    check_down(value, "it")
    return {}


# lr 5e-4, batches of 100, 25 passes for both.
PUBLISHED = {
    known.name: known for known in (Known("Meta-Llama-3-8B-Instruct", 31, 22), Known("Qwen2.5-7B-Instruct", 27, 6))
}
