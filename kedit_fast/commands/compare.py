"""``kedit-fast compare``: several methods, edits and reports on the same facts, in one table and one page."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kedit_fast.basics.bits import digest
from kedit_fast.basics.catalog import TRAINED
from kedit_fast.basics.files import Damaged, existing_file
from kedit_fast.basics.parts import Inside
from kedit_fast.basics.progress import progress
from kedit_fast.commands.inputs import (
    benchmark_of,
    case_file,
    corpus_of,
    known,
    read_edits,
    read_text,
    statistics,
    told_lm,
)  # fmt: skip
from kedit_fast.commands.outputs import check_outputs, note, say, say_written, write_reports
from kedit_fast.commands.unfinished import kept, run_of
from kedit_fast.editors import EDITORS
from kedit_fast.editors.editor import Editor
from kedit_fast.edits.chain import with_edits
from kedit_fast.edits.edit import Edit
from kedit_fast.edits.edit import digest as edit_digest
from kedit_fast.evaluation import Case, EvalReport, compare, evaluate, load_easyedit
from kedit_fast.evaluation.benchmark import Benchmark
from kedit_fast.evaluation.compare import BASE, Comparison
from kedit_fast.evaluation.easyedit import Columns
from kedit_fast.evaluation.known import Known
from kedit_fast.facts.fact import BUILTIN, Fact, check_facts
from kedit_fast.facts.files import SUFFIXES
from kedit_fast.moments.given import digests
from kedit_fast.sweep.kept import asked_of, begun


class Asked(NamedTuple):
    """What is compared, each {name: ...}, in this order: methods that edit, edits that are there, reports."""

    methods: dict[str, type[Editor]]
    edits: dict[str, tuple[Edit, ...]]
    reports: dict[str, EvalReport | Columns]

    @property
    def names(self) -> list[str]:
        return [name for some in self for name in some]


def run(args) -> None:
    """Makes and evaluates the edits of the methods, evaluates those of files, reads reports; says the tables and writes
    the files asked for."""
    benchmark = benchmark_of(args)
    output, page = check_outputs(args, "output", "html")
    asked = _asked(args, benchmark)
    text = None if args.text is None else read_text(args.text)
    if not asked.methods and not asked.edits:
        _tell(args, compare(asked.reports, against=args.against), output, page)
        return
    cases, facts = _cases(args, asked.methods.values())
    run, corpus = run_of(args, output, page), corpus_of(args)
    lm = told_lm(args)
    editors = {name: editor.for_model(lm) for name, editor in asked.methods.items()}
    for editor in editors.values():
        editor.check_edit(lm, facts)
    for name, edits in asked.edits.items():
        with_edits(lm, edits, name)
    layers = sorted({layer for editor in editors.values() if editor.mom2_adjustment for layer in editor.layers})
    moments = statistics(args, lm, editors.values(), layers, corpus)
    told = partial(_asked_for, args, lm, cases, facts, editors, asked, moments, text)
    with kept(run) as checkpoint:
        with begun(checkpoint, told) as keep:
            ways = _edits(args, lm, facts, editors, moments, asked.edits, keep)
            reports, stopped = _evaluated(args, lm, cases, benchmark, text, ways, keep, len(asked.names))
        found = compare(reports | asked.reports, against=None if args.against in stopped else args.against)
        found.notes[:0] = [f"{name} is left out: {why}" for name, why in stopped.items()]
        _tell(args, found, output, page)


# ---- what is asked for


def _asked(args, benchmark: Benchmark) -> Asked:
    """Methods, edits and reports by the names that they are shown under, before a model is opened."""
    methods = {name: known("--methods", name, EDITORS) for name in args.methods or ()}
    if trained := [name for name in methods if name in TRAINED]:
        way_out = f"kedit-fast edit --method {trained[0]} --network FILE -o {trained[0]}.safetensors"
        raise ValueError(f"--methods {trained[0]}: a trained network edits; make the edit by `{way_out}` and name that")
    found = Asked(methods, {}, {})
    for path in args.compared:
        name = Path(path.removesuffix(".gz")).stem
        if name in found.names or name == BASE:
            raise ValueError(f"{path}: another one is shown as {name!r}; give the file a name of its own")
        if path.endswith(SUFFIXES):
            found.reports[name] = read_report(path)
        else:
            found.edits[name] = read_edits(path)
    if len(found.names) < 2:
        raise ValueError(
            "compare what? name two or more of: methods (--methods rome,memit), edit files, reports of "
            "`kedit-fast eval -o` or of EasyEdit"
        )
    if (methods or found.edits) and args.facts is None:
        raise ValueError(f"compare on which facts? give --facts FILE (or --facts {BUILTIN})")
    if args.against is not None and args.against not in (*found.names, BASE):
        raise ValueError(f"--against {args.against!r}: expected one of {', '.join((*found.names, BASE))}")
    modes = {name.partition(".")[2] for name in benchmark.metrics if "." in name}
    if args.modes and (methods or found.edits) and (unknown := [mode for mode in args.modes if mode not in modes]):
        expected = f"some of {', '.join(sorted(modes))}" if modes else "none"
        raise ValueError(f"--modes {','.join(unknown)}: benchmark {benchmark.name} has {expected}")
    return found


def read_report(path: str) -> EvalReport | Columns:
    """A report of ``kedit-fast eval -o``, or EasyEdit's results: a list, or records line by line."""
    file = existing_file(Path(path).expanduser(), "a report")
    with open(file, "rb") as opened:
        is_list = opened.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    return load_easyedit(file) if is_list or file.suffix != ".json" else EvalReport.load(file)


