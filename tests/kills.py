"""Commands that are killed and given again: ``python -m tests.kills --n 60 --seed 0``.

Each command runs on a tiny model in a process of its own, which is killed with SIGKILL at a moment that is drawn: after
a share of the time that it takes, or at one of its calls of the system that give files their names (before it, after
it, or with the file cut in half as a lost machine leaves it). Then the same command is given again. What lies in its
folder in the end has to be, byte for byte, what an uninterrupted run leaves there, and nothing else.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from tests.conftest import save_tiny
from tests.tiny import D_FF, TEXT, tiny_model

CALLS = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")  # of ``os``, at which a process is killed
WHERE = ("before", "after", "torn")
NAMES = (
    ("The Eiffel Tower", "Rome", "Paris"), ("Big Ben", "Seattle", "London"), ("The Space Needle", "Rome", "Seattle"),
    ("The Louvre", "London", "Paris"), ("Vimeo", "Madrid", "Rome"), ("Toyota Camry", "Paris", "Tokyo"),
)  # fmt: skip
FAST = {"layers": [1, 2], "v_num_grad_steps": 3, "context_template_length_params": [[4, 2]], "mom2_update_weight": 80.0}


@dataclass(frozen=True)
class Kill:
    """When a process is killed: after ``seconds``, or at its ``call``-th call of the system (from 0): ``where``."""

    seconds: float = 0.0
    call: int | None = None
    where: str = "before"

    def __str__(self) -> str:
        return f"after {self.seconds:.2f} s" if self.call is None else f"{self.where} call {self.call}"


@dataclass(frozen=True)
class Ended:
    """How a process ended. status: its exit status, -9 where it was killed; calls: of the system, until then"""

    status: int
    calls: int
    seconds: float
    said: str


class Bench:
    """The inputs of all commands, and what uninterrupted runs of them leave. folder: for all of it"""

    def __init__(self, folder: Path):
        self.folder = folder
        model = save_tiny(folder / "model", tiny_model("llama"))
        text = folder / "text.txt"
        text.write_text(TEXT)
        self.facts, self.hparams, self.edit = folder / "facts.json", folder / "memit.json", folder / "edit.safetensors"
        asked = "{} is in the city of"
        self.facts.write_text(json.dumps([
            {"prompt": asked, "subject": name, "target_new": new, "target_true": true,
             "paraphrases": [f"{name} is in"], "neighborhood": ["The Pantheon is in the city of"]}
            for name, new, true in NAMES
        ]))  # fmt: skip
        self.hparams.write_text(json.dumps(FAST))
        model, facts = ("--model", str(model), "--memory", "40MB"), ("--facts", str(self.facts))
        settings = (*facts, "--hparams", str(self.hparams), "--tokens", str(4 * D_FF))
        edit = str(self.edit)
        self.commands: dict[str, tuple[str, ...]] = {
            "trace": ("trace", *facts, "--samples", "2", "--kinds", "state", "--plots", "1", *model, "-o", "out"),
            "stats": ("stats", "--layers", "1,2", "--tokens", "2100", *model, "-o", "stats"),
            "edit": ("edit", *settings, *model, "-o", "one.safetensors"),
            "eval": (
                "eval", edit, "--generate", "4", "--text", str(text), "--log", "log.jsonl", *model, "-o", "r.json",
            ),
            "rounds": ("rounds", *settings, "--per-round", "2", "--log", "log.jsonl", *model, "-o", "rounds.json"),
            "layers": (
                "layers", *facts, "--layers", "0,2", "--tokens", "300", "--samples", "2", *model, "-o", "l.json",
            ),
            "merge": ("merge", edit, "--model", str(folder / "model"), "-o", "merged"),
            "history": ("history", "add", "edits", edit, "-m", "why"),
        }  # fmt: skip
        made = self.run(("edit", *settings, *model, "-o", edit), folder / "making")
        assert made.status == 0, made.said
        self.whole_of: dict[str, tuple[Ended, dict[str, str]]] = {}

    def whole(self, name: str) -> tuple[Ended, dict[str, str]]:
        """(how an uninterrupted run of a command ends, the digests of the files that it leaves)."""
        if name not in self.whole_of:
            ended = self.run(self.commands[name], self.folder / f"whole-{name}")
            assert ended.status == 0, ended.said
            self.whole_of[name] = ended, files_of(self.folder / f"whole-{name}")
        return self.whole_of[name]

    def run(self, argv, work: Path, kill: Kill | None = None) -> Ended:
        """Runs a command in a process of its own, in the folder ``work``."""
        work.mkdir(exist_ok=True)
        said, counted = self.folder / "said.txt", self.folder / "calls.txt"
        began = time.monotonic()
        child = os.fork()
        if not child:
            _command(argv, work, said, counted, kill)
        if kill is not None and kill.call is None:
            while time.monotonic() - began < kill.seconds and not os.waitid(
                os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Ended(status, counted.stat().st_size, time.monotonic() - began, said.read_text(errors="replace"))

    def check(self, name: str, kills: list[Kill], work: Path) -> str:
        """Kills a command at each of these moments and gives it once more; what is wrong with what is left, or ""."""
        whole = self.whole(name)[1]
        for kill in kills:
            if (ended := self.run(self.commands[name], work, kill)).status not in (0, -signal.SIGKILL):
                if files_of(work) == whole:
                    continue
                return f"ended with {ended.status}: {ended.said[-300:]}"
        ended = self.run(self.commands[name], work)
        left = files_of(work)
        if ended.status and left != whole:  # of what is whole the command says that it is there already
            return f"given again: status {ended.status}: {ended.said[-300:]}"
        differing = sorted(path for path in {**whole, **left} if whole.get(path) != left.get(path))
        return f"differs: {differing}" if differing else ""


def files_of(folder: Path) -> dict[str, str]:
    """{name: digest} of all files and folders in a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


