"""Work of several ranks (gloo, on this machine's cores) against that of one: the same results, and how much sooner.

Second moments of given text, a trace, MEMIT with the values it optimizes, and its evaluation, of known CounterFact
facts on SmolLM2. Each arrangement is started by itself, as a launcher would, and opens its own models. Results are
compared with those of one rank with one thread, or nothing is reported. Ratios are of wall time, and of CPU time by the
rank that took the most of it, which another program on the machine disturbs least.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kedit_fast as kf
from bench import edit as edit_bench
from bench.agreement import VALUE_TOLERANCE, as_fp64, check_ways, our_values, relative
from bench.common import ROOT, CheckFailed, Figure, Measured, peak_matmul, timed
from kedit_fast.basics import ranks
from kedit_fast.basics.settings import launch

FACTS, QUICK = 40, 4
N_TOKENS = 12_288
# What may differ: probabilities of traces, as between any two cuts of the facts (the same cut gives the same bits);
# moments relative to the largest entry; a fact's value after all its steps, relative to its norm; what is written for
# the difference of a value and what is there, so more; and the figures after it.
VALUES = "memit z"
TOLERANCE = {"moments": 1e-6, "trace": 1e-5, VALUES: VALUE_TOLERANCE, "memit Δ": 1e-3, "evaluation": 1e-3}
PARTS = ("moments", "trace", "memit", "evaluation")


class Arrangement(NamedTuple):
    """So many processes with so many threads each."""

    ranks: int
    threads: int

    def __str__(self) -> str:
        threads = f", {self.threads} threads" * (self.threads > 1)
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}{threads}"


ALONE = Arrangement(1, 1)
ARRANGEMENTS = (Arrangement(2, 1), Arrangement(4, 1), Arrangement(1, 2))


def run(options) -> Iterator[Measured]:
    """All arrangements, one after the other. Raises Skipped without the public data sets."""
    edit_bench.check_data()
    n = QUICK if options.quick else FACTS
    with tempfile.TemporaryDirectory() as folder:
        alone = _made(ALONE, Path(folder), n)
        took = ", ".join(f"{part} {times.wall:.0f} s ({times.cpu:.0f} CPU s)" for part, times in alone.times)
        note = (
            f"{n} facts; {N_TOKENS:,} tokens of text, five layers; states of one noise draw. Ratios: to one rank with "
            f"one thread, which took {took}."
        )
        for each in ARRANGEMENTS:
            yield Measured(_compared(each, _made(each, Path(folder), n), alone), peak_matmul(), [note])


class Times(NamedTuple):
    """Seconds on the wall, of the first rank, and CPU seconds of the rank that took the most."""

    wall: float
    cpu: float


class Made(NamedTuple):
    """What an arrangement gave, by part: its tensors, and how long it took."""

    tensors: dict[str, Tensor]
    times: list[tuple[str, Times]]


def _made(how: Arrangement, folder: Path, n: int) -> Made:
    """Starts the ranks of an arrangement and waits for them. Raises CheckFailed where one fails."""
    folder = folder / str(how)
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(how.ranks)}
    place["OMP_NUM_THREADS"] = str(how.threads)
    command = [sys.executable, "-m", "bench.ranks", str(folder), str(n), str(how.threads)]
    print(f"{how} ...", flush=True)
    running = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **place, "RANK": str(i)}) for i in range(how.ranks)
    ]
    if any([process.wait() for process in running]):
        raise CheckFailed(f"{how} did not end well")
    of_ranks = [json.loads((folder / f"{i}.json").read_text()) for i in range(how.ranks)]
    times = [(part, Times(of_ranks[0][part][0], max(of[part][1] for of in of_ranks))) for part in PARTS]
    return Made(load_file(folder / "0.safetensors"), times)


def _compared(how: Arrangement, made: Made, alone: Made) -> list[Figure]:
    """The figures of an arrangement. Raises CheckFailed where its results are others."""
    figures = []
    for (part, took), (_, one) in zip(made.times, alone.times, strict=True):
        for what in (name for name in TOLERANCE if name.startswith(part)):
            keys = [key for key in alone.tensors if key.startswith(what)]
            apart = max(_apart(what, made.tensors[key], alone.tensors[key]) for key in keys)
            if what == VALUES:
                figures += _judged(how, made.tensors[VALUES], alone.tensors[VALUES])
            elif apart > TOLERANCE[what]:
                raise CheckFailed(f"{what} of {how} is {apart:.1e} off, more than {TOLERANCE[what]:.0e}")
            figures.append(Figure(str(how), f"{what}, largest difference", apart, "difference"))
        figures += [
            Figure(str(how), f"{part}, wall time", one.wall / took.wall, "x"),
            Figure(str(how), f"{part}, CPU time of a rank", one.cpu / took.cpu, "x"),
            Figure(str(how), f"{part}, wall seconds", took.wall, "s"),
        ]
    return figures


def _judged(how: Arrangement, ours: Tensor, alone: Tensor) -> list[Figure]:
    """Values [n, d] of which some differ by more than they may: each of those has to be as near to the value in fp64 as
    one rank's is, for twenty steps amplify the rounding of another cut. How many there are. Raises CheckFailed."""
    apart = [relative(*each) for each in zip(ours, alone, strict=True)]
    further = [i for i, off in enumerate(apart) if not off <= TOLERANCE[VALUES]]
    if further:
        lm = kf.open_model("smollm2")
        editor, facts = kf.Memit.for_model(lm), edit_bench.draw()
        contexts = editor.sampled_contexts(lm, 0)
        exact = our_values(as_fp64(lm), [facts[i] for i in further], contexts, editor.z_settings(lm)).values
        for i, truth in zip(further, exact, strict=True):
            what = f"value of {facts[i].label} by {how}"
            check_ways(what, ours[i], alone[i], relative, TOLERANCE[VALUES], lambda x=truth: x, lambda x=truth: x)
    return [Figure(str(how), "memit z, further apart, by rounding", len(further), "facts")]


