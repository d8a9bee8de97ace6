"""Trained editors on SmolLM2: networks trained for minutes on CounterFact, judged on subjects that they never saw.

Judged: the first facts of ``bench.edit``'s draw, one by one and ten at a time. Trained on: the first CounterFact facts
of other subjects, with their paraphrase, and two neighborhood prompts that must not change. "For a route": with three
phrasings besides (as in ``bench.phrasings``), and prompts on the subject's other relations in the neighbors' place;
judged one by one, and all facts behind a route by name. A killed run goes on where it stood. The
network is kept, and its path printed, for ``python -m bench editors --network METHOD=FILE``.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import DATA, Figure, Measured, peak_matmul
from bench.editors import JUDGED, Ground, Row, judged, table
from kedit_fast.basics.catalog import TRAINED, loaded
from kedit_fast.basics.parts import remove_parts
from kedit_fast.basics.settings import cache_dir
from kedit_fast.facts.fact import Fact

SINGLES, TENS = 50, 5  # edits of one fact, and of ten
HELD_OUT = 0.1
ROUTED = "MEND for a route"
ROWS = {  # steps and facts, for about five minutes each
    "MEND": ("mend", 240, 300), "MALMEN": ("malmen", 80, 300), "KE": ("ke", 240, 300), ROUTED: ("mend", 480, 500),
}  # fmt: skip
LOOKS = {"nll": "nats", "success": "%", "kl": "nats"}


def run(options) -> Iterator[Measured]:
    """The rows that the command line asks for. Raises Skipped without the data sets, ValueError for an unknown row."""
    edit_bench.check_data()
    if unknown := set(options.rows) - set(ROWS):
        raise ValueError(f"--rows {sorted(unknown)}: expected some of {list(ROWS)}")
    quick = options.quick
    lm, drawn = kf.open_model("smollm2"), edit_bench.draw()
    singles, tens = (2, 1) if quick else (SINGLES, TENS)
    text = edit_bench.perplexity_text(edit_bench.N_CHARACTERS // (20 if quick else 1))
    ground = Ground(lm, drawn[: 10 * max(tens, 1) + singles], {}, [["{}"]], text)
    unedited = True
    for label in options.rows or ROWS:
        method, steps, n_train = ROWS[label]
        training = training_facts(drawn, 12 if quick else n_train, routed=label == ROUTED)
        network, figures, note = trained(ground, training, method, label, 2 if quick else steps, quick)
        for row in rows_of(label, method, network, singles, tens, len(ground.facts)):
            reports, drifts = judged(ground, row)
            if unedited:
                yield Measured(table("no edit", reports, side="base"), peak_matmul(), [ABOUT])
                unedited = False
            figures += table(row.name, reports, drifts)
        yield Measured(figures, peak_matmul(), [note])
        remove_parts(run_folder(label))


def rows_of(label: str, method: str, network, singles: int, tens: int, n: int) -> list[Row]:
    """What a network is judged by; n: facts there are."""
    single = Row(label, method, 1, singles, {"network": network})
    if label == ROUTED:
        return [single, Row(f"{label}, by name", method, min(n, JUDGED), 1, {"network": network}, "names")]
    return [single, Row(label, method, 10, tens, {"network": network})]


def training_facts(judged_facts: list[Fact], n: int, routed: bool) -> list[Fact]:
    """The first n CounterFact facts whose subject none of the facts that may be judged has; routed: with phrasings, and
    the subject's other relations."""
    subjects = {fact.subject.casefold() for fact in judged_facts}
    every = kf.load_facts(DATA / edit_bench.COUNTERFACT)
    some = [fact for fact in every if fact.subject.casefold() not in subjects][:n]
    return kf.related(some, every) if routed else some


def trained(ground: Ground, facts: list[Fact], method: str, label: str, steps: int, quick: bool):
    """(the network, figures of its training, a note of its settings)."""
    settings = loaded(TRAINED)[method].for_model(ground.lm)
    settings = replace(
        settings, max_iters=steps, val_interval=max(1, min(60, steps // 4)), val_facts=2 if quick else 30
    )
    began = time.process_time()
    with kf.show_progress():
        network = kf.train_editor(
            ground.lm,
            facts,
            method,
            settings=settings,
            held_out=HELD_OUT,
            routed=label == ROUTED,
            checkpoint=run_folder(label),
        )
    minutes = (time.process_time() - began) / 60
    network.save(path := run_folder(label).with_suffix(".safetensors"))
    print(f"{label}: {minutes:.1f} CPU minutes of training, {path}", flush=True)
    figures = []
    for look in network.provenance["looks"]:
        case = f"{label}, step {look['step']}"
        figures += [
            Figure(
                case,
                f"held out, {name}",
                look[name] * (100 if unit == "%" else 1),
                unit,
                n=network.provenance["held_out"],
            )
            for name, unit in LOOKS.items()
        ]
    fields = ("batch_size", "lr", "lr_lr", "edit_lr", "cedit", "cloc", "rank", "condition_dim", "kl_margin", "keeps")
    fields = (*fields, "kept_tokens")
    said = ", ".join(f"{name} {value}" for name in fields if (value := network.settings.get(name)) is not None)
    made = network.provenance
    note = f"{label}: {said}; {made['facts']} facts, {made['held_out']} held out, best step {made['best_step']}."
    return network, figures, note


def run_folder(label: str):
    """Where a row's training is kept until its figures are."""
    folder = cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"trained-{label.lower().replace(' ', '-')}"


ABOUT = (
    f"{SINGLES} edits of one fact, each on the unedited model, and {TENS} of ten facts, of subjects that no training "
    "saw. Held out: facts of a tenth of the training's subjects, asked by their paraphrase; nll: -log p of the answer, "
    "success: it is said token for token, kl: of the next token at a neighborhood prompt."
)