def _cases(args, methods: Iterable[type[Editor]]) -> tuple[list[Case], list[Fact]]:
    """(the cases, the facts of all of them for the methods to write)"""
    cases, methods = case_file(args), list(methods)
    if not methods:
        return cases, []
    new, subject = (any(getattr(one, needs) for one in methods) for needs in ("NEEDS_NEW", "NEEDS_SUBJECT"))
    if args.skip_bad:
        fits = [all((f.target_new or not new) and (f.subject or not subject) for f in case.facts) for case in cases]
        if skipped := fits.count(False):
            note(f"{skipped} of {len(cases)} cases are passed over: a fact of them cannot be written")
        cases = [case for case, is_fit in zip(cases, fits, strict=True) if is_fit]
    return cases, check_facts([f for case in cases for f in case.facts], need_new=new, need_subject=subject)


def _asked_for(args, lm, cases, facts, editors, asked: Asked, moments, text) -> dict:
    """What the work depends on, for the manifest of an unfinished run."""
    return asked_of(
        lm, "compare", [fact for case in cases for fact in case.facts], benchmark=args.benchmark, seed=args.seed,
        hparams={name: editor.record for name, editor in editors.items()}, statistics=digests(moments),
        edits={name: [edit_digest(edit) for edit in edits] for name, edits in asked.edits.items()},
        questions=digest([[len(case.facts), case.questions] for case in cases]), generate=args.generate,
        text=None if text is None else digest(text),
    )  # fmt: skip


# ---- the work


def _edits(args, lm, facts, editors: dict[str, Editor], moments, made: dict, keep) -> dict[str, partial]:
    """{name: what gives the edits of a way}."""
    ways = {}
    for name, editor in editors.items():
        options = {"checkpoint": None if "checkpoint" in editor.UNREAD else Inside(keep, f"edit {name}")}
        if editor.mom2_adjustment:
            options["moments"] = {layer: moments[layer] for layer in editor.layers}
        ways[name] = partial(editor.edit, lm, facts, seed=args.seed, **options)
    return ways | {name: partial(tuple, edits) for name, edits in made.items()}


def _evaluated(args, lm, cases, benchmark, text, ways: dict[str, partial], keep, n: int):
    """({name: report}, {name: why there is none}). The unedited model is asked once for all."""
    reports: dict[str, EvalReport] = {}
    stopped: dict[str, str] = {}
    base = Known()
    with progress("comparing", len(ways)) as bar:
        for name, edits in ways.items():
            with bar.inside(name):
                try:
                    reports[name] = evaluate(
                        lm, cases, edits(), benchmark=benchmark, text=text, generate=args.generate, both_forms=False,
                        known=base, checkpoint=Inside(keep, f"eval {name}"),
                    )  # fmt: skip
                except Damaged:
                    raise
                except ValueError as error:
                    if n - len(stopped) <= 2:  # nothing to compare is left
                        raise ValueError(f"{name}: {error}") from error
                    stopped[name] = str(error)
            bar.advance(1)
    return reports, stopped


def _tell(args, found: Comparison, output, page) -> None:
    written = write_reports((output, found.save), (page, partial(found.to_html, modes=args.modes)))
    say(found.to_text(args.modes))
    say_written(written)
