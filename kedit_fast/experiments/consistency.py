"""Whether a model that was edited says what the edit implies, and which facts are to be edited besides.

Each implied fact (``experiments/implied.py``) is asked of the model without and with the edit, in the same sweeps:

    exact      all tokens of its answer are the likeliest, each behind the right ones before it
    success    P(its answer) > P(the answer of before), where that is known; P = exp(mean log p)
    written    its answer, or another name of it, stands in what the model writes by itself

Each is a share over the facts of a kind (edited, alias, inverse, one hop, ...), with Wilson's interval. The rest is
what the edited model does not say yet and nothing contradicts: facts for an editor, on top of the edit.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kedit_fast.basics import checks
from kedit_fast.basics.files import check_format, read_object, reading, write_text
from kedit_fast.basics.intervals import SHARE, Interval, interval
from kedit_fast.basics.printing import columns, escaped
from kedit_fast.basics.words import counted
from kedit_fast.edits.chain import facts_in_force, with_edits
from kedit_fast.edits.changes import TAKE_ONE
from kedit_fast.edits.edit import Edit, edit_list
from kedit_fast.evaluation.evaluate import about
from kedit_fast.evaluation.probes import Answer, Probe, probe, read_probes
from kedit_fast.evaluation.readings import UNTIL, read
from kedit_fast.evaluation.stored import as_float, finite
from kedit_fast.evaluation.written import write_probes
from kedit_fast.experiments.implied import KINDS, Conflict, Derived, Implied, Tables, derive, read_table
from kedit_fast.facts.fact import BUILTIN, Fact
from kedit_fast.facts.knowledge import RelationTable
from kedit_fast.facts.tokens import asked
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.pictures.page import Cell, Section, Table, fragment, write_report

FORMAT, VERSION = "kedit_fast.consistency", 1
EDITED = "edited"  # of kinds: the edited facts themselves
MEASURES = {"exact": "exact", "success": "P(new) > P(old)", "written": "written"}
P = ("p_new", "p_old")
MOST = 20  # facts and conflicts that are listed on a screen


@dataclass(frozen=True)
class Consistency:
    """What became of the facts that edits imply.

    facts: the edited ones; implied: what follows from them; conflicts: what of it contradicts itself
    base, edited: {measure of ``MEASURES`` or of ``P``: a number for each of facts, then of implied}; NaN where a fact
        has no answer of before; of a model that answers NaN 0
    texts: (without, with the edit), what is written behind each; empty where nothing was
    by: the measure that says whether a fact is followed; meta: model, method, settings; notes: in words
    """

    facts: tuple[Fact, ...]
    implied: tuple[Implied, ...]
    conflicts: tuple[Conflict, ...]
    base: dict[str, list[float]]
    edited: dict[str, list[float]]
    texts: tuple[tuple[str, str], ...]
    by: str
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def followed(self) -> list[bool]:
        """Of each implied fact, whether the edited model says it: by ``by``, and where that is not known by exact."""
        n = len(self.facts)
        both = zip(self.edited[self.by][n:], self.edited["exact"][n:], strict=True)
        return [(exact if math.isnan(value) else value) == 1 for value, exact in both]

    @property
    def rest(self) -> list[Fact]:
        """The implied facts that are still to be edited: neither followed nor in conflict."""
        return [one.fact for one in self._missing]

    @property
    def _missing(self) -> list[Implied]:
        each = zip(self.implied, self.followed, strict=True)
        return [one for one, followed in each if not followed and not one.conflict]

    def summary(self) -> dict[str, dict[str, dict[str, Interval]]]:
        """{kind: {measure: {"base", "edited": mean over its facts that have one, Wilson's interval, n}}}; "implied":
        all kinds but the edited."""
        kinds = [EDITED] * len(self.facts) + [one.kind for one in self.implied]
        groups = {kind: [i for i, one in enumerate(kinds) if one == kind] for kind in (EDITED, *KINDS)}
        groups["implied"] = list(range(len(self.facts), len(kinds)))
        sides = {"base": self.base, "edited": self.edited}
        return {
            kind: {name: {side: _share(values[name], some) for side, values in sides.items()} for name in MEASURES}
            for kind, some in groups.items()
            if some
        }

    def save_rest(self, path: checks.AnyPath) -> None:
        """The rest as a fact file, which ``kf.load_facts`` and ``kedit-fast edit --facts`` read."""
        write_text(path, json.dumps([fact.to_record() for fact in self.rest], indent=1, ensure_ascii=False) + "\n")

    def save(self, path: checks.AnyPath) -> None:
        """All of it as one JSON file, whole or not at all; NaN is null in it."""
        found = [
            vars(one) | {"fact": one.fact.to_record(), "follows_from": [fact.to_record() for fact in one.follows_from]}
            for one in self.implied
        ]
        record = {"format": FORMAT, "version": VERSION, "facts": [fact.to_record() for fact in self.facts]}
        record |= {"implied": found, "conflicts": self.conflicts, "base": finite(self.base)}
        record |= {"edited": finite(self.edited), "texts": self.texts, "by": self.by, "meta": self.meta}
        write_text(path, json.dumps(record | {"notes": self.notes}, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: checks.AnyPath) -> "Consistency":
        """What ``save`` wrote. Raises ValueError for any other file."""
        record = read_object(path, "a saved consistency report")
        way_out = f"expected {FORMAT}, version {VERSION}, as Consistency.save writes it"
        with reading(path, way_out, "is not a saved consistency report"):
            check_format(record, FORMAT, version=VERSION)
            facts = tuple(map(Fact.from_record, record["facts"]))
            found = tuple(map(_implied, record["implied"]))
            n, by = len(facts) + len(found), checks.choice("by", record["by"], MEASURES)
            base, edited = (_columns(record[side], n) for side in ("base", "edited"))
            conflicts = (Conflict(one, name, tuple(map(tuple, both))) for one, name, both in record["conflicts"])
            texts = tuple((str(before), str(after)) for before, after in record["texts"])
            meta = checks.instance("meta", record["meta"], dict, "an object")
            notes = tuple(map(str, record["notes"]))
            return cls(facts, found, tuple(conflicts), base, edited, texts, by, meta, notes)

    # ---- shown

    def __str__(self) -> str:
        rows = [["rule", "facts", *MEASURES.values()]]
        for kind, n, *cells in self._rows():
            both = zip(cells[::2], cells[1::2], strict=True)
            rows.append([kind, n, *(f"{before.partition(' ')[0]} → {after}" for before, after in both)])
        lines = [self._title(), columns(rows, right=True), "share of the facts without → with the edit [95 % interval]"]
        lines += _listed("conflict", "which answer holds is yours to say", list(map(str, self.conflicts)))
        lines += _listed("fact", "implied and not followed, still to be edited", list(map(str, self._missing)))
        return escaped("\n".join([*lines, *self.notes]))

    def __repr__(self) -> str:
        return f"Consistency({self._title()})"

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self, path: checks.AnyPath | None = None) -> str:
        """The tables as an HTML fragment; with ``path`` also a page, whole or not, without scripts or other files."""
        headings = "Which of it the model says", "What follows", "Conflicts"
        sections = [Section(*each) for each in zip(headings, self._parts(), strict=True) if each[1]]
        if path is not None:
            write_report(path, "What the edit implies", self._title(), sections)
        return fragment(self.blocks())

    def blocks(self) -> list:
        """What a page shows of it."""
        return [block for part in self._parts() for block in part]

    def _parts(self) -> list[list]:
        told = [(c.subject, c.relation, answer, why) for c in self.conflicts for answer, why in c.answers]
        conflicts = [Table(("subject", "relation", "answer", "because"), told)] if told else []
        return [[Table(self._headers(), self._rows(), self._title()), *self.notes], [self._each()], conflicts]

    def _headers(self) -> list[str]:
        return ["rule", "facts", *(f"{says}, before" * (i == 0) or says for says in MEASURES.values() for i in (0, 1))]

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for kind, measures in self.summary().items():
            n = max(both["edited"].n for both in measures.values())
            cells = [_shown(both[side]) for both in measures.values() for side in ("base", "edited")]
            rows.append((kind if kind != "implied" else "all implied", str(n), *cells))
        return rows

    def _each(self) -> Table:
        """A row for each implied fact."""
        n, rows = len(self.facts), []
        for i, (one, followed) in enumerate(zip(self.implied, self.followed, strict=True), n):
            p = [f"{self.base[name][i]:.3f} → {self.edited[name][i]:.3f}" for name in P]
            said = "conflict" if one.conflict else "followed" if followed else "to be edited"
            tone = "neutral" if one.conflict else "good" if followed else "bad"
            written = self.texts[i][1].strip() if self.texts else "–"
            old = one.fact.target_true or "–"
            p = [cell if "nan" not in cell else "–" for cell in p]
            cells = (one.fact.text, one.kind, "; ".join(one.because), one.fact.target_new, p[0], old, p[1], written)
            rows.append((*cells, Cell(said, tone)))
        headers = ("prompt", "rule", "because", "answer", "p(answer)", "before", "p(before)", "written", "outcome")
        return Table(headers, rows)

    def _title(self) -> str:
        what = f"{counted(len(self.implied), 'fact')} implied by {counted(len(self.facts), 'edited fact')}"
        said = sum(self.followed)
        return f"{self.meta.get('model')}, {self.meta.get('method')}: {what}, {said} followed ({MEASURES[self.by]})"


@takes_lm
def consistency(
    lm: LM,
    edit: Edit | Iterable[Edit],
    table: Tables = BUILTIN,
    *,
    hops: int = 1,
    ask: bool = False,
    by: str = "exact",
    generate: int = 10,
) -> Consistency:
    """What the facts of an edit imply, and which of it the edited model says.

    edit: an Edit, or several in their order, on top of those that ``lm`` carries; the facts are those in force of all.
        Of independent edits each is asked for what it implies by itself
    table, hops: as of ``kf.implied``; ask: whether the model, without edits, is asked for what a rule needs and the
        table does not know; what it answers is marked as such
    by: the measure that says whether a fact is followed, "exact", "success" or "written"; generate: tokens written
        behind each prompt, 0: none

    Cost: a sweep, two generations, and where the model is asked another of each a step.
    Raises ValueError for an edit of another model, for independent edits beside others, for edits without facts and for
    all that ``kf.implied`` refuses.
    """
    read_from = read_table(table)
    ask, by = checks.flag("ask", ask), checks.choice("by", by, MEASURES)
    generate = checks.whole("generate", generate, least=int(by == "written"), like=10)
    edit_list(edit, "edit")
    view = with_edits(lm, edit, "edit")
    facts = [fact for fact in facts_in_force(view.edits) if fact.target_new is not None]
    if not facts:
        raise ValueError("edit: no fact in it has a new answer, so nothing is implied; give edits that write facts")
    found, owners = _derived(view, facts, read_from, hops, lm if ask else None)
    own = range(len(facts)) if view.independent else [0] * len(facts)
    probes = [_probe(view, fact, read_from, i, generate) for i, fact in zip(own, facts, strict=True)]
    probes += [_probe(view, one.fact, read_from, i, generate) for one, i in zip(found.found, owners, strict=True)]
    base, edited, texts = _answers(view, probes)
    meta = about(lm) | {"method": " + ".join(dict.fromkeys(one.method for one in view.edits))}
    meta |= {"hops": hops, "ask": ask, "generate": generate}
    conflicts, notes = tuple(found.conflicts), tuple(found.notes)
    return Consistency(tuple(facts), tuple(found.found), conflicts, base, edited, texts, by, meta, notes)


def _derived(view: LM, facts: Sequence[Fact], table: RelationTable, hops: int, lm: LM | None):
    """(what the facts imply, the fact whose independent edit each of it is asked under, 0 where there is none)"""
    if not view.independent:
        found = derive(facts, table, hops, lm)
        return found, [0] * len(found.found)
    if len(view.edits) > 1 or len(view.edits[0].facts) > len(facts):
        raise ValueError(f"independent edits, each with a new answer, are looked at by themselves alone; {TAKE_ONE}")
    each = [derive([fact], table, hops, lm) for fact in facts]
    found, conflicts = ([one for part in each for one in part.found], [one for part in each for one in part.conflicts])
    owners = [i for i, part in enumerate(each) for _ in part.found]
    return Derived(found, conflicts, derive(facts, table).notes), owners


def _probe(lm: LM, fact: Fact, table: RelationTable, owner: int, n_written: int) -> Probe:
    answers, new = [fact.target_new, fact.target_true], str(fact.target_new).strip()
    how: dict[str, Any] = {"owner": owner, "n_written": n_written, "until": UNTIL, "accepted": (new, *table.names(new))}
    return probe(lm, asked(lm.tokenizer, fact.text, fact.chat), answers, fact.attached, **how)


def _answers(view: LM, probes: Sequence[Probe]):
    """({measure: numbers} without and with the edits, what is written by both)"""
    both = read_probes(view, probes)
    written = [write_probes(replace(view, edits=()), probes), write_probes(view, probes)]
    sides = []
    for answers, texts in zip(both, written, strict=True):
        told = [answer._replace(text=text) for answer, text in zip(answers or both[0], texts, strict=True)]
        sides.append({name: [_read(name, *one) for one in zip(probes, told, strict=True)] for name in (*MEASURES, *P)})
    texts = tuple((a or "", b or "") for a, b in zip(*written, strict=True))
    return *sides, texts if any(one.n_written for one in probes) else ()


def _read(name: str, one: Probe, answer: Answer) -> float:
    if name in P:
        return answer.p[P.index(name)]
    return read("contains" if name == "written" else name, one, answer, answer)


def _share(values: Sequence[float], some: Iterable[int]) -> Interval:
    return interval(torch.tensor([values[i] for i in some], dtype=torch.float64), SHARE)


def _shown(value: Interval) -> str:
    return "–" if math.isnan(value.mean) else f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _listed(what: str, says: str, lines: Sequence[str]) -> list[str]:
    """A heading and the first of the lines; nothing where there are none."""
    if not lines:
        return []
    more = [f"  ... and {len(lines) - MOST} more"] if len(lines) > MOST else []
    return [f"{counted(len(lines), what)}, {says}:", *(f"  {line}" for line in lines[:MOST]), *more]


def _implied(record: dict) -> Implied:
    """What of a saved report is an implied fact."""
    sources, because = map(Fact.from_record, record["follows_from"]), map(str, record["because"])
    kind = checks.choice("kind", record["kind"], KINDS)
    relation = checks.optional(checks.text, "relation", record["relation"])
    asked = checks.optional(checks.share, "asked", record["asked"])
    conflict = checks.flag("conflict", record["conflict"])
    fact = Fact.from_record(record["fact"])
    return Implied(fact, kind, relation, tuple(because), tuple(sources), asked, conflict)


def _columns(record: dict, n: int) -> dict[str, list[float]]:
    made = {name: list(map(as_float, record[name])) for name in (*MEASURES, *P)}
    if any(len(values) != n for values in made.values()):
        raise ValueError(f"it has {n} facts, and not a number for each")
    return made
