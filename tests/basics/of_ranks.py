"""What ranks share, from moments to an evaluation, on a tiny model: ``python -m tests.basics.of_ranks FOLDER [NAME]``.

Each rank saves what came of it as FOLDER/rank-NUMBER.safetensors, and what errors said as .json. Unless one piece of
work is named, a command runs first, of the model in FOLDER/model, and in the end the second rank is killed.
"""

import json
import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import kedit_fast as kf
import kedit_fast.tracing.trace as tracing
from kedit_fast.basics import ranks
from kedit_fast.basics.catalog import CAPABILITY
from kedit_fast.basics.settings import launch
from kedit_fast.commands.cli import main
from kedit_fast.jobs import values
from tests.conftest import tiny_lm
from tests.make import make_edit

TEXTS = ["The Eiffel Tower is in the city of Paris. " * 12, "Miles Davis plays the trumpet in a band. " * 9] * 4


tracing.TOGETHER = 0  # rows: facts are traced one by one, so that dealing them keeps both ranks busy


def facts(n: int = 5) -> list[kf.Fact]:
    return kf.load_facts("builtin", n=n)


def moments_of(folder: Path) -> dict[str, Tensor]:
    """Of sampled text, kept on the way, and of given text."""
    lm = tiny_lm("llama")
    made = kf.second_moments(lm, [1, 2], n_tokens=3000, cache_dir=folder / "statistics")
    given = kf.second_moments(lm, [2], TEXTS, n_tokens=900)
    return {"sampled": made[1].matrix, "given": given[2].matrix}


def texts_of(folder: Path) -> dict[str, Tensor]:
    lm = tiny_lm("llama")
    prompts = ["The", "Miles Davis plays", "In the city of"]
    greedy, drawn = lm.generate(prompts, 6), lm.generate(prompts, 6, temperature=1.0, seed=3)
    return {"texts": torch.tensor(list("|".join([*greedy, *drawn]).encode()))}


def trace_of(folder: Path) -> dict[str, Tensor]:
    found = kf.trace(tiny_lm("llama"), facts(), samples=2, window=3, log=folder / "traces.jsonl")
    return {f"{i} {result.kind}": torch.from_numpy(result.p_restored) for i, result in enumerate(found)}


def edit_of(folder: Path) -> dict[str, Tensor]:
    """MEMIT of all facts, its parts kept; each of them as a ROME edit of its own; FT; what the evaluation says."""
    lm, made = tiny_lm("llama"), {}
    moments = kf.second_moments(lm, [1, 2], TEXTS, n_tokens=900)
    memit = kf.Memit(layers=(1, 2), mom2_update_weight=10.0, v_num_grad_steps=5, v_loss_layer=3)
    rome = kf.Rome(layers=(1,), v_num_grad_steps=5, context_template_length_params=((3, 2),))
    edits = {
        "memit": memit.edit(lm, facts(), moments=moments, checkpoint=folder / "parts"),
        "rome": rome.edit(lm, facts(3), moments=moments, independent=True),
        "ft": kf.Ft(layers=(1,), num_steps=3).edit(lm, facts(3)),
    }
    for name, edit in edits.items():
        made |= {f"{name} {key}": x for change in edit.changes for key, x in change.tensors().items()}
        report = kf.evaluate(lm, edit.facts, edit, text=None if name == "rome" else TEXTS, generate=3)
        columns = {"base": report.base, "edited": report.edited}
        made |= {f"{name} {side} {key}": x.nan_to_num(9) for side, of in columns.items() for key, x in of.items()}
        if report.perplexity:
            made[f"{name} perplexity"] = torch.tensor(report.perplexity)
    made["z"] = edits["memit"].values
    return made


def moved_of(folder: Path) -> dict[str, Tensor]:
    lm = tiny_lm("llama")
    texts = {"tower": " ".join(TEXTS[::2]), "band": " ".join(TEXTS[1::2])}
    found = kf.what_moved(lm, make_edit(lm.model), facts(3), texts=texts)
    drifts = torch.tensor([[one.base, one.edited, *one.drift] for one in found.drifts.values()])
    sides = torch.tensor([[*both.base, *both.edited] for both in found.measures.values()])
    return {"drifts": drifts, "measures": sides.nan_to_num(9)}


def capability_of(folder: Path) -> dict[str, Tensor]:
    """The harness gives its results to the first process of a host alone."""
    lm = tiny_lm("llama")
    found = kf.capability(lm, CAPABILITY, make_edit(lm.model), limit=6)
    scores = [x for of_task in found.scores.values() for x in of_task.values()]
    return {"capability": torch.tensor([[x.base, x.edited, *x.difference] for x in scores])}


WORK = {"moments": moments_of, "texts": texts_of, "trace": trace_of, "edit": edit_of, "moved": moved_of}
WORK |= {"capability": capability_of} if find_spec("lm_eval") else {}


def everything(folder: Path) -> dict[str, Tensor]:
    return {f"{name} {key}": x.contiguous() for name, work in WORK.items() for key, x in work(folder).items()}


def errors(folder: Path) -> list[str]:
    """What is said of what goes wrong on one rank; in the end one of two is killed, and the other tells."""
    said = []

    def expect(kind: type[Exception], call) -> None:
        try:
            call()
        except kind as error:
            said.append(str(error))

    def fail(some) -> dict:
        if 3 in some:
            raise MemoryError("no room for 3")
        return {"some": torch.tensor(some)}

    @ranks.joint()
    def refuse() -> None:
        if ranks.rank():
            raise FileNotFoundError("no such file")

    expect(MemoryError, lambda: ranks.shared([1, 2, 3, 4], fail))
    expect(OSError, refuse)
    expect(ValueError, lambda: ranks.agreed({"number of facts": 5 + ranks.rank()}))
    said.append(str(ranks.gathered_json(ranks.rank())))  # the group goes on
    began = time.monotonic()
    if ranks.rank() == 1:
        values._side_by_side = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    expect(ConnectionError, lambda: begun_and_killed(folder))
    return [*said, str(time.monotonic() - began < 20)]


def begun_and_killed(folder: Path | None) -> kf.Edit:
    """An edit of which one rank may be killed while it optimizes its values, when the other's are there."""
    editor = kf.Memit(layers=(1, 2), mom2_adjustment=False, v_num_grad_steps=5, v_loss_layer=3)
    return editor.edit(tiny_lm("llama"), facts(), contexts=["{}"], checkpoint=folder and folder / "killed")


def command(folder: Path) -> int:
    """Traces of the model in the folder, by the command line."""
    given = ["--facts", "builtin", "-n", "3", "--samples", "1", "--kinds", "state", "--plots", "1"]
    return main(["trace", "--model", str(folder / "model"), *given, "-o", str(folder / "command")])


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if not sys.argv[2:]:
        assert command(where) == 0
        os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]  # a group's first process may still hold the first one
    with ranks.launched(launch()):
        found = (WORK[sys.argv[2]] if sys.argv[2:] else everything)(where)
        save_file(found, where / f"rank-{ranks.rank()}.safetensors")
        if not sys.argv[2:]:
            said = errors(where)
            (where / f"rank-{ranks.rank()}.json").write_text(json.dumps(said))
