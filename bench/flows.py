"""Traces on the shapes of large models, with random weights and random prompts: how fast a whole flow is on a GPU.

A model is built on the device from its config, in bf16, with a final norm that makes its answers sharp enough to
compare; facts are prompts of 12 random tokens whose subject is 4 of them. Rivals on the same model: the batched loop
on one whole fact, and the published loop on a few cells of it, multiplied by the cells it has; both are the tests'
oracle. All three must agree on the model's first layers in fp32, or nothing is reported: in bf16 two ways through a
random model differ by rounding as much as its cells have effect; what they differ by there is reported too.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

import kedit_fast as kf
from bench.common import (
    CheckFailed,
    Figure,
    Measured,
    Peaks,
    Skipped,
    Stopwatch,
    device_of,
    peak_memory,
    reset_peak_memory,
)
from bench.trace import count_flop
from kedit_fast.facts.tokens import fact_tokens
from kedit_fast.tracing.trace import noise_level
from tests.oracle import access
from tests.oracle import tracing as oracle

TOKENS, SUBJECT, SUBJECT_AT = 12, 4, 1
SHARPNESS = 8.0  # of the final norm's weight: logits of random models are near 1 in size, and all answers alike
SHARE = 40  # % of the measured bf16 product rate that a trace has to reach
CHECKED_LAYERS = 4
TOLERANCE = 1e-2  # of an RMS difference of p over the RMS effect, in fp32


@dataclass(frozen=True)
class Model:
    """A config's class, its name for the number of layers, and its values, in full and for a dry run."""

    family: str
    layers: str
    full: dict
    tiny: dict


