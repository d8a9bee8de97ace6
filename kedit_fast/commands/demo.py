"""``kedit-fast demo``: the whole way on a real model, from a question to an edited model and back, explained.

One fact is traced, the statistics that edits need are measured, ROME rewrites the fact, MEMIT rewrites twelve, both are
checked for success and for damage, and the second is written into the model's weights and taken out again.
``demo_report.py`` lays out what was found as a page.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kedit_fast.basics.settings import statistics_folder
from kedit_fast.commands.inputs import model_line, open_lm
from kedit_fast.commands.outputs import check_output, output_folder, say, show
from kedit_fast.editors import Memit, Rome
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation import Case, EvalReport, evaluate
from kedit_fast.evaluation.benchmarks.counterfact import NEIGHBORHOOD, PARAPHRASE, REWRITE, probes
from kedit_fast.evaluation.canary import PROSE
from kedit_fast.evaluation.probes import read_probes
from kedit_fast.facts.fact import OWN_FACTS, Fact, load_facts
from kedit_fast.facts.subjects import Names
from kedit_fast.facts.tokens import spoken
from kedit_fast.moments.second_moment import TOKENS_PER_FEATURE, SecondMoment, second_moments
from kedit_fast.pictures.labels import LOCALIZATION_WARNING
from kedit_fast.pictures.page import ROLES, Change, known_neighbors
from kedit_fast.pictures.terminal import TerminalHeatMap
from kedit_fast.tracing.results import AverageTrace, TraceResult, average
from kedit_fast.tracing.trace import trace

REPORT = "report.html"
KINDS = (REWRITE, PARAPHRASE, NEIGHBORHOOD)  # of probes, in the order of the page's roles
N_GENERATED = 12  # tokens
# Noise draws. On SmolLM2 five put the strongest cell of the MLP and attention windows where ten do, correlate with them
# by 0.997 and 0.999 over the cells, and cost 34 s of a core instead of 72.
SAMPLES = 5

TEXT = PROSE.read_text(encoding="utf-8")  # what perplexity is measured on


@dataclass(frozen=True)
class Checked:
    """An edit, what evaluation says of it, and each of its prompts before and after."""

    edit: Edit
    report: EvalReport
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Undone:
    """A model's digest and greedy answers before an edit was written into it, with the edit, and after its undo."""

    digests: tuple[str, str, str]
    generations: tuple[tuple[str, str, str, str], ...]  # prompt, then the three answers

    @property
    def exact(self) -> bool:
        return self.digests[0] == self.digests[2] != self.digests[1]


@dataclass
class Findings:
    """Everything the report shows; filled step by step."""

    model: str
    steps: list[tuple[str, str, float]] = field(default_factory=list)  # title, result, seconds
    traces: list[TraceResult] = field(default_factory=list)  # of the first fact, all kinds
    average: AverageTrace | None = None
    moments: dict[int, SecondMoment] = field(default_factory=dict)
    rome: Checked | None = None
    memit: Checked | None = None
    undone: Undone | None = None


class Story:
    """Tells the steps: a heading and why, then what came out (a line or two) and how long it took."""

    TOTAL = 7

    def __init__(self):
        self.steps: list[tuple[str, str, float]] = []

    @contextmanager
    def step(self, title: str, why: str) -> Iterator[Callable[[str], None]]:
        """``with story.step(title, why) as result: ...; result("what came out")``."""
        say(f"\n[{len(self.steps) + 1}/{self.TOTAL}] {title}\n      {why}")
        began, results = time.monotonic(), []
        yield results.append
        seconds = time.monotonic() - began
        self.steps.append((title, results[-1], seconds))
        say(f"   => {results[-1]}".replace("\n", "\n      ") + f"  ({seconds:.0f} s)")


def run(args) -> None:
    """The demo with the model of ``args`` and the facts of this package."""
    folder = output_folder(args.output)
    check_output(folder / REPORT, force=True)
    kept = output_folder(statistics_folder())
    story = Story()
    with story.step(
        "Open the model", "SmolLM2-135M-Instruct: small enough for any computer, and it knows some facts."
    ) as result:
        lm = open_lm(args)
        result(model_line(lm))
    facts = load_facts(OWN_FACTS)
    path = run_demo(lm, facts, folder, story=story, cache_dir=kept, seed=args.seed)
    seconds = sum(seconds for _, _, seconds in story.steps)
    say(f"\nDone in {seconds:.0f} s. Open {path} in a browser for the pictures and every number. To go on:")
    say('  kedit-fast trace --prompt "{} is in the city of" --subject "Big Ben"')
    say("  kedit-fast edit --facts builtin -n 30 -o edit.safetensors")
    say("  kedit-fast eval edit.safetensors --generate 12 --html eval.html")


