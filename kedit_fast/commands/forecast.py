"""``kedit-fast info MODEL --plan``: what a piece of work will cost, before any weight is there."""

import json
import time
from contextlib import suppress

import torch

from kedit_fast.basics.files import write_text
from kedit_fast.commands.outputs import note, say, write_reports
from kedit_fast.experiments.forecast import FACT, Rates, forecast, halving
from kedit_fast.model.family import FAMILIES, peculiarities
from kedit_fast.model.folder import read_config
from kedit_fast.model.opening import checked_device, named_folder
from kedit_fast.model.shape import shape_of

COPIED = 1 << 28  # bytes that are copied to time a bus
SOLVES = 1 / 16  # of the FLOP rate: what fp64 is taken to run at where that cannot be measured


def run(args, path) -> None:
    """Says the plan, a table of its steps, and what would halve the time; the same as JSON at ``path``."""
    if args.model is None:
        raise ValueError("a plan of which model? give its folder, hub id, or a folder with its config.json alone")
    args.model = str(named_folder(args.model, note, args.accept_licence))
    config = read_config(args.model)
    shape = shape_of(config, None if args.dtype is None else getattr(torch, args.dtype))
    device = torch.device(args.device or "cpu")
    plan = forecast(args.plan, shape, args.facts, args.memory, device, args.host)
    rates = _rates(args, shape, device)
    write_reports((path, lambda path: write_text(path, json.dumps(plan.to_record(rates), indent=1))))
    of = f"{config.model_type}, {shape.n_layers} layers, d {shape.d_model}, d_ff {shape.d_ff}, {shape.n_vocab} tokens"
    say(f"{args.plan}, {args.facts:,} facts, on {args.model} ({of})")
    say(str(plan.placement))
    say(f"\n{plan.table(rates)}\n")
    if rates is None:
        say("times: give --tflops and --bus, what the device computes and reads in a second")
    else:
        speed = f"{rates.flop / 1e12:.3g} TFLOP/s, {rates.bus / 1e9:.3g} GB/s to the device"
        say(f"at {speed}; bound by {plan.bound(rates)}")
        for line in halving(plan, rates, device, args.host):
            say(f"less: {line}")
    say(FACT)
    if config.model_type not in FAMILIES:
        why = "; ".join(peculiarities(config)) or "its family has no entry in kedit_fast/model/family.py"
        say(f"a plan is all there is for it: {config.model_type} models are not opened ({why})")


def _rates(args, shape, device: torch.device) -> Rates | None:
    """As given, else as measured where the device is of this machine."""
    flop, bus = args.tflops and args.tflops * 1e12, args.bus and args.bus * 1e9
    solves = flop and SOLVES * flop
    if None not in (flop, bus):
        return Rates(flop, bus, solves)
    with suppress(ValueError):
        checked_device(device)
        flop = flop or _measured_flop(shape, device, shape.dtype)
        return Rates(flop, bus or _measured_bus(device), solves or _measured_flop(shape, device, torch.float64))
    return None


def _measured_flop(shape, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a product of the width of a call's rows with a part of a layer's matrix."""
    width, out = min(shape.d_model, 4096), min(shape.d_ff, 4096)
    x, w = torch.ones(512, width, dtype=dtype, device=device), torch.ones(width, out, dtype=dtype, device=device)
    return 2 * 512 * width * out / _seconds(lambda: x @ w, device)


def _measured_bus(device: torch.device) -> float:
    """Bytes a second from host memory to the device; on the CPU of a copy, as of a file that the system has cached."""
    x = torch.zeros(COPIED, dtype=torch.uint8, pin_memory=device.type != "cpu")
    y = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    return COPIED / _seconds(lambda: y.copy_(x), device)


def _seconds(work, device: torch.device) -> float:
    """The least of five times."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
