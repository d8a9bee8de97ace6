"""Files that are damaged, or something else: facts, edits, statistics, suites, settings, results, histories, merges."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import kedit_fast as kf
from kedit_fast.edits.deltas import Dense
from kedit_fast.edits.edit import digest
from tests.conftest import save_tiny
from tests.hostile.doors import things
from tests.hostile.judge import Case, command

GOOD = {"prompt": "{} is in", "subject": "Paris", "target_new": "Rome"}
CUT_JSON = ("", "{", "[", "nul", "[1,", '{"a": 1', "\ufeff", "\x00\x01")
NOT_JSON = (*CUT_JSON, "[" * 100_000, "9" * 6_000, "NaN", '"text"', "3")
RECORDS = (  # records that are no fact
    {}, [], None, 3, "x", {"prompt": "{} is in"}, {"subject": "Paris"}, GOOD | {"prompt": "is in"},
    GOOD | {"prompt": "{} {} is in"}, GOOD | {"prompt": 3}, GOOD | {"subject": ""}, GOOD | {"subject": 3},
    GOOD | {"target_new": ""}, GOOD | {"target_new": 3}, GOOD | {"target_new": {"no": "str"}},
    GOOD | {"paraphrases": 3}, GOOD | {"paraphrases": [3]}, GOOD | {"paraphrases": [""]},
    GOOD | {"neighborhood": {"a": 1}}, GOOD | {"neighborhood": [{"no": "prompt"}]}, GOOD | {"provenance": 3},
    GOOD | {"subject": "Par\ud800is"}, {"requested_rewrite": 3}, {"requested_rewrite": {}}, {"requested_rewrite": []},
    {"requested_rewrite": GOOD | {"target_new": {"str": None, "id": 3}} | {"subject": []}},
    {"src": 3, "subject": "Paris", "alt": "Rome"}, {"src": "Where is it", "subject": "Paris", "alt": "Rome"},
    {"subject": "Paris", "attribute": 3, "template": "{} is in"}, GOOD | {"chat": 3}, GOOD | {"attached": "yes"},
)  # fmt: skip


def _wrote(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def _read(load: Callable, path: Path, truth=None, name: str = "") -> Case:
    return Case(f"{load.__qualname__} {path.parent.name}/{path.name} {name}", lambda: load(path), truth)


def fact_files(folder: Path) -> list[Case]:
    """Fact files of every malformed kind."""
    files = [_wrote(folder / f"text-{i}.json", text) for i, text in enumerate(NOT_JSON)]
    files += [_wrote(folder / f"lines-{i}.jsonl", text) for i, text in enumerate(NOT_JSON)]
    files += [_wrote(folder / f"record-{i}.json", [record]) for i, record in enumerate(RECORDS)]
    files += [
        _wrote(folder / f"second-{i}.jsonl", f"{json.dumps(GOOD)}\n{json.dumps(r)}\n") for i, r in enumerate(RECORDS)
    ]
    files += [_wrote(folder / name, [GOOD]) for name in ("facts", "facts.txt", "facts.csv", "facts.json.gz")]
    latin = json.dumps([GOOD | {"subject": "Orl\xe9ans"}], ensure_ascii=False).encode("latin-1")
    files.append(_wrote(folder / "latin.json", latin))
    made = [_read(kf.load_facts, path) for path in files]
    taken = {
        "bom.json": b"\xef\xbb\xbf" + json.dumps([GOOD]).encode(),
        "lines.jsonl": f"\n\n{json.dumps(GOOD)}\r\n\n",
        "braces.json": [GOOD | {"subject": "Pa{r}is"}],
        "twice.json": [GOOD, GOOD],
    }
    for name, content in taken.items():
        subject = "Pa{r}is" if name == "braces.json" else "Paris"

        def right(facts, subject=subject):
            return {(f.subject, f.target_new, f.text) for f in facts} == {(subject, "Rome", f"{subject} is in")}

        made.append(_read(kf.load_facts, _wrote(folder / name, content), right))
    return made


def cut(path: Path, folder: Path, step: int = 7) -> list[Path]:
    """A file cut short, with bytes changed, with others in front and behind, and other things under its name."""
    data, made = path.read_bytes(), []
    for i in range(step):
        made.append(_wrote(folder / f"cut-{i}{path.suffix}", data[: len(data) * i // step]))
    for i in range(step):
        at = len(data) * i // step
        made.append(_wrote(folder / f"turned-{i}{path.suffix}", data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]))
    made.append(_wrote(folder / f"before{path.suffix}", b"x" + data))
    made.append(_wrote(folder / f"zeros{path.suffix}", bytes(len(data))))
    made.append(_wrote(folder / f"other{path.suffix}", b"\x80\x02}q\x00."))  # a pickle
    made.append(_wrote(folder / f"json{path.suffix}", "{}"))
    (folder / f"folder{path.suffix}").mkdir()
    made += [folder / f"folder{path.suffix}", folder / f"absent{path.suffix}"]
    return made


def edit_files(folder: Path) -> list[Case]:
    """Edits whose file is damaged, or whose parts do not fit."""
    edit = things().edit
    edit.save(folder / "good.safetensors")
    want = digest(edit), edit.facts

    def right(found):
        return (digest(found), found.facts) == want

    made = [_read(kf.Edit.load, path, right) for path in cut(folder / "good.safetensors", folder, 24)]
    tensors = load_file(folder / "good.safetensors")
    del tensors["sha256"]  # as files of before are, so that what is looked at is each part
    record = json.loads(bytes(tensors["record"].tolist()))
    delta = next(name for name in tensors if name.startswith("changes"))
    changed = {
        "no record": lambda t: t.pop("record"),
        "no delta": lambda t: t.pop(delta),
        "nan": lambda t: t[delta].fill_(torch.nan),
        "another": lambda t: t.update({"changes.x.y": torch.ones(2)}),
        "not a layer": lambda t: t.update({"keys.-1": torch.ones(2)}),
        "integers": lambda t: t.update({delta: torch.ones(3, 3, dtype=torch.int64)}),
    }
    for name, change in changed.items():
        mine = {key: tensor.clone() for key, tensor in tensors.items()}
        change(mine)
        save_file(mine, folder / f"{name}.safetensors", {"format": "kedit_fast.edit 2"})
        made.append(_read(kf.Edit.load, folder / f"{name}.safetensors"))
    for name in record:
        for i, value in enumerate((None, 3, [3], {"a": 1}, "x")):
            if (
                value == record[name]
                or (name in ("hparams", "provenance") and isinstance(value, dict))
                or (name in ("method", "fingerprint") and isinstance(value, str))
            ):
                continue
            said = torch.tensor(list(json.dumps(record | {name: value}).encode()), dtype=torch.uint8)
            path = folder / f"{name}-{i}.safetensors"
            save_file(tensors | {"record": said}, path, {"format": "kedit_fast.edit 2"})
            made.append(_read(kf.Edit.load, path))
    for version in ("kedit_fast.edit 9", "kedit_fast.moment 1", "", "x"):
        path = folder / f"v{version[-1:]}{len(version)}.safetensors"
        save_file(tensors, path, {"format": version})
        made.append(_read(kf.Edit.load, path))
    flat = dataclasses.replace(edit, changes={1: Dense(torch.ones(3, 5))}, values=None)
    for name, use in {"with_edit": things().lm.with_edit, "apply": lambda e: e.apply(things().model)}.items():
        made.append(Case(f"{name} of an edit of another shape", lambda use=use: use(flat)))
    bad, out = str(folder / "nan.safetensors"), str(folder / "made")
    for argv in (
        ["edit", "inspect", bad], ["edit", "diff", bad, bad], ["eval", bad], ["gate", bad],
        ["history", "add", out, bad],
        ["merge", bad, "--peft", "-o", out], ["history", "log", bad], ["history", "rollback", out, "0"],
        ["merge", "undo", bad], ["merge", "undo", out], ["history", "log", out],
    ):  # fmt: skip
        made.append(Case(f"kedit-fast {' '.join(argv[:2])} of a damaged edit", command(*argv)))
    return made


def statistics_files(folder: Path) -> list[Case]:
    """Second moments: damaged, not square, not symmetric, not finite."""
    moment = things().moment
    moment.save(folder / "good.safetensors")

    def right(found):
        return torch.equal(found.matrix, moment.matrix) and (found.layer, found.n_tokens) == (1, 1_000)

    made = [_read(kf.SecondMoment.load, path, right) for path in cut(folder / "good.safetensors", folder, 5)[:5]]
    made += [_read(kf.SecondMoment.load, path, right) for path in cut(folder / "good.safetensors", folder / "more", 1)]
    records = ('3', "{", '{"layer": 1}', '{"layer": "a", "n_tokens": 1}', '{"layer": 1, "n_tokens": 0}',
               '{"layer": -1, "n_tokens": 9}', '{"layer": 1, "n_tokens": 9, "new": 1}')  # fmt: skip
    for i, record in enumerate(records):
        path = folder / f"record-{i}.safetensors"
        save_file({"matrix": torch.eye(3)}, path, {"format": "kedit_fast.second_moment", "record": record})
        made.append(_read(kf.SecondMoment.load, path))
    lower = torch.tril(torch.ones(4, 4))
    for name, matrix in {"flat": torch.ones(3), "wide": torch.ones(2, 3), "asymmetric": lower}.items():
        path = folder / f"{name}.safetensors"
        said = {"format": "kedit_fast.second_moment", "record": '{"layer": 1, "n_tokens": 9}'}
        save_file({"matrix": matrix}, path, said)
        made.append(_read(kf.SecondMoment.load, path))
    for i, content in enumerate((b"", b"PK\x03\x04", b"x" * 100, b"\x80\x02")):
        made.append(_read(kf.SecondMoment.load, _wrote(folder / f"m.{i}.npz", content)))
    return made


def settings_files(folder: Path) -> list[Case]:
    """Hyper-parameters, thresholds and suites: other JSON, other types, other names."""
    made = []
    wrong = {
        "hparams": [{"layers": v} for v in (3, "x", [-1], [1.5], [[1]], [True], None, [10**30])]
        + [{"v_lr": v} for v in (0, -1, "x", None, True, [1])] + [{"no_such_field": 1}, {"alg_name": "KN"}, []],
        "limits": [{"min_answered": v} for v in (90, -1, "x", None, True)] + [{"min_probes": v} for v in (0, 1.5, "x")]
        + [{"measure": "x"}, {"confident": "yes"}, {"policy": 3}, {"policy": {"max_facts": 0}}, {"x": 1}, [], "x", 3],
        "suite": [{}, {"format": "x"}] + [{"format": "kedit_fast.suite"} | extra for extra in (
            {"facts": 3}, {"facts": [3]}, {"facts": [{}]}, {"portability": [3]}, {"portability": [{"prompt": ""}]},
            {"specificity": [{"answer": "x"}]}, {"specificity": [{"prompt": "x", "answer": 3}]}, {"text": 3},
            {"text": [3]}, {"context": {"a": 1}}, {"doubt": ["no place"]}, {"doubt": ["{what}"]}, {"languages": [3]},
            {"languages": [{}]},
            {"languages": [{"language": "German", "prompt": "x"}]}, {"unknown": 1}, {"languages": {"a": 1}},
        )],
    }  # fmt: skip
    loads = {"hparams": kf.Memit.from_json, "limits": kf.Thresholds.from_json, "suite": kf.load_suite}
    for kind, contents in wrong.items():
        for i, content in enumerate([*contents, *NOT_JSON]):
            made.append(_read(loads[kind], _wrote(folder / f"{kind}-{i}.json", content)))
    return made


def results(folder: Path) -> list[Case]:
    """Trace logs, saved traces, averages and reports, damaged."""
    t = things()
    from kedit_fast.tracing.results import read_log

    line = json.dumps(t.traces[0].to_record())
    record = json.loads(line)
    logs = [line[: len(line) * i // 6] for i in range(1, 6)] + ["{}", "3", "[]", "null", "\x80", "x"]
    logs += [json.dumps(record | change) for change in (
        {"p_restored": [1, 2]}, {"p_restored": "x"}, {"fact": 3}, {"tokens": 3}, {"subject_span": [9, 1]},
        {"subject_span": 3}, {"extra": 1}, {"p_clean": "x"}, {"kind": 3}, {"exact": [[True]]}, {"tokens": []},
    )]  # fmt: skip
    made = [_read(read_log, _wrote(folder / f"log-{i}.jsonl", f"{line}\n{text}\n")) for i, text in enumerate(logs)]
    made.append(_read(read_log, _wrote(folder / "binary.jsonl", b"\x80\x81\xff" * 50)))
    for name, thing, load in (
        ("trace.npz", t.traces[0], kf.TraceResult.load), ("average.npz", t.average["state"], kf.AverageTrace.load),
        ("report.json", t.report, kf.EvalReport.load),
    ):  # fmt: skip
        mine = folder / name.split(".")[0]
        mine.mkdir()
        thing.save(mine / name)

        def right(found, thing=thing):
            return repr(vars(found).keys()) == repr(vars(thing).keys())

        paths = [path for path in cut(mine / name, mine, 6) if "turned" not in path.name or name.endswith("npz")]
        made += [_read(load, path, right) for path in paths]
    made += [_read(kf.EvalReport.load, _wrote(folder / f"report-{i}.json", text)) for i, text in enumerate(NOT_JSON)]
    made += [_read(kf.LayerStudy.load, _wrote(folder / f"study-{i}.json", text)) for i, text in enumerate(NOT_JSON)]
    return made


def histories(folder: Path) -> list[Case]:
    """Folders of versions whose manifest or edits are damaged; names that lead out of them."""
    edit = things().edit
    good = folder / "good"
    kf.EditHistory(good).add(edit, "first")
    record = json.loads((good / "history.json").read_text())
    name = record["versions"][1]["edits"][0]
    out = {"versions": [record["versions"][0], record["versions"][1] | {"edits": ["../../victim"]}]}
    changes = [record | change for change in (
        {"fingerprint": "x"}, {"versions": []}, {"versions": 3}, {"version": "9"}, {"format": "x"}, {"sha256": "x"},
        out,
    )]  # fmt: skip
    made = []
    for i, content in enumerate([*changes, *NOT_JSON, {}]):
        mine = folder / f"manifest-{i}"
        shutil.copytree(good, mine)
        _wrote(mine / "history.json", content)
        made.append(Case(f"EditHistory manifest {i}", lambda mine=mine: kf.EditHistory(mine).current))
        made.append(Case(f"EditHistory.add to manifest {i}", lambda mine=mine: kf.EditHistory(mine).add(edit)))
    damages = (Path.unlink, lambda p: p.write_bytes(b"x"), lambda p: p.write_bytes(p.read_bytes()[:99]))
    for i, change in enumerate(damages):
        mine = folder / f"edits-{i}"
        shutil.copytree(good, mine)
        change(mine / "edits" / f"{name}.safetensors")
        made.append(Case(f"EditHistory edit file {i}", lambda mine=mine: kf.EditHistory(mine).current))
    made.append(Case("EditHistory.add twice", lambda: kf.EditHistory(good).add(edit)))
    made += [Case(f"EditHistory.rollback {n}", lambda n=n: kf.EditHistory(good).rollback(n)) for n in (-1, 2, 99)]
    return made


def merges(folder: Path) -> list[Case]:
    """Merged folders whose record lies, and checkpoints that are none."""
    t = things()
    base, merged = folder / "base", folder / "merged"
    kf.merge_checkpoint(save_tiny(base, t.model), t.edit, merged)
    kept = merged / "kedit_fast_merge" / "manifest.json"
    record = json.loads(kept.read_text())
    tensor, noted = next(iter(record["tensors"].items()))
    shard, shard_digest = next(iter(record["files"].items()))
    victim = {"files": {"../victim.safetensors": shard_digest}}
    changes = [record | change for change in (
        victim, {"files": {}}, {"files": 3}, {"tensors": {}}, {"tensors": {tensor: 3}}, {"tensors": {"x": noted}},
        {"base": 3}, {"base": {}}, {"edits": 3}, {"version": "9"}, {"format": "x"},
        {"files": {"/etc/passwd": shard_digest}}, {"files": {"a\\b": shard_digest}}, {"files": {shard: "0" * 64}},
    )]  # fmt: skip
    made = []
    for i, content in enumerate([*changes, *NOT_JSON]):
        mine = folder / f"merged-{i}"
        shutil.copytree(merged, mine)
        _wrote(mine / "kedit_fast_merge" / "manifest.json", content)
        made.append(Case(f"unmerge, manifest {i}", lambda mine=mine: kf.unmerge(mine)))
        made.append(Case(f"unmerge to another folder, manifest {i}", lambda mine=mine: kf.unmerge(mine, folder / "no")))
    out = folder / "out"
    given = {
        "from nothing": (folder / "absent", t.edit, out),
        "from a file": (kept, t.edit, out),
        "from no checkpoint": (folder, t.edit, out),
        "twice": (merged, t.edit, out),
        "into itself": (base, t.edit, base),
        "of one edit twice": (base, [t.edit, t.edit], out),
    }
    made += [Case(f"merge_checkpoint {name}", lambda a=a: kf.merge_checkpoint(*a)) for name, a in given.items()]
    return made


ALL = (fact_files, edit_files, statistics_files, settings_files, results, histories, merges)
PARTS = {build.__name__: build for build in ALL}
