"""The verdict on one hostile input: refused in words that help, taken and right, or wrong; and what makes it wrong."""

import contextlib
import hashlib
import io
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kedit_fast.commands.cli import main

REFUSED, TAKEN, WRONG = "refused in words", "taken and right", "wrong"
SLOW = 60.0  # seconds; a hostile input that keeps a machine busy is one that was not refused
FOREIGN = (  # words of Python, torch, numpy and the system that say nothing to whoever gave the input
    "[Errno", "NoneType", "unexpected keyword", "positional argument", "not subscriptable", "unhashable",
    "has no attribute", "list index", "codec can't", "invalid literal", "could not convert", "enforce fail",
    "Expected one of cpu", "unsupported operand", "object is not", "cannot unpack", "must be real number",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A hostile input. run: gives it to the package; truth: whether what came back is right, where it was taken
    (None: it must be refused); folder: looked at before and after."""

    name: str
    run: Callable
    truth: Callable | None = None


@dataclass(frozen=True)
class Found:
    case: str
    verdict: str
    words: str


class CommandError(ValueError):
    """What a command said on stderr, for its status 2."""


def command(*argv: str) -> Callable:
    """Runs a command line in this process; gives what it printed. Raises CommandError with what it refused in."""

    def run() -> str:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(list(argv))
            except SystemExit as ended:  # argparse
                status = ended.code
        if status == 2:
            raise CommandError(err.getvalue())
        return out.getvalue()

    return run


def files_of(folder: Path) -> dict[str, str]:
    """{name: digest} of every file, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()
    }  # fmt: skip


def weights_of(model: torch.nn.Module) -> str:
    """A digest of a model's weights and of what is set on it."""
    made = hashlib.sha256(f"{model.training} {sum(len(m._forward_hooks) for m in model.modules())}".encode())
    for name, tensor in model.state_dict().items():
        made.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def global_state() -> tuple:
    """What a caller has set for the whole process."""
    return (
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.initial_seed(), str(Path.cwd()),
    )  # fmt: skip


def judge(case: Case, folder: Path, model: torch.nn.Module | None = None) -> Found:
    """Runs a case and looks at what it said and left. folder: where files may be written; model: that must not change.

    A file that a case was allowed to write is for its truth to look at: it is given the files that are new.
    """
    before = files_of(folder), model and weights_of(model), global_state()
    began, error, given = time.monotonic(), None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            given = case.run()
        except Exception as raised:
            error = raised
    after = files_of(folder), model and weights_of(model), global_state()
    fault = _fault_of(error) if error is not None else _not_right(case, given)
    if time.monotonic() - began > SLOW:
        fault = f"took {time.monotonic() - began:.0f} s"
    if before[1] != after[1]:
        fault = "left the model changed"
    if before[2] != after[2]:
        fault = f"left the process changed: {before[2]} became {after[2]}"
    left = [name for name in after[0] if before[0].get(name) != after[0][name]]
    gone = [name for name in before[0] if name not in after[0]]
    if error is not None and (left or gone):
        fault = f"refused, and left {left or 'nothing of'} {gone}"
    if any("unfinished" in name or name.endswith(".older") for name in left):
        fault = f"left half-written {left}"
    if fault:
        return Found(case.name, WRONG, fault)
    return Found(case.name, TAKEN if error is None else REFUSED, "" if error is None else str(error).strip())


def _not_right(case: Case, given) -> str:
    if case.truth is None:
        return f"was taken: {str(given)[:120]!r}"
    try:
        return "" if case.truth(given) else f"was taken, and is not right: {str(given)[:120]!r}"
    except Exception as error:
        return f"was taken, and cannot be looked at: {error!r}"


def _fault_of(error: Exception) -> str:
    """What is wrong with how an input was refused; "" for nothing."""
    text = str(error).strip()
    if isinstance(error, CommandError):
        if "Traceback" in text or "Error:" in text:
            return f"a traceback: {text[-200:]!r}"
        where = "kedit_fast"
    else:
        if not isinstance(error, ValueError | TypeError | OSError):
            return f"{type(error).__name__} from within: {text[:160]!r}"
        where = traceback.extract_tb(error.__traceback__)[-1].filename
    if "kedit_fast" not in where or "site-packages" in where:
        return f"{type(error).__name__} from {where}: {text[:160]!r}"
    if len(text) < 15 or any(words in text for words in FOREIGN):
        return f"not in words that help: {text[:200]!r}"
    return ""