def _command(argv, work: Path, said: Path, counted: Path, kill: Kill | None) -> None:
    """The process of a command; never comes back."""
    status = 70
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(i, "w", closefd=False) for i in (1, 2))
        os.chdir(work)
        os.environ["KEDIT_FAST_CACHE"] = str(work / "cache")
        from kedit_fast.commands import cli
        from kedit_fast.experiments import rounds
        from kedit_fast.shipping import history, merge

        history.now = merge.now = lambda: "2026-01-01T00:00:00+00:00"
        rounds.time = SimpleNamespace(perf_counter=lambda: 0.0)
        _watch_calls(os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), kill)
        status = cli.main([*argv, "--quiet"])
        sys.stdout.flush()
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _watch_calls(counted: int, kill: Kill | None) -> None:
    """Counts this process's calls of the system, a byte each, and ends it at the one that it is to be killed at."""
    calls = 0

    def watching(call: Callable) -> Callable:
        def watched(*args, **kwargs):
            nonlocal calls
            here = kill is not None and kill.call == calls
            calls += 1
            os.write(counted, b".")
            if here and kill.where == "torn" and call.__name__ == "fsync":
                with suppress(OSError):  # a folder's
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            if here and kill.where != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            made = call(*args, **kwargs)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        return watched

    for name in CALLS:
        setattr(os, name, watching(getattr(os, name)))


def drawn(bench: Bench, name: str, rng: random.Random) -> list[Kill]:
    """One kill of a command, or two, at moments that are drawn."""
    ended, _ = bench.whole(name)
    kills = []
    for _ in range(rng.choice((1, 1, 2))):
        by_time = rng.random() < 0.5
        at_call = Kill(call=rng.randrange(max(1, ended.calls)), where=rng.choice(WHERE))
        kills.append(Kill(seconds=rng.random() * ended.seconds) if by_time else at_call)
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=60, help="commands that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    done, wrong = Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        names = [args.only] if args.only else list(bench.commands)
        for i in range(args.n):
            name = names[i % len(names)]
            kills = drawn(bench, name, rng)
            fault = bench.check(name, kills, Path(folder, f"work-{i}"))
            done[name] += 1
            wrong[name] += bool(fault)
            print(f"{i:3} {name:8} {', '.join(map(str, kills)):40} {fault or 'the same bits'}", flush=True)
        print(f"\n{'command':10}{'killed':>8}{'other bits':>12}{'seconds':>9}{'calls':>7}")
        for name in names:
            ended = bench.whole(name)[0]
            print(f"{name:10}{done[name]:8}{wrong[name]:12}{ended.seconds:9.2f}{ended.calls:7}")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
