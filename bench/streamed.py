"""A model under a hard limit of a third of its size, against the same model in memory: the same bits, and the time.

A checkpoint in Llama-3's shape with random weights is written. Three processes then trace, measure, edit, evaluate and
merge it: one with its layers from disk and a limit that the system enforces (a control group, where one may be made),
one with all weights in memory that is cut alike, whose results are the reference, and one in memory that cuts as it
likes, whose times are. The files are in the page cache when they begin.
"""

import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import kedit_fast as kf
from bench.common import ROOT, CheckFailed, Figure, Measured, peak_matmul
from bench.flows import random_facts, word_tokenizer
from bench.mass import random_edits
from kedit_fast.edits.deltas import Dense
from kedit_fast.model.placement import place
from kedit_fast.model.shape import shape_of
from kedit_fast.model.source import Resident
from kedit_fast.shipping.merge import merge_checkpoint

SHAPES = {  # d, d_ff, layers, heads, key heads, words
    True: (128, 352, 60, 4, 2, 1_000),
    False: (1536, 4096, 30, 12, 4, 16_384),
}
FACTS, STEPS, LAYERS = 20, 4, (3, 4)
PYTHON = 440_000_000  # bytes of the limit that Python, torch and the allocator take themselves
SHARE = 3  # the limit is the checkpoint's size over this
MARK = "<= 1.3"
GROUP = "KEDIT_FAST_BENCH_GROUP"  # in a process's environment: the control group that it belongs to


class CutAlike(Resident):
    """Layers in memory, for which work is cut as for layers that come from disk."""

    in_memory, pass_bytes = False, 1


def run(options) -> Measured:
    """The benchmark as the command line asks for it."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        n_bytes = write_checkpoint(model, options.quick)
        limit = PYTHON + n_bytes // 5 * 4 if options.quick else n_bytes // SHARE
        made = {way: _in_a_process(way, model, limit, options.threads) for way in ("resident", "disk", "alike")}
        _check(*(torch.load(model.parent / f"{way}.pt") for way in ("disk", "alike")))
        files = sorted(path.name for path in model.iterdir())
        differing = filecmp.cmpfiles(model.parent / "merged disk", model.parent / "merged alike", files, shallow=False)
        if differing[1] or differing[2]:
            raise CheckFailed(f"merged checkpoints differ in {differing[1] + differing[2]}")
    return _measured(made, n_bytes, limit)


def write_checkpoint(folder: Path, tiny: bool) -> int:
    """A Llama of random weights, in shards, with a tokenizer of words; bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    d, d_ff, layers, heads, key_heads, words = SHAPES[tiny]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=d, intermediate_size=d_ff, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=words, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder, max_shard_size="500KB" if tiny else "500MB")
    word_tokenizer(words).save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


# ---- in a process of its own


def work(way: str, folder: Path, limit: int) -> None:
    """All phases; their results as tensors in a file beside the model, their times as a line of JSON."""
    phases: dict[str, dict[str, float]] = {}
    results: dict[str, Tensor] = {}
    lm = _timed(phases, "open", lambda: _opened(way, folder, limit - PYTHON))
    source = lm.source
    for name, phase in _phases(lm, way, folder).items():
        waited = getattr(source, "waited", 0.0)
        results |= _timed(phases, name, phase)
        phases[name]["waited"] = getattr(source, "waited", 0.0) - waited
    told = {"phases": phases, "placement": str(lm.placement), "held": _high_water()}
    torch.save(results, folder.parent / f"{way}.pt")
    print(json.dumps(told))


def _opened(way: str, folder: Path, memory: int) -> kf.LM:
    """With layers from disk, in memory and cut like that, or in memory."""
    if way == "disk":
        return kf.open_model(folder, memory=memory)
    lm = kf.open_model(folder)
    if way == "resident":
        return lm
    placed = place(shape_of(lm.model.config, lm.dtype), memory, lm.device)
    return replace(lm, source=CutAlike(lm.model), memory=placed.work)


