"""FT and FT-L: fine-tuning of one layer's down projection, the baselines of the ROME and MEMIT papers.

Ft moves the weight by Adam until the model says the new answers; FtL besides holds every entry within ε of where it
began (Zhu et al. 2020, Modifying Memories in Transformer Models, arXiv:2012.00363):

    W <- Adam(W, L),  then for FT-L  W <- clamp(W, W_0 - ε, W_0 + ε)
    L = mean over facts of the mean over target tokens of -log p(token)

Each of a fact's phrasings is one more fact to that mean. The target is teacher-forced: each of its tokens is read after
the ones before it. Later tables call that FT-M, and so does ``FtM``, which is Ft where nothing else is asked for. As
published in 2022 all of them were read after the prompt alone, which makes an answer of several tokens unsayable; that
is ``objective_optimization="prompt_last"``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.editors.editor import Editor, Found, Work, Written
from kedit_fast.editors.hyperparameters import published
from kedit_fast.edits.changes import weight_changes
from kedit_fast.edits.deltas import Dense, storable
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.jobs.finetune import TuneSettings, TuneTask, fine_tune
from kedit_fast.model.family import FAMILIES
from kedit_fast.model.lm import LM, takes_lm

OBJECTIVES = ("target_new", "prompt_last")


@dataclass(frozen=True)
class Ft(Editor):
    """Fine-tuning of a few layers' down projections on the facts.

    Hyper-parameters under their published names; ``edit`` does the work.

    layers: tuned together; num_steps: passes over all facts, an Adam step for each ``batch_size`` of them in each
    weight_decay: Adam's L2 term, on the whole weight; kl_factor: published files hold it as 0, and nothing reads it
    norm_constraint: ε, the most that an entry of the weight may move; 0 (in files also false): no bound
    objective_optimization: "target_new" (teacher-forced) or "prompt_last", see above
    source: where these settings come from, for whoever reads the edit
    """

    layers: tuple[int, ...] = ()
    num_steps: int = 25
    lr: float = 5e-4
    weight_decay: float = 0.0
    kl_factor: float = 0.0
    norm_constraint: float = 0.0
    batch_size: int = 128
    objective_optimization: str = "target_new"
    source: str = "given"

    POSITIVE: ClassVar[tuple[str, ...]] = ("num_steps", "lr", "batch_size")
    ALG_NAMES: ClassVar = {"FT": {}, "FT-L": {}, "FT-M": {}}
    STAGES: ClassVar[tuple[str, ...]] = ("fine-tuning",)
    NEEDS_SUBJECT: ClassVar = False  # it reads prompts and targets alone
    NEEDS_CONTEXTS: ClassVar = False
    mom2_adjustment: ClassVar = False
    GENTLER: ClassVar[str] = "tune in fewer num_steps, with a smaller lr or within a norm_constraint"
    UNREAD: ClassVar[dict[str, str]] = dict.fromkeys(
        ("moments", "corpus", "contexts"), "fine-tuning reads prompts and targets alone; leave it out"
    ) | {
        "independent": "a fine-tuned delta is dense, no part of it belongs to one fact; edit the facts one at a time, "
        "each as an edit of its own",
        "checkpoint": "fine-tuning has no finished parts to keep; leave it out",
    }

    def __post_init__(self):
        if self.norm_constraint is False:  # published files have it so
            object.__setattr__(self, "norm_constraint", 0.0)
        super().__post_init__()
        if self.kl_factor:
            raise ValueError(f"kl_factor {self.kl_factor}: fine-tuning has no KL term, published or here; expected 0")
        checks.choice("objective_optimization", self.objective_optimization, OBJECTIVES)

    def _check_rest(self, given):
        """Raises ValueError for a file that trains anything but the down projection: gpt2-xl_attn, and those with
        weight decay, which train whole blocks."""
        if (module := given.get("rewrite_module_tmp")) is not None:
            check_down(module, f"rewrite_module_tmp {module!r}")

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Ft":
        """Published layer where there is one for this model, else derived settings; ``source`` says which.

        Derived: the layer that ROME takes, and a rate that narrow models can learn by. On SmolLM2-135M, ten facts in
        25 steps: layers 5, 8, 16 all say them (P(new) 0.96, 0.96, 0.97) and leave neighbors 104, 68 and 33 % of
        P(true); the last layer, at half the rate, leaves 1 %.
        """
        return cls(**of_layer(PUBLISHED, lm))

    @property
    def method(self) -> str:
        """With a bound it is FT-L."""
        return "ft-l" if self.norm_constraint else "ft"

    def write(self, work: Work) -> Written:
        """All facts together: a dense Δ of each layer; nothing is random. ε is counted from the model with the edits
        below.

        Differs: Δ and Adam's state are fp32 beside a narrower model, where the published code trains W in the model's
        own dtype; the down projection's bias, where there is one, is not trained, because an edit is a Δ of the weight;
        padding cannot enter a loss (the published mask is by the unknown token, which most tokenizers do not pad with).
        """
        lm = work.lm
        prompts = [*work.facts, *(one for fact in work.facts for one in fact.phrased())]
        tasks = [self.task(lm, prompt) for prompt in prompts]
        tuned = fine_tune(lm, tasks, self._tune_settings(), self.projection(work))
        steps, nll = len(tuned.losses), tuned.nll[: len(work.facts)]
        return Written(
            weight_changes({layer: Dense(storable(delta, lm.dtype)) for layer, delta in tuned.deltas.items()}),
            Found.of([steps] * len(work.facts), nll, nll),
            layers={layer: self._described(delta) for layer, delta in sorted(tuned.deltas.items())},
            about={"steps": steps, "losses": [round(loss, 5) for loss in tuned.losses]},
        )

    def projection(self, work: Work) -> Callable[[int, Tensor], Tensor] | None:
        """(layer, gradient [d, d_ff]) -> what Adam takes for it; None: the gradient."""
        return None

    def task(self, lm: LM, fact: Fact) -> TuneTask:
        """What the model is to say: the fact's target after its prompt."""
        prompt = list(fact_tokens(lm.tokenizer, fact).ids)
        return TuneTask(prompt, fact_answer(lm.tokenizer, fact), fact.label)

    def _tune_settings(self) -> TuneSettings:
        return TuneSettings(
            layers=self.layers, lr=self.lr, steps=self.num_steps, weight_decay=self.weight_decay,
            limit=self.norm_constraint or None, batch_size=self.batch_size,
            teacher_forced=self.objective_optimization == "target_new",
        )  # fmt: skip

    def _described(self, delta: Tensor) -> dict:
        size = delta.abs()
        notes = {"norm": Dense(delta).norm(), "largest": size.max().item()}
        if self.norm_constraint:
            # the clamp's bound is ε as the delta's dtype has it
            notes["at_limit"] = (size >= size.new_tensor(self.norm_constraint)).double().mean().item()
        return notes