def run_demo(
    lm,
    facts: Sequence[Fact],
    folder,
    *,
    story: Story | None = None,
    n_memit: int = 12,
    samples: int = SAMPLES,
    few_samples: int = 3,
    n_tokens: int | None = None,
    rome: Rome | None = None,
    memit: Memit | None = None,
    cache_dir=None,
    seed: int = 0,
) -> Path:
    """Traces and edits with a model, and writes ``report.html`` and the heat map into a folder; the report's path.

    facts: with target_new and target_true; the first is traced and edited by ROME, the next two are traced for the
        average, and MEMIT edits the first ``n_memit``
    samples, few_samples: noise draws for the first fact, and for the two others
    n_tokens: of sampled text for the statistics, as of ``second_moments``. cache_dir: keeps statistics
    rome, memit: the editors; default those for this model

    The model is left bit for bit as it was. Raises ValueError where its weights are not in memory.
    """
    from kedit_fast.commands.demo_page import write_demo_report

    if not lm.source.in_memory:
        raise ValueError(
            "the demo writes an edit into the model's weights, so these must be in memory; give more --memory"
        )
    story = story or Story()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = Findings(model_line(lm), story.steps)
    _trace(lm, facts, folder, story, found, (samples, few_samples))
    rome, memit = rome or Rome.for_model(lm), memit or Memit.for_model(lm)
    layers = sorted({*rome.layers, *memit.layers})
    _measure(lm, layers, story, found, n_tokens, cache_dir, seed)
    title, what = f"ROME: {facts[0].text} ... {facts[0].target_new}", "One rank-one change of one matrix, layer"
    found.rome = _edit(lm, rome, facts[:1], story, title, f"{what} {rome.layers[0]}", found.moments, seed)
    many, what = facts[:n_memit], f"One joint change of layers {', '.join(map(str, memit.layers))}"
    title = f"MEMIT: {len(many)} new answers at once"
    found.memit = _edit(lm, memit, many, story, title, what, found.moments, seed)
    _write_and_undo(lm, story, found)
    path = folder / REPORT
    with story.step("Report", "One page with the pictures, every probability, success and damage.") as result:
        write_demo_report(path, found)
        result(str(path))
    return path


# ---- the steps


def _trace(lm, facts, folder, story, found, samples) -> None:
    fact = facts[0]
    with story.step(
        "Trace: where does the model keep a fact?",
        f"Noise on {fact.subject!r} makes it forget. Put one token's clean state back at one layer: does it recall?",
    ) as result:
        found.traces = trace(lm, facts[:1], samples=samples[0])
        state = found.traces[0]
        others = trace(lm, facts[1:3], kinds=("state",), samples=samples[1]) if len(facts) > 1 else []
        found.average = average([state, *others])["state"]
        say()
        show(TerminalHeatMap(state))
        say()
        state.plot(folder / "trace.png")
        layers = found.average.recommend_layers(min(5, lm.n_layers))
        result(
            f"p({state.answer.strip()}) {state.p_clean:.3f}, with noise {state.p_corrupted:.3f}; over "
            f"{found.average.n_facts} facts layers {layers[0]}-{layers[-1]} bring most back at the last subject token"
        )
    say(f"      Note: {LOCALIZATION_WARNING}.")


def _measure(lm, layers, story, found, n_tokens, cache_dir, seed) -> None:
    n_tokens = n_tokens or TOKENS_PER_FEATURE * lm.d_ff
    with story.step(
        "Statistics: what must an edit leave alone?",
        f"The model writes {n_tokens:,} tokens of text; what passes layers {layers[0]}-{layers[-1]} is summed up.",
    ) as result:
        found.moments = second_moments(lm, layers, n_tokens=n_tokens, seed=seed, cache_dir=cache_dir)
        worst = max(m.condition for m in found.moments.values())
        kept = f"; kept in {cache_dir}" if cache_dir else ""
        result(f"second moments of {len(layers)} layers, condition number at most {worst:.1e}{kept}")


