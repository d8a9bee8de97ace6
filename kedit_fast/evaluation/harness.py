"""General capability: lm-evaluation-harness, run on a model without and with its edits.

Tasks, metrics and rules are the library's own (Gao et al., the Language Model Evaluation Harness; ``pip install
'kedit-fast[harness]'``). Two small tasks lie in ``evaluation/tasks`` and need no network: ``kedit_common``, sixty
questions of everyday knowledge with four answers each, and ``kedit_short``, forty lines to be completed by one word.
"""

import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from kedit_fast import __version__
from kedit_fast.basics import checks, ranks
from kedit_fast.basics.files import existing_folder
from kedit_fast.basics.intervals import Interval, paired
from kedit_fast.basics.words import did_you_mean
from kedit_fast.edits.chain import with_edits
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation.evaluate import about
from kedit_fast.evaluation.scores import Capability, Score
from kedit_fast.evaluation.tasks import FOLDER
from kedit_fast.facts.tokens import check_template
from kedit_fast.model.lm import LM, takes_lm

MISSING = "lm-evaluation-harness (lm_eval) is not installed: pip install 'kedit-fast[harness]'"
STDERR = "_stderr"


@takes_lm
def capability(
    lm: LM,
    tasks: str | Iterable[str],
    edit: Edit | Iterable[Edit] | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    task_folder: checks.AnyPath | None = None,
    chat: bool = False,
    seed: int = 0,
) -> Capability:
    """What tasks of lm-evaluation-harness are worth to the model without and with its edits.

        print(kf.capability(lm, ["kedit_common", "kedit_short"], edit))

    tasks: names of tasks, groups or tags: this package's two, those of ``task_folder``, and the harness's own, which
        fetch their documents from the Hugging Face hub
    edit: as in ``evaluate``; base is the model without any of them. Requests that are read go up in shared sweeps of
        both models, texts are written by one after the other
    limit: the first documents of each task; num_fewshot: examples before each, where the task does not fix them
    task_folder: with task files of one's own, in the harness's format. One may name Python functions, which run, so
        take none from people you do not trust; paths in it are as the harness reads them, or see ``evaluation.tasks``
    chat: ask in the model's own chat template; seed: of the examples' choice, and of sampled text

    Raises ImportError where the harness is not installed, ValueError for tasks that it does not know or cannot load,
    independent edits, an edit for another model, generation settings that this package does not have, and NaN of the
    base model; TypeError for anything but an Edit.
    """
    names = [checks.text("tasks", name) for name in checks.listed("tasks", tasks, str, 'tasks, e.g. "kedit_common"')]
    how = {
        "limit": checks.optional(checks.whole, "limit", limit, least=1, like=100),
        "num_fewshot": checks.optional(checks.whole, "num_fewshot", num_fewshot, like=5),
        "apply_chat_template": checks.flag("chat", chat),
        **dict.fromkeys(("random_seed", "numpy_random_seed", "fewshot_random_seed"), checks.seed("seed", seed)),
    }
    folder = None
    if task_folder is not None:
        folder = existing_folder(checks.path("task_folder", task_folder), "a folder of task files", "in .yaml files")
    lm = with_edits(lm, edit, "edit")
    if chat:
        check_template(lm.tokenizer)
    harness = _harness()
    edited = harness.HarnessLM(lm, seed=seed)
    models = [harness.HarnessLM(replace(lm, edits=()), seed=seed, edited=edited), edited] if lm.edits else [edited]
    meta = about(lm) | {"method": " + ".join(edit.method for edit in lm.edits) or None}
    meta |= {"layers": sorted({layer for edit in lm.edits for layer in edit.layers})}
    meta |= {"limit": limit, "chat": chat, "seed": seed, "harness": version("lm_eval"), "version": __version__}
    with _quiet(), _own_draws(), ranks.joint():
        manager = _manager(names, folder)
        found = [_run(model, manager, names, how) for model in models]
    made = None if None in found else Capability(_scores(*found), meta | _asked(found[0])).to_record()
    return Capability.from_record(next(one for one in ranks.gathered_json(made) if one is not None))


def _harness() -> Any:
    """The module of the adapter, which needs the library."""
    try:
        import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ImportError(MISSING) from error
    return import_module("kedit_fast.evaluation.harness_lm")