@dataclass(frozen=True)
class FtL(Ft):
    """``Ft`` with a bound: every entry of the weight stays within ``norm_constraint`` of where it began."""

    norm_constraint: float = 5e-4

    POSITIVE: ClassVar[tuple[str, ...]] = (*Ft.POSITIVE, "norm_constraint")

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "FtL":
        """Published layer and ε where there are some for this model, else derived ones; ``source`` says which.

        Derived: layer 0 as for all published models, ε as wide as gpt2-medium's in proportion to 1 / d_ff. On
        SmolLM2-135M (ε = 0.005), ten facts: P(new) 0.94, against 0.39 with ε = 0.002; 0.02 with gpt2-xl's ε and rate.
        """
        known = published(PUBLISHED_L, lm)
        if known is not None:
            return cls(layers=(known.layer,), norm_constraint=known.eps, source=f"published for {known.name}")
        return cls(layers=(0,), lr=rate(lm), norm_constraint=8 / lm.d_ff, source=derived(lm))


@dataclass(frozen=True)
class FtM(Ft):
    """``Ft`` under the name that tables since EasyEdit's (arXiv:2401.01286) have for the teacher-forced one."""

    METHOD: ClassVar = "ft-m"

    @property
    def method(self) -> str:
        """With a bound it is named so all the same."""
        return self.METHOD

    def check(self, lm: LM) -> None:
        """Raises ValueError for the other objective, which has another name."""
        super().check(lm)
        if self.objective_optimization != "target_new":
            raise ValueError(
                f"objective_optimization {self.objective_optimization!r}: FT-M is teacher-forced, 'target_new'; the "
                "other one is Ft's (--method ft)"
            )


def rate(lm) -> float:
    """A step's change of an output entry is a sum of d_ff terms: the published rate keeps it to gpt2-xl's (6,400), and
    narrower models want more. On SmolLM2-135M (0.0021) ten facts reach P(new) 0.96, at the published rate 0.49."""
    return max(5e-4, 3.2 / lm.d_ff)


def derived(lm) -> str:
    return f"derived for {lm.n_layers} layers, d_ff {lm.d_ff}"


def of_layer(table: "dict[str, Known]", lm, **derived_too: Any) -> dict[str, Any]:
    """Settings: the layer that was published for a model, else ROME's with ``rate``, and which of the two it is.

    derived_too: settings where nothing was published, over those
    """
    known = published(table, lm)
    if known is not None:
        return {"layers": (known.layer,), "source": f"published for {known.name}"}
    return {"layers": (lm.n_layers // 6,), "lr": rate(lm), "source": derived(lm)} | derived_too


def check_down(module, what: str) -> None:
    """Raises ValueError for the path of another module than a down projection; what: says it, as the file has it."""
    down = {family.mlp_down for family in FAMILIES.values()}
    if not any(str(module).removesuffix(".weight").endswith(f".{name}") for name in down):
        raise ValueError(
            f"{what} is no down projection, and fine-tuning here is of that alone; expected a path that ends in one of "
            f"{sorted(down)}"
        )


class Known(NamedTuple):
    """What was published for a model. v_loss_layer: its last layer, by which ``published`` tells it from namesakes."""

    name: str
    v_loss_layer: int
    layer: int
    eps: float = 0.0


# num_steps 25, lr 5e-4, weight_decay 0 for all.
PUBLISHED = {
    known.name: known
    for known in (
        Known("gpt2-xl", 47, 1), Known("gpt-j-6B", 27, 21), Known("Llama-2-7b-hf", 31, 21),
        Known("Meta-Llama-3-8B", 31, 21), Known("Qwen2.5-7B", 27, 27),
    )
}  # fmt: skip
PUBLISHED_L = {
    known.name: known
    for known in (
        Known("gpt2-medium", 23, 0, 2e-3), Known("gpt2-large", 35, 0, 1e-3), Known("gpt2-xl", 47, 0, 5e-4),
        Known("gpt-j-6B", 27, 0, 5e-5),
    )
}  # fmt: skip
