"""The demo's findings as one page; see ``demo.py``."""

from dataclasses import replace
from statistics import mean

from kedit_fast.pictures.labels import LOCALIZATION_WARNING
from kedit_fast.pictures.page import Cell, Details, Picture, Section, Table, before_after_table, write_report
from kedit_fast.pictures.trace_page import fact_maps
from kedit_fast.pictures.traces import plot_average

TITLE = "Tracing and editing facts"
MAX_DRIFT = 0.03  # relative rise of perplexity that counts as damage
KEPT = 0.95  # of what was there before: below, a loss is marked
TAKEN = 0.8  # share or probability from which on an edit counts as taken

# (metric, what it says, whether it should rise or stay)
_SCORES = (
    ("p_new", "probability of the new answer", "rise"),
    ("p_true", "probability of the old answer", "fall"),
    ("paraphrase", "paraphrases that prefer the new answer", "rise"),
    ("paraphrase_p_new", "probability of the new answer, paraphrases", "rise"),
    ("neighborhood", "neighbors that prefer their own answer", "stay"),
    ("known_neighbors_p_true", "probability of their own answer, neighbors that had 0.1 or more", "stay"),
    ("same_subject_same_top", "other prompts on the subject: the likeliest next token is the same", "stay"),
)


def write_demo_report(path, found) -> None:
    """Writes the page of a ``demo.Findings``."""
    first_line = f"Measured on {found.model}. Other models, and this one's original weights, give other numbers."
    sections = [
        _summary(found),
        _tracing(found),
        _statistics(found),
        _edit(
            "ROME: one fact", found.rome, "One rank-one change of one matrix writes a new value for the subject's key."
        ),
        _edit(
            f"MEMIT: {len(found.memit.edit.facts)} facts at once",
            found.memit,
            "One joint change of several layers writes all new values, each layer taking its share.",
        ),
        _undone(found.undone),
        _method(found),
    ]
    write_report(path, TITLE, first_line, sections)


def _summary(found) -> Section:
    rows = [(title, outcome.replace("\n", "; "), f"{seconds:.1f} s") for title, outcome, seconds in found.steps]
    total = sum(seconds for _, _, seconds in found.steps)
    return Section("What was done", [Table(("step", "what came out", "time"), rows), f"{total:.0f} seconds in all."])


def _tracing(found) -> Section:
    state = found.traces[0]
    fact = state.fact
    layers = found.average.recommend_layers(min(5, found.average.mean.shape[1]))
    return Section(
        "Where the fact is",
        [
            f"Asked {fact.text!r}, the model says {state.answer.strip()!r} with probability {state.p_clean:.3f}. With "
            f"noise on the embeddings of the subject (starred) that falls to {state.p_corrupted:.3f}. Each cell puts "
            "one thing back to its clean value, one token at one layer, and shows the probability that returns: dark "
            "cells (bright ones on a dark page) carry the fact. Rest on a cell or tap it: it says what it is.",
            *fact_maps(found.traces),
            Picture(plot_average(found.average), f"States, averaged over {found.average.n_facts} facts."),
            f"Over these facts, layers {layers[0]} to {layers[-1]} bring most back at the last subject token. "
            f"Mind that {LOCALIZATION_WARNING}. {found.average.n_facts} facts are few: this is an illustration.",
        ],
    )  # fmt: skip


def _statistics(found) -> Section:
    rows = [(layer, m.n_tokens, f"{m.condition:.1e}") for layer, m in sorted(found.moments.items())]
    return Section(
        "What an edit must leave alone",
        [
            "The second moment of what enters each layer's down projection, over text that the model itself sampled. "
            "An edit is the smallest change in its metric: directions that ordinary text uses are left alone.",
            Table(("layer", "tokens", "condition number"), rows),
        ],
    )


# ---- edits