MODELS = ("gpt2-xl", "llama-3-8b")  # that are traced
CONFIGS = {
    "gpt2-xl": Model(
        "GPT2",
        "n_layer",
        dict(n_embd=1600, n_layer=48, n_head=25, vocab_size=50257, n_positions=1024),
        dict(n_embd=48, n_layer=3, n_head=3, vocab_size=300, n_positions=64),
    ),
    "llama-3-8b": Model(
        "Llama",
        "num_hidden_layers",
        dict(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
        ),
        dict(
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=300, max_position_embeddings=64,
        ),
    ),
    "gpt-j": Model(
        "GPTJ",
        "n_layer",
        dict(n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, vocab_size=50400, n_positions=2048),
        dict(n_embd=48, n_layer=4, n_head=3, rotary_dim=8, vocab_size=300, n_positions=64),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What to trace. facts: in one call, fewer where ``until`` (time.monotonic()) would not be kept; cells: of the
    published loop that are timed; tiny: the dry run's shapes
    """

    model: str
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    facts: int = 64
    samples: int = 10
    cells: int = 24
    tiny: bool = False
    layers: int | None = None
    until: float = float("inf")


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped without a GPU, unless the run is a quick one."""
    device = device_of(options.device)
    if device.type == "cpu" and not options.quick:
        raise Skipped("models of these sizes need a GPU; --quick goes through all the steps on tiny ones")
    plans = [dry(name, device) if options.quick else Plan(name, device) for name in MODELS]
    return joined([measure(plan) for plan in plans])


def dry(name: str, device: torch.device) -> Plan:
    """The plan of a dry run."""
    return Plan(name, device, torch.float32, facts=2, samples=2, cells=6, tiny=True)


def joined(parts: list[Measured]) -> Measured:
    """Several results as one."""
    figures, notes = ([x for part in parts for x in getattr(part, name)] for name in ("figures", "notes"))
    return Measured(figures, max(part.peak for part in parts), notes, parts[0].device)


# ---- model and facts


def random_model(plan, seed: int = 0) -> nn.Module:
    """A model of the plan's shape, made on its device in its dtype.

    plan: has ``model`` (of CONFIGS), ``tiny``, ``layers`` (None: all), ``device`` and ``dtype``
    """
    import transformers

    made = CONFIGS[plan.model]
    values = (made.tiny if plan.tiny else made.full) | ({made.layers: plan.layers} if plan.layers else {})
    config = getattr(transformers, f"{made.family}Config")(**values, bos_token_id=0, eos_token_id=0)
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(plan.dtype)
        with torch.device(plan.device):
            head_class = {"GPT2": "GPT2LMHeadModel"}.get(made.family, f"{made.family}ForCausalLM")
            model = getattr(transformers, head_class)(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        model.get_submodule(access.paths(model).norm).weight.fill_(SHARPNESS)
    return model.requires_grad_(False)


def word_tokenizer(n_words: int):
    """One token a word: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_words)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w0")


def random_facts(n: int, n_words: int, seed: int = 0) -> list[kf.Fact]:
    """Prompts of TOKENS words, the subject's SUBJECT ones from SUBJECT_AT on."""
    words = np.random.RandomState(seed).randint(1, n_words, (n, TOKENS))
    end = SUBJECT_AT + SUBJECT
    texts = [[f"w{i}" for i in row] for row in words]
    return [
        kf.Fact(" ".join([*text[:SUBJECT_AT], "{}", *text[end:]]), " ".join(text[SUBJECT_AT:end])) for text in texts
    ]


# ---- measure


def measure(plan: Plan) -> Measured:
    """One model: ours on all facts, the rivals on the first. Raises CheckFailed where they disagree in fp32."""
    watch = Stopwatch(plan.device)
    peaks = Peaks.measure(watch, [plan.dtype], plan.tiny)
    checked = check(replace(plan, dtype=torch.float32, layers=CHECKED_LAYERS, facts=1, samples=2), watch)
    ours, facts = opened(plan)
    flop = flop_of(ours, facts[0])
    ours(facts[:4])  # compiles and warms up
    facts = facts[: _affordable(plan, facts, watch.once(lambda: ours(facts[:4])).wall / len(facts[:4]))]
    reset_peak_memory(plan.device)
    traced = watch.once(lambda: ours(facts))
    used = peak_memory(plan.device)
    rivals = Rivals(ours, plan, facts[0], traced.result[0])
    rivals.time(watch)
    figures = _figures(plan, len(facts), ours.lm.n_layers, traced.wall, flop, peaks.products[plan.dtype], used, rivals)
    figures.append(Figure(figures[0].case, "difference in fp32", checked, "difference", mark=f"<= {TOLERANCE:g}"))
    return Measured(figures, 1e-9 * peaks.products[plan.dtype], [_about(plan, ours, len(facts))], plan.device.type)


def check(plan: Plan, watch: Stopwatch) -> float:
    """The largest of the differences between the three on one fact. Raises CheckFailed where it is not small."""
    ours, facts = opened(plan)
    rivals = Rivals(ours, plan, facts[0], ours(facts)[0])
    rivals.time(watch)
    found = rivals.differences()
    if not max(found.values()) <= TOLERANCE:
        raise CheckFailed(f"{plan.model}, {plan.layers} layers in fp32: differences {found}, allowed {TOLERANCE:g}")
    return max(found.values())


def opened(plan: Plan) -> tuple["_Ours", list[kf.Fact]]:
    """The plan's model with its way to trace, and its facts."""
    model = random_model(plan)
    lm = kf.open_model(model, tokenizer=word_tokenizer(model.config.vocab_size), memory=_memory(plan))
    facts = random_facts(plan.facts, model.config.vocab_size)
    return _Ours(lm, plan.samples, noise_level(lm, facts, "s3")[1]), facts


def _memory(plan: Plan) -> int | None:
    """Half of what the device has, so that the rivals have room; None on the CPU."""
    return torch.cuda.get_device_properties(plan.device).total_memory // 2 if plan.device.type == "cuda" else None


def _affordable(plan: Plan, facts: list, seconds_a_fact: float) -> int:
    """Facts that half of the remaining time is enough for; 4 at least."""
    return int(max(4, min(len(facts), 0.5 * (plan.until - time.monotonic()) / seconds_a_fact, 1e9)))


@dataclass(frozen=True)
class _Ours:
    lm: kf.LM
    samples: int
    noise: float

    def __call__(self, facts, samples: int | None = None) -> list[kf.TraceResult]:
        return kf.trace(self.lm, facts, kinds="state", samples=samples or self.samples, noise=self.noise)


def flop_of(ours: _Ours, fact: kf.Fact) -> float:
    """FLOP of a fact's products, counted for one and two draws; the rest is linear in the draws."""
    one, two = (count_flop(ours, [fact], samples) for samples in (1, 2))
    return one + (ours.samples - 1) * (two - one)


class Rivals:
    """Both loops on one fact of ours. Times are wall seconds of the whole fact.

    published: p of the cells that were run; batched: p of all cells [tokens, layers]
    """

    def __init__(self, tracer: _Ours, plan: Plan, fact: kf.Fact, ours: kf.TraceResult):
        self._model, self._plan, self._noise, self._ours = tracer.lm.model, plan, tracer.noise, ours
        self._ids, self._span, *_ = fact_tokens(tracer.lm.tokenizer, fact)
        self._cells = _spread_cells(plan.cells, tracer.lm.n_layers)
        self.seconds: dict[str, float] = {}
        self.published = self.batched = np.empty(0)

    def time(self, watch: Stopwatch) -> None:
        """Runs both; the first run of each warms it up."""
        self._cell(self._cells[0])()
        timings = [watch.once(self._cell(cell)) for cell in self._cells]
        self.published = np.array([float(timing.result) for timing in timings])
        forwards = TOKENS * self._ours.p_restored.shape[1] + 2
        self.seconds["published loop"] = forwards * statistics.median(timing.wall for timing in timings)
        self._loop()
        timing = watch.once(self._loop)
        self.batched, self.seconds["batched loop"] = timing.result["scores"].float().cpu().numpy(), timing.wall

    def _loop(self) -> dict:
        options = {"samples": self._plan.samples, "noise": self._noise, "answer": self._ours.answer_id}
        return oracle.batched_loop(self._model, self._ids, self._span, "state", **options)

    def _cell(self, cell: tuple[int, int]) -> Callable:
        """The published loop's forward for one (token, layer)."""
        token, layer = cell
        batch = torch.tensor([self._ids] * (self._plan.samples + 1), device=self._plan.device)
        noise = oracle._add_noise(self._span, self._noise, self._plan.samples, 1)
        changes = [(access.embedding(self._model), noise)]
        changes.append((access.site_module(self._model, layer, "layer_out"), oracle._restore(token)))

        def forward():
            with torch.inference_mode(), access.changing(changes):
                return oracle._metric(self._model(batch).logits[1:, -1], self._ours.answer_id, "prob").float().mean()

        return forward

    def differences(self) -> dict[str, float]:
        """RMS over cells of differences of p, over the RMS of our effects."""
        ours = self._ours.p_restored
        effect = np.sqrt(np.mean(self._ours.indirect_effect**2))
        some = tuple(np.array(self._cells).T)
        pairs = {
            "ours to the published loop": (ours[some], self.published),
            "ours to the batched loop": (ours, self.batched),
            "published to the batched loop": (self.published, self.batched[some]),
        }
        return {name: float(np.sqrt(np.mean((a - b) ** 2)) / effect) for name, (a, b) in pairs.items()}


def _spread_cells(n: int, n_layers: int) -> list[tuple[int, int]]:
    """n (token, layer) of every height, their tokens from the subject on."""
    first = SUBJECT_AT
    return [(first + 5 * i % (TOKENS - first), (2 * i + 1) * n_layers // (2 * n)) for i in range(n)]


def _figures(plan, n_facts, n_layers, wall, flop, peak, used, rivals: Rivals) -> list[Figure]:
    """peak: FLOP/s of a plain product; used: ``peak_memory`` of the trace alone."""
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[plan.dtype]
    case = f"trace, {plan.model}{' shrunk' * plan.tiny}, {dtype}, {n_facts} facts"
    rate, seconds = flop * n_facts / wall, rivals.seconds
    rows = [
        ("wall time", wall, "s"),
        ("facts a second", n_facts / wall, "facts/s"),
        ("patches a second", n_facts * n_layers * TOKENS / wall, "patches/s"),
        ("FLOP a fact", 1e-12 * flop, "TFLOP"),
        ("product rate", 1e-12 * rate, "TFLOP/s"),
        ("share of product peak", 100 * rate / peak, "%"),
        ("ratio to the published loop, extrapolated", seconds["published loop"] * n_facts / wall, "x"),
        ("ratio to the batched loop", seconds["batched loop"] * n_facts / wall, "x"),
        *((f"difference, {name}", value, "difference") for name, value in rivals.differences().items()),
        *used,
    ]
    marks = {"share of product peak": f">= {SHARE}"} if plan.device.type == "cuda" else {}
    return [Figure(case, metric, value, unit, n=n_facts, mark=marks.get(metric, "")) for metric, value, unit in rows]


def _about(plan: Plan, ours: _Ours, n_facts: int) -> str:
    asked = f" (of {plan.facts} asked for: time was short)" if n_facts < plan.facts else ""
    return (
        f"{plan.model}: random weights, {n_facts} facts{asked} of {TOKENS} tokens, subject {SUBJECT}; states, all "
        f"layers and tokens, {plan.samples} draws of noise {ours.noise:.3f}; a patch is one cell with all its draws; "
        f"rivals on one fact, the published loop extrapolated from {plan.cells} of its cells; differences of p in RMS "
        f"effects, checked in fp32 on {CHECKED_LAYERS} layers."
    )
