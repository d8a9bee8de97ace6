"""Whether it works at all: each op once a dtype against its truth, then tiny flows on the device against the CPU."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

import kedit_fast as kf
from bench.common import CheckFailed
from bench.gpu.session import Session
from bench.gpu.watch import wait_for
from bench.kernel_cases import OPS, OURS
from bench.kernels import NAMES, Problem, checked
from bench.shapes import SHAPES, Setup
from kedit_fast.editors.located import Prompts
from kedit_fast.jobs.values import optimize_values
from kedit_fast.kernels.dispatch import backend_for
from tests.tiny import PROMPTS, TEXT, tiny_model, tiny_tokenizer

FAMILIES = ("gpt2", "llama", "gptj")
SMALLER, ROWS = {"cuda": 8, "cpu": 64}, {"cuda": 1536, "cpu": 96}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIFFERENCE = 1e-3  # of a flow in fp32 between device and CPU
FACTS = [kf.Fact(p.template, p.subject, target_new=new) for p, new in zip(PROMPTS[:2], ("Rome", "London"), strict=True)]
CONTEXTS = [["{}"], ["It is said. {}"]]


def smoke(session: Session) -> None:
    """Each op and each flow by itself: what goes wrong with one is noted, and the next runs."""
    session.book.notes = [f"widths of llama-3-8b / {SMALLER[session.device.type]}; tiny models of four layers in fp32."]
    for name, op in OPS.items():
        for kind in op.cases:
            for dtype in DTYPES if torch.float64 not in op.dtypes else op.dtypes:
                if session.has(2, f"{name} {NAMES[dtype]}"):
                    problem = _problem(session, name, kind, dtype)
                    session.trying(problem.name, lambda problem=problem: _op(session, problem))
    for family in FAMILIES[: 1 if session.dry else None]:
        if session.has(3, f"tiny {family}"):
            session.trying(f"tiny {family}", lambda family=family: flows(session, family))


def _problem(session: Session, name: str, kind: str, dtype: torch.dtype) -> Problem:
    device = session.device
    setup = Setup(SHAPES["llama-3-8b"].smaller(SMALLER[device.type]), dtype, device, ROWS[device.type])
    return Problem(" ".join(filter(None, [name, kind, NAMES[dtype]])), OPS[name], kind, setup)


def _op(session: Session, problem: Problem) -> None:
    """The op's error; the first call's time, which compiles, and the second's."""
    case = problem.made()
    with torch.no_grad():
        first, second = (_seconds(case.providers[OURS], session.device) for _ in range(2))
        error = checked(problem, case, OURS)
    backend = backend_for(case.backend[0], session.device, case.backend[1])
    rows = [("first call", first, "s"), ("second call", second, "s"), ("relative error", error, "difference")]
    session.book.tell(f"{problem.name} ({backend})", rows)


def _seconds(work: Callable, device: torch.device) -> float:
    wait_for(device)
    began = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - began


def flows(session: Session, family: str) -> None:
    """Trace, z and a whole edit of a tiny model on the device and on the CPU. Raises CheckFailed where they differ."""
    here, there = (_flows(_opened(family, device)) for device in (torch.device("cpu"), session.device))
    rows = [(name, _difference(there[name], here[name]), "difference") for name in here]
    session.book.tell(
        f"tiny {family}, {session.device.type} to CPU", rows, marks={name: f"<= {DIFFERENCE:g}" for name in here}
    )
    if wrong := [f"{name} by {value:.1e}" for name, value, _ in rows if not value <= DIFFERENCE]:
        raise CheckFailed(f"{', '.join(wrong)}, allowed {DIFFERENCE:g}")


def _opened(family: str, device: torch.device) -> kf.LM:
    return kf.open_model(tiny_model(family).to(device), tokenizer=tiny_tokenizer())


def _flows(lm: kf.LM) -> dict[str, np.ndarray]:
    """{what: its numbers}."""
    editor = kf.Memit(layers=(0, 1), mom2_update_weight=80.0, v_num_grad_steps=4)
    traced = kf.trace(lm, FACTS, kinds=("state", "mlp"), samples=2, noise=0.5, window=2)
    tasks = Prompts.of(lm, FACTS, CONTEXTS).value_tasks(lm)
    z = optimize_values(lm, tasks, editor.z_settings(lm))
    moments = kf.second_moments(lm, editor.layers, [line for line in TEXT.splitlines() if line], n_tokens=200)
    edit = replace(editor, v_num_grad_steps=2).edit(lm, FACTS, moments=moments, contexts=CONTEXTS)
    answers = kf.evaluate(lm, FACTS, edit).edited["p_new"]
    return {
        "trace": np.concatenate([one.p_restored.ravel() for one in traced]),
        "z": z.values.double().cpu().numpy(),
        "second moment": moments[0].matrix.double().cpu().numpy(),
        "P(new) after an edit": torch.as_tensor(answers).double().cpu().numpy(),
    }


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """RMS of the difference over the RMS of what the CPU gives."""
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / np.sqrt(np.mean(wanted**2)))