def _edit(lm, editor, facts, story, title: str, what: str, moments, seed) -> Checked:
    with story.step(title, f"{what} (settings {editor.source}).") as result:
        edit = editor.edit(lm, facts, moments=moments, seed=seed)
        checked = Checked(edit, evaluate(lm, edit.facts, edit, text=TEXT), tuple(prompt_changes(lm, edit)))
        result(outcome_lines(checked))
    return checked


def prompt_changes(lm, edit: Edit) -> list[Change]:
    """Each prompt of the edit's facts (rewrite, paraphrases, neighbors) with both answers before and after.

    Neighbors that name an edited subject are left out, as in ``evaluate``, which gives the means of these numbers.
    """
    edited, roles = (Names(fact.subject for fact in edit.facts),), dict(zip(KINDS, ROLES, strict=True))
    asked = [one for i, fact in enumerate(edit.facts) for one in probes(lm, Case((fact,), number=i, edited=edited))]
    changes = []
    for one, before, after in zip(asked, *read_probes(lm.with_edit(edit), asked), strict=True):
        if one.kind in roles:
            fact, ((old_new, old_true), (new_new, new_true)) = edit.facts[one.case], (before.p, after.p)
            change = Change(
                spoken(one.text), fact.target_true, (old_true, new_true), fact.target_new, (old_new, new_new),
                roles[one.kind],
            )  # fmt: skip
            changes.append(change)
    return changes


def outcome_lines(checked: Checked) -> str:
    """Success in one line, damage in another; the neighbors' mean is over prompts, those that are counted before it."""
    means = {name: (both["base"].mean, both["edited"].mean) for name, both in checked.report.summary().items()}
    new = means["p_new"]
    outcomes = [(change.role, change.outcome.value) for change in checked.changes]
    neighbors = known_neighbors(checked.changes)
    before, after = neighbors.p_old
    kept = f"mean P over these prompts {before:.3f} -> {after:.3f}" if neighbors.n else "the model knew none"
    return (
        f"written: {outcomes.count(('edit', 'written'))} of {len(checked.edit.facts)}, "
        f"P(new) {new[0]:.3f} -> {new[1]:.3f}; asked in other words {means['paraphrase_p_new'][1]:.3f}\n"
        f"damage: {neighbors.damaged + neighbors.weakened} of {neighbors.n} neighbors ({kept}); "
        f"{1 - means['same_subject_same_top'][1]:.0%} of other prompts on the subject go on differently; "
        f"perplexity {checked.report.drift:+.1%}"
    )


def _write_and_undo(lm, story, found) -> None:
    edit = found.memit.edit
    prompts = [fact.text for fact in edit.facts[:3]]
    with story.step(
        "Write the MEMIT edit into the weights, and take it out again",
        "Until now the weights were only read. A digest (sha256) of all of them shows whether the undo is exact.",
    ) as result:
        before = state_digest(lm.model), hf_answers(lm, prompts)
        with edit.apply(lm.model):
            edited = state_digest(lm.model), hf_answers(lm, prompts)
        digests, answers = zip(before, edited, (state_digest(lm.model), hf_answers(lm, prompts)), strict=True)
        found.undone = Undone(digests, tuple(zip(prompts, *answers, strict=True)))
        if not found.undone.exact or answers[0] != answers[2]:
            raise RuntimeError(f"the model is not what it was before the edit: sha256 {digests[0]}, then {digests[2]}")
        for prompt, *said in found.undone.generations:
            before, edited, _ = (" ".join(text.split()) for text in said)
            say(f"      {prompt}\n         before: {before}\n         edited: {edited}")
        for when, digest in zip(("before", "edited", "undone"), digests, strict=True):
            say(f"      sha256 {when}: {digest}")
        result("bit-identical after the undo, and it answers as before")


def state_digest(model) -> str:
    """sha256 of a Hugging Face model's state_dict: every tensor's name, dtype, shape and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hf_answers(lm, prompts: Sequence[str]) -> list[str]:
    """Greedy continuations by Hugging Face's own generation, which knows nothing of this package."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([lm.encode(prompt)], device=lm.device)
        made = lm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_GENERATED, do_sample=False,
            pad_token_id=lm.tokenizer.pad_token_id or lm.tokenizer.eos_token_id,
        )  # fmt: skip
        answers.append(lm.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return answers