def _apart(what: str, got: Tensor, want: Tensor) -> float:
    """The largest difference: of probabilities as it is, of values and what they write by norms, else relative to the
    largest entry."""
    if what == "trace":
        return float((got - want).abs().max())
    if what == VALUES:
        return max(relative(*each) for each in zip(got, want, strict=True))
    if what == "memit Δ":
        return relative(got, want)
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))


# ---- one rank


def work(folder: Path, n: int) -> None:
    """All parts, timed; leaves what came of them in the folder, under this rank's number."""
    lm = kf.open_model("smollm2")
    editor = kf.Memit.for_model(lm)
    facts = edit_bench.draw()[:n]
    times: dict[str, tuple[float, float]] = {}
    tensors: dict[str, Tensor] = {}

    def part(name: str, call):
        ranks.anyone(False)  # all begin together
        took = timed(call)
        times[name] = (took.wall, took.cpu)
        return took.result

    text = edit_bench.DATA / edit_bench.STATISTICS_TEXT
    moments = part("moments", lambda: kf.second_moments(lm, editor.layers, text, n_tokens=N_TOKENS))
    tensors |= {f"moments {layer}": moment.matrix for layer, moment in moments.items()}
    traces = part("trace", lambda: kf.trace(lm, facts, kinds=("state",), samples=1))
    tensors |= {f"trace {i}": torch.from_numpy(trace.p_restored) for i, trace in enumerate(traces)}
    edit = part("memit", lambda: editor.edit(lm, facts, moments=moments))
    tensors |= {"memit z": edit.values} | {f"memit Δ {c.layer}": c.delta.dense() for c in edit.changes}
    report = part("evaluation", lambda: kf.evaluate(lm, facts, edit))
    sides = {"base": report.base, "edited": report.edited}
    tensors |= {f"evaluation {side} {key}": x.nan_to_num(9) for side, of in sides.items() for key, x in of.items()}
    save_file({key: x.contiguous() for key, x in tensors.items()}, folder / f"{ranks.rank()}.safetensors")
    (folder / f"{ranks.rank()}.json").write_text(json.dumps(times))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    place = launch()
    with nullcontext() if place is None else ranks.launched(place):
        work(Path(sys.argv[1]), int(sys.argv[2]))