def _edit(heading: str, checked, what: str) -> Section:
    changes = checked.changes
    full = before_after_table(changes)
    written = [change for change in changes if change.role == "edit"]
    neighbors = [change for change in changes if change.role == "neighbor"]
    hurt = [change for change in neighbors if change.outcome.tone == "bad"]
    damage: list = ["No neighbor that the model knew lost half of its answer's probability."] if neighbors else []
    if hurt:
        n = f"{len(hurt)} of {len(neighbors)} neighbors"
        damage = [replace(before_after_table(hurt), caption=f"Damage: {n} lost their answer, or half of it and more")]
    layers = ", ".join(map(str, checked.edit.layers))
    settings = checked.edit.hparams["source"]
    return Section(
        heading,
        [
            f"{what} Layer{'s' * (len(checked.edit.layers) > 1)} {layers}; settings {settings}. {full.caption}",
            _scores(checked),
            replace(before_after_table(written), caption="The edited facts, before and after"),
            *damage,
            Details("All prompts: the facts, their paraphrases and neighbors", [full]),
        ],
    )


def _scores(checked) -> Table:
    summary = checked.report.summary()
    rows = []
    for name, what, should in _SCORES:
        before, after = summary[name]["base"].mean, summary[name]["edited"].mean
        rows.append((what, should, before, Cell(after, _tone(should, before, after))))
    before, after = checked.report.perplexity
    tone = "good" if after <= (1 + MAX_DRIFT) * before else "bad"  # NaN is bad
    n = checked.report.meta["text"]["n_predicted"]
    change = Cell(f"{after:.2f} ({checked.report.drift:+.1%})", tone)
    rows.append((f"perplexity of ordinary prose, {n} tokens", "stay", f"{before:.2f}", change))
    return Table(("mean over facts of their prompts", "should", "before", "after"), rows, "Success and damage")


def _tone(should: str, before: float, after: float) -> str:
    """The color of a mean: none where there was nothing to measure, bad where only the edited model has no number."""
    if before != before:
        return "neutral"
    if should == "rise":
        return "good" if after >= TAKEN else "bad"
    if should == "fall":
        return "good" if after < before else "bad"
    return "good" if after >= KEPT * before else "bad"


# ---- the rest


def _undone(undone) -> Section:
    rows = [
        (when, digest, Cell(same, tone))
        for when, digest, same, tone in zip(
            ("before", "with the edit", "after the undo"), undone.digests,
            ("", "differs, as it should", "the same bits" if undone.exact else "NOT the same"),
            ("", "neutral", "good" if undone.exact else "bad"), strict=True,
        )
    ]  # fmt: skip
    return Section(
        "Written into the weights, and taken out again",
        [
            "So far the edits were laid over the model while it ran. Here the MEMIT edit was written into the Hugging "
            "Face model's own weights and undone.",
            Table(("weights", "sha256 of all tensors", ""), rows),
            Table(("prompt", "before", "with the edit", "after the undo"), undone.generations,
                  "Greedy continuations by Hugging Face's own generation"),
        ],
    )  # fmt: skip


def _method(found) -> Section:
    facts = found.memit.edit.facts
    probes = mean(len(fact.neighborhood) for fact in facts)
    meta = found.memit.report.meta
    return Section(
        "How to read these numbers",
        [
            "The probability of an answer of several tokens is the geometric mean of its tokens' probabilities. A "
            "neighbor is the same question about another subject whose right answer is the old one: it must not "
            "change. It counts as damaged where the new answer has overtaken its own, as weakened where its own lost "
            "over half of its probability. Neighbors that name an edited subject are left out. The table of success "
            "and damage averages each fact's prompts and then the facts; the lines above tables of prompts count "
            "prompts.",
            f"{len(facts)} facts with about {probes:.0f} neighbors each tell whether editing works here, not how well "
            f"it works in general: one fact more or less moves a share by {1 / len(facts):.0%}. The same holds of the "
            "perplexity of so short a text.",
            f"kedit_fast {meta['version']}, model {meta['fingerprint']}, {meta['dtype']} on {meta['device']}.",
        ],
    )
