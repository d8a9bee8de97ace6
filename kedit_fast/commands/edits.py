"""``kedit-fast edit inspect | diff | undo | log | add | rollback``: what one does with edits that are there."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

from ..edit import Edit
from ..files import existing_folder
from ..shipping.differences import compare
from ..shipping.history import EditHistory
from ..shipping.unmerge import read_manifest, unmerge
from .inputs import model_line, open_lm
from .outputs import say, table

SHOWN = 20  # facts listed one by one
WIDTH = 100  # characters of a value that are shown


def run(args) -> None:
    """Runs the action that was asked for."""
    {"inspect": _inspect, "diff": _diff, "undo": _undo, "log": _log, "add": _add, "rollback": _rollback}[args.action](
        args
    )


# ---- edit files


def _inspect(args) -> None:
    path = _path(args.file)
    edit = Edit.load(path)
    say(f"{edit!r}")
    changes, whole = sum(delta.nbytes for delta in edit.deltas.values()), path.stat().st_size
    say(f"size: {_mb(changes)} are changes of weights; the file, with keys, values and facts: {_mb(whole)}")
    say(f"made for model {edit.fingerprint or '(not said)'}")
    lm = _opened(args, edit) if args.model else None
    _say_facts(edit.facts, edit.owners is not None)
    say()
    say(_layer_table(edit, lm))
    _say_values("settings", edit.hparams)
    _say_values("provenance", edit.provenance)


def _opened(args, edit):
    asked = {"model": args.model, "memory": args.memory, "threads": None, "device": None, "dtype": None}
    lm = open_lm(SimpleNamespace(**asked))
    say(f"compared with {model_line(lm)}")
    if edit.fingerprint != lm.fingerprint:
        raise ValueError(f"the edit was made for model {edit.fingerprint or '(not said)'}, this is {lm.fingerprint}")
    return lm


def _layer_table(edit: Edit, lm) -> str:
    headers = ["layer", "kind", "rank", "|change|"] + (["|W|", "change / W"] if lm else [])
    rows = []
    for layer, delta in edit.deltas.items():
        row = [str(layer), type(delta).__name__, str(delta.rank), f"{delta.norm():.4g}"]
        if lm:
            size = float(lm.source.down_weight(layer).float().norm())
            row += [f"{size:.4g}", f"{delta.norm() / size:.2%}" if size else "-"]
        rows.append(row)
    return table(headers, rows)


def _diff(args) -> None:
    found = compare(Edit.load(_path(args.a)), Edit.load(_path(args.b)))
    for name, (a, b) in found.parts.items():
        say(f"{name}: {_short(a)} -> {_short(b)}")
    for name, (a, b) in found.hparams.items():
        say(f"setting {name}: {_short(a)} -> {_short(b)}")
    for which, facts in (("A", found.only_a), ("B", found.only_b)):
        for fact in facts[:SHOWN]:
            say(f"only in {which}: {fact.label} -> {fact.target_new}")
        if len(facts) > SHOWN:
            say(f"only in {which}: ... and {len(facts) - SHOWN} more")
    if not (found.parts or found.hparams or found.only_a or found.only_b):
        say("same model, method, settings and facts")
    say()
    rows = [
        (str(at.layer), f"{at.norm_a:.4g}", f"{at.norm_b:.4g}", f"{at.difference:.4g}", _number(at.cosine))
        for at in found.layers
    ]
    say(table(("layer", "|A|", "|B|", "|A - B|", "cosine"), rows))


def _undo(args) -> None:
    folder = _path(args.folder)
    record = read_manifest(folder)
    restored = unmerge(folder, args.output and _path(args.output))
    facts = sum(len(edit["facts"]) for edit in record["edits"])
    say(f"{restored}: {len(record['tensors'])} tensors restored bit for bit, {facts} facts taken out")
    say(f"this is model {record['base']['fingerprint']} again")


# ---- folders of versions


def _log(args) -> None:
    way_out = f"as `kedit-fast edit add {args.folder} FILE` makes it"
    folder = existing_folder(_path(args.folder), "a folder of versions", way_out)
    history = EditHistory(folder)
    versions = history.versions
    rows = [
        (str(each.number), str(len(each.edits)), each.when or "-", each.who or "-", each.message or "-")
        for each in versions
    ]
    say(table(("version", "edits", "when", "who", "message"), rows))
    say(f"in force: version {versions[-1].number}")
    for edit in history.current:
        say(f"  {edit!r}")


def _add(args) -> None:
    history = EditHistory(_path(args.folder))
    new = history.add(Edit.load(_path(args.file)), args.message, args.who, check_chain=not args.force)
    say(f"{history.folder}: version {new.number}, {len(new.edits)} edit{'s' * (len(new.edits) > 1)} in force")


def _rollback(args) -> None:
    history = EditHistory(_path(args.folder))
    new = history.rollback(args.number, args.message, args.who)
    in_force = f"{len(new.edits)} edit{'s' * (len(new.edits) != 1)}" if new.edits else "no edit"
    say(f"{history.folder}: version {new.number}, the same as version {args.number}: {in_force} in force")


# ---- words


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _mb(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


def _say_facts(facts, independent: bool) -> None:
    rows = [
        (
            fact.label,
            fact.target_new or "",
            fact.target_true or "-",
            str(len(fact.paraphrases)),
            str(len(fact.neighborhood)),
        )
        for fact in facts[:SHOWN]
    ]
    say(table(("fact", "new answer", "instead of", "paraphrases", "neighborhood"), rows))
    if len(facts) > SHOWN:
        say(f"... and {len(facts) - SHOWN} more")
    if independent:
        say("independent: each edit is for its own fact")


def _say_values(title: str, values: dict) -> None:
    say()
    say(f"{title}:" if values else f"{title}: none")
    for name, value in values.items():
        say(f"  {name}: {_short(value)}")


def _short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