# ---- what is run


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells of its settings at each run, and draws a bar while it writes out requests, which takes
    milliseconds; its errors alone are of interest here."""
    from lm_eval.api import task

    logger, drawn = logging.getLogger("lm_eval"), task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = drawn


@contextmanager
def _own_draws() -> Iterator[None]:
    """The harness seeds the process's generators; they go on afterwards as if nothing had been."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """What loads these tasks, once for both models: the harness's own are looked through (14,000 files) where others
    lack one. Raises ValueError for a name that nobody knows, and for a task that cannot be loaded."""
    from lm_eval.tasks import TaskManager

    folders = [FOLDER] if folder is None else [FOLDER, folder]
    for include_defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=include_defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            break
    else:
        raise ValueError(
            f"tasks = {unknown[0]!r}: neither the harness (`lm-eval ls tasks`) nor the task folder has it, where a "
            f"file that is no task is passed over{did_you_mean(unknown[0], manager.all_tasks)}"
        )
    try:
        loaded = manager.load(list(names))
    except OSError:
        raise
    except Exception as error:  # a task file may say anything, and name functions
        raise ValueError(f"tasks = {names}: the harness cannot load them: {error!r}") from error
    manager.load = lambda _: loaded
    return manager


def _run(model: Any, manager: Any, names: Sequence[str], how: dict) -> Any:
    """The harness's results for one model; of several processes on a host it gives them to the first alone."""
    from lm_eval import simple_evaluate

    # It asks git for the commit of the working folder, and git writes an error to the terminal where that is none.
    with patch("lm_eval.evaluator.get_git_commit_hash", return_value=None):
        return simple_evaluate(model, tasks=list(names), task_manager=manager, torch_random_seed=None, **how)


# ---- what came of it


def _scores(base: dict, edited: dict | None = None) -> dict[str, dict[str, Score]]:
    """{task or group: {metric: Score}} of the harness's results for one model, or for both."""
    return {
        task: {
            key.removesuffix(",none"): _score(task, key, base, edited)
            for key, value in row.items()
            if "," in key and STDERR not in key and isinstance(value, int | float)
        }
        for task, row in base["results"].items()
    }


def _score(task: str, key: str, base: dict, edited: dict | None) -> Score:
    metric, _, chosen = key.partition(",")
    higher = base["higher_is_better"].get(task, {}).get(metric)
    n = int(base["results"][task].get("sample_len", 0))
    before, after = (
        None if found is None else _value(found["results"][task], metric, chosen) for found in (base, edited)
    )
    assert before is not None
    if edited is None or after is None:
        return Score(*before, None, None, None, n, higher)
    columns = [_by_document(found, task, metric, chosen) for found in (base, edited)]
    if columns[0].keys() != columns[1].keys() or not all(map(_is_mean, columns, (before[0], after[0]))):
        return Score(*before, *after, Interval(after[0] - before[0], math.nan, math.nan, 0), n, higher)
    base_values, values = (torch.tensor([column[i] for i in columns[0]], dtype=torch.float64) for column in columns)
    return Score(*before, *after, paired(base_values, values), n, higher)


def _value(row: dict, metric: str, chosen: str) -> tuple[float, float]:
    """(value, standard error); a filter is ``chosen``. The harness says "N/A" for an error that it does not have."""
    stderr = row.get(f"{metric}{STDERR},{chosen}")
    return float(row[f"{metric},{chosen}"]), float(stderr) if isinstance(stderr, int | float) else math.nan


def _by_document(found: dict, task: str, metric: str, chosen: str) -> dict[int, float]:
    """{document: value}; empty for a group, and where a document's value is no number."""
    samples = [one for one in found["samples"].get(task, ()) if one["filter"] == chosen and metric in one]
    if not all(isinstance(one[metric], int | float | np.number) for one in samples):
        return {}
    return {one["doc_id"]: float(one[metric]) for one in samples}


def _is_mean(values: dict[int, float], of_all: float) -> bool:
    """Whether a metric's value is the mean of its documents'."""
    return bool(values) and math.isclose(math.fsum(values.values()) / len(values), of_all, rel_tol=1e-9, abs_tol=1e-12)


def _asked(found: dict) -> dict:
    """What a report says of its tasks."""
    return {
        "tasks": {name: found["versions"].get(name) for name in found["results"]},
        "n_shot": {name: n for name, n in found["n-shot"].items() if isinstance(n, int)},
    }