def _phases(lm: kf.LM, way: str, folder: Path) -> dict[str, Callable[[], dict[str, Tensor]]]:
    n_words = lm.n_vocab
    traced, facts = random_facts(1, n_words), random_edits(FACTS, n_words)
    text = " ".join(f"w{i * 7919 % n_words}" for i in range(2 * lm.d_ff + 1000))
    editor = kf.Memit(layers=LAYERS, v_num_grad_steps=STEPS, mom2_update_weight=float(lm.d_ff), regularizer=1e-4)
    held: dict[str, object] = {}

    def trace():
        found = kf.trace(lm, traced, kinds=("state",), samples=2, noise=0.1)
        return {f"trace {i}": torch.from_numpy(each.p_restored.copy()) for i, each in enumerate(found)}

    def statistics():
        kept = folder.parent / f"statistics {way}"  # of which the matrices are views then
        held["moments"] = kf.second_moments(lm, LAYERS, [text], n_tokens=lm.d_ff + 500, cache_dir=kept)
        return {f"C {layer}": moment.matrix for layer, moment in held["moments"].items()}

    def edit():
        held["edit"] = made = editor.edit(lm, facts, moments=held["moments"], contexts=[["{}"], ["w1 w2 w3 . {}"]])
        tensors = {"z": made.values} | {f"keys {layer}": keys for layer, keys in made.keys.items()}
        for layer, delta in made.deltas.items():
            parts = {"delta": delta.delta} if isinstance(delta, Dense) else {"u": delta.u, "v": delta.v}
            tensors |= {f"{name} {layer}": tensor for name, tensor in parts.items()}
        return tensors

    def tune():
        made = kf.Ft(layers=(LAYERS[-1],), num_steps=2).edit(lm, facts[:2])
        return {"tuned": made.deltas[LAYERS[-1]].dense()}

    def evaluate():
        report = kf.evaluate(lm, facts, held["edit"], text=text[:8000], generate=2)
        return {f"before {name}": x for name, x in report.base.items()} | {
            f"after {name}": x for name, x in report.edited.items()
        }

    def merge():
        merge_checkpoint(folder, held["edit"], folder.parent / f"merged {way}")
        return {}

    phases = (trace, statistics, edit, tune, evaluate, merge)
    return {phase.__name__: phase for phase in phases}


def _timed(phases: dict, name: str, phase: Callable):
    began, cpu = time.perf_counter(), time.process_time()
    made = phase()
    phases[name] = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    return made


def _high_water() -> dict[str, float]:
    """The most that this process has held, and its control group where it has one of ours, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    marks = {"resident at its height": 1024 * int(status["VmHWM"].split()[0])}
    if group := os.environ.get(GROUP):
        peak = next(p for n in ("memory.peak", "memory.max_usage_in_bytes") if (p := Path(group, n)).exists())
        marks["control group at its height, page cache included"] = int(peak.read_text())
    return marks


def _control_group(n_bytes: int) -> Path | None:
    """A new memory control group with this limit; None where none can be made."""
    for _, controllers, own in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()):
        second = not controllers  # version 2 has one tree for all
        if not second and "memory" not in controllers.split(","):
            continue
        group = Path("/sys/fs/cgroup", "" if second else "memory", own.strip("/"), f"kedit_fast_{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
            (group / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(n_bytes))
            return group
    return None


# ---- around it


def _in_a_process(way: str, folder: Path, limit: int, threads: int) -> dict:
    """One way of the work, from its start under the limit where it is for that."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):  # into the page cache, by no process that is measured
                pass
    code = f"import torch; torch.set_num_threads({threads}); from bench.streamed import Path, work; "
    code += f"work({way!r}, Path({str(folder)!r}), {limit})"
    group = _control_group(limit) if way == "disk" else None
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), GROUP: str(group or "")}

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, preexec_fn=join, check=False
    )
    if group is not None:
        group.rmdir()
    if done.returncode:
        raise CheckFailed(f"{way}: ended with {done.returncode} under {limit / 1e9:.2f} GB: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"limited": group is not None}


def _check(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    same = {name: torch.equal(ours[name].nan_to_num(-1), x.nan_to_num(-1)) for name, x in reference.items()}
    differing = [name for name, equal in same.items() if not equal]
    if ours.keys() != reference.keys() or differing:
        raise CheckFailed(f"{len(differing)} of {len(reference)} tensors differ from those in memory: {differing[:8]}")


def _measured(made: dict, n_bytes: int, limit: int) -> Measured:
    phases, rows = list(made["disk"]["phases"]), []
    for phase in phases:
        disk, resident = (made[way]["phases"][phase] for way in ("disk", "resident"))
        rows.append(Figure(phase, "from disk", disk["wall"], "s"))
        rows.append(Figure(phase, "in memory", resident["wall"], "s"))
        if phase not in ("open", "merge"):
            rows.append(Figure(phase, "of it waiting for a layer", disk["waited"], "s"))
    total = {way: sum(each["wall"] for each in made[way]["phases"].values()) for way in made}
    held = made["disk"]["held"]
    rows += [
        Figure("all", "from disk", total["disk"], "s"),
        Figure("all", "in memory", total["resident"], "s"),
        Figure("all", "ratio", total["disk"] / total["resident"], "x", mark=MARK),
    ]
    notes = [
        f"a checkpoint of {n_bytes / 1e9:.2f} GB under a limit of {limit / 1e9:.2f} GB: all tensors of trace, "
        "statistics, edit, fine-tuning and evaluation equal bit for bit those of the model in memory that is cut "
        "alike, and so do the merged files",
        "held: " + ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in held.items()),
        "limit: " + ("by a control group" if made["disk"]["limited"] else "not enforced: no control group may be made"),
        *made["disk"]["placement"].splitlines(),
    ]
    return Measured(rows, peak_matmul(), notes)
