"""``kedit-fast edit inspect | diff | only | without``: what edits hold, how two differ, one of many facts, the rest."""

import json
from collections.abc import Callable
from pathlib import Path

from kedit_fast.basics.printing import escaped
from kedit_fast.commands.inputs import model_line, open_lm, read_edits
from kedit_fast.commands.outputs import check_outputs, number, say, say_table, write_reports
from kedit_fast.edits.changes import PromptChange, WeightChange
from kedit_fast.edits.compose import compose
from kedit_fast.edits.differences import compare
from kedit_fast.edits.edit import Edit

SHOWN = 20  # facts listed one by one
WIDTH = 100  # characters of a value that are shown


def inspect(args) -> None:
    """Says what edits hold, and beside a model's weights how much they change."""
    edits = [(name, edit) for name in args.edits for edit in read_edits(name)]
    lm = _opened(args, [edit for _, edit in edits]) if args.model else None
    for place, (name, edit) in enumerate(edits):
        say("\n" * bool(place) + f"{edit!r}")
        _say_size(Path(name).expanduser(), edit)
        say(f"made for model {edit.fingerprint or '(not said)'}")
        _say_facts(edit.facts, _parted(edit))
        say()
        _say_layers(edit, lm)
        _say_values("settings", edit.hparams)
        _say_values("provenance", edit.provenance)


def _say_size(path: Path, edit: Edit) -> None:
    whole = f"; the file, with keys, values and facts: {_mb(path.stat().st_size)}" if path.is_file() else ""
    say(f"size: {_mb(sum(change.nbytes for change in edit.changes))} are what it changes{whole}")


def _opened(args, edits: list[Edit]):
    lm = open_lm(args)
    say(f"compared with {model_line(lm)}")
    for edit in edits:
        if edit.fingerprint != lm.fingerprint:
            made_for = edit.fingerprint or "(not said)"
            raise ValueError(f"the edit was made for model {made_for}, this is {lm.fingerprint}")
    return lm


def _say_layers(edit: Edit, lm) -> None:
    headers = ["layer", "matrix", "kind", "rank", "|change|"] + (["|W|", "change / W"] if lm else [])
    rows = []
    for (layer, role), delta in edit.weights.items():
        if edit.route is not None:  # parts that never act together have no norm
            rows.append([layer, role, type(delta).__name__, delta.rank, "-", *(["-", "-"] if lm else [])])
            continue
        row = [layer, role, type(delta).__name__, delta.rank, f"{delta.norm():.4g}"]
        if lm:
            size = float(lm.source.weight(layer, role).detach().float().norm())
            row += [f"{size:.4g}", f"{delta.norm() / size:.2%}" if size else "-"]
        rows.append(row)
    others = [change for change in edit.changes if not isinstance(change, WeightChange)]
    rows += [["-" if c.layer is None else c.layer, "-", c.kind, "-", "-", *(["-", "-"] if lm else [])] for c in others]
    say_table(headers, rows)
    for text in [text for c in others if isinstance(c, PromptChange) for text in c.texts][:SHOWN]:
        say(f"before the prompt: {_short(text)}")


def _one(name: str) -> Edit:
    """The edit of a file, also of one that stands on others; those of a folder of versions as one."""
    edits = read_edits(name)
    return edits[0] if len(edits) == 1 else compose(edits)


def diff(args) -> None:
    """Says how two edits differ."""
    found = compare(*map(_one, args.edits))
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
    rows = [
        (
            at.layer,
            at.role,
            *(f"{norm:.4g}" for norm in (at.norm_a, at.norm_b, at.difference)),
            number(at.cosine, ".4f"),
        )
        for at in found.layers
    ]
    if rows:
        say()
        say_table(("layer", "matrix", "|A|", "|B|", "|A - B|", "cosine"), rows)


def only(args) -> None:
    """Writes the edit of one fact, of independent ones or of a memory, to a file."""
    _write_part(args, Edit.only)


def without(args) -> None:
    """Writes a memory without one fact to a file."""
    _write_part(args, Edit.without)


def _write_part(args, part: Callable[[Edit, int], Edit]) -> None:
    (path,) = check_outputs(args, "output")
    (name,) = args.edits
    whole = _one(name)
    edit = part(whole, args.i)
    if part is Edit.without:
        say(f"left out: {whole.facts[args.i].label} -> {whole.facts[args.i].target_new}")
    write_reports((path, edit.save))
    say(f"{path}: {edit!r}")
    _say_facts(edit.facts, _parted(edit))


# ---- words


def _mb(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


def _parted(edit: Edit) -> str:
    """How facts can be taken from each other; empty where they cannot."""
    if edit.route is not None:
        takes = "`kedit-fast edit only EDIT N` takes a fact, `edit without EDIT N` leaves it out"
        return f"routed ({edit.route.kind}): an entry acts {edit.route.when}, else the model is as it was; {takes}"
    each = "independent: each edit is for its own fact; `kedit-fast edit only EDIT N` takes one"
    return each if edit.independent else ""


def _say_facts(facts, parted: str = "") -> None:
    if not facts:
        return say("no facts")
    rows = [
        (fact.label, fact.target_new or "", fact.target_true or "-", len(fact.paraphrases), len(fact.neighborhood))
        for fact in facts
    ]
    headers = ["fact", "new answer", "instead of", "paraphrases", "neighborhood"]
    if parted:
        headers, rows = ["N", *headers], [(n, *row) for n, row in enumerate(rows)]
    say_table(headers, rows, SHOWN)
    if parted:
        say(parted)


def _say_values(title: str, values: dict) -> None:
    say()
    say(f"{title}:" if values else f"{title}: none")
    for name, value in values.items():
        say(f"  {escaped(name, one_line=True)}: {_short(value)}")


def _short(value) -> str:
    text = escaped(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), one_line=True)
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
