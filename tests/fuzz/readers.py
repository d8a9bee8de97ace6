"""What reads files that others may have written: how each is called, files that it takes, and how these are mutated."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file

import kedit_fast as kf
from kedit_fast.basics.parts import MANIFEST as RUN
from kedit_fast.basics.parts import Parts
from kedit_fast.commands.inputs import find_moments
from kedit_fast.edits.changes import PromptChange
from kedit_fast.edits.memories import MaskedMemory, MemoryChange, SideMemory
from kedit_fast.edits.memory_routes import ActivationRoute, OverlapRoute
from kedit_fast.edits.retrieval import HiddenIndex, index_of
from kedit_fast.edits.routes import NearestRoute
from kedit_fast.edits.scope import Scope, ScopeRoute
from kedit_fast.edits.text_routes import RetrievalRoute
from kedit_fast.gating import Thresholds
from kedit_fast.model.folder import CONFIG, INDEX, TOKENIZER, Checkpoint, read_config, read_tokenizer
from kedit_fast.model.gguf import read_gguf
from kedit_fast.model.shape import shape_of
from kedit_fast.model.stored_tensors import stored_tensors
from kedit_fast.moments.corpus import FORMAT as TEXT
from kedit_fast.moments.corpus import _Kept
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.shipping.adapter import RECORD, check_adapter
from kedit_fast.shipping.history import EditHistory, _sha256_of_list
from kedit_fast.shipping.merge import KEPT, MANIFEST, ORIGINALS, merge_checkpoint
from kedit_fast.shipping.unmerge import unmerge
from kedit_fast.tracing.results import average, read_log
from tests.conftest import tiny_lm
from tests.editors.networks import network
from tests.edits.test_format import saved_as_version_1
from tests.evaluation.test_easyedit import RECORD as EASYEDIT
from tests.evaluation.test_report import make_report
from tests.evaluation.test_scores import made_up as capability_of
from tests.experiments.test_by_layer import made_up
from tests.fuzz import mutate
from tests.make import FACTS, lowrank, make_edit, owned_edit
from tests.model.test_gguf import F32, Q4_1, Q8_0, gguf_file, q4_1_block, q8_0_block
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tracing.test_results import result

EXAMPLE = {
    "format": "kedit_fast.suite", "portability": [{"prompt": "One looks down on the river", "answer": "Tiber"}],
    "specificity": ["Water boils at", {"prompt": "The capital of Spain is", "answer": "Madrid"}],
    "text": ["Ordinary text."], "context": ["Ordinary text."], "doubt": ["{prompt} {answer}. Are you sure? {prompt}"],
    "languages": [{"language": "German", "relation_id": "P131", "prompt": "{} liegt in", "target_new": "Rom"}],
}  # fmt: skip
COUNTERFACT = {
    "case_id": 7, "paraphrase_prompts": ["In"], "neighborhood_prompts": ["The Louvre is in"],
    "requested_rewrite": {
        "prompt": "{} is in", "subject": "Big Ben", "relation_id": "P131",
        "target_new": {"str": "Rome"}, "target_true": {"str": "Paris"},
    },
}  # fmt: skip
ZSRE = {"src": "Where is Big Ben?", "subject": "Big Ben", "alt": "Rome", "answers": ["London"], "rephrase": "Ben?"}
KNOWN = {"subject": "Big Ben", "attribute": "London", "template": "{} is in", "prompt": "Big Ben is in"}


@dataclass(frozen=True)
class Reader:
    """read: reads the file at a path, and looks at what it was given; name: of the file, below its folder; made: writes
    files that are taken, ``folder / name`` for each of some folders; mutations: of the file; named: whether what it
    refuses names the file: one that reads bytes knows of none; quotes: whether it says what a library says"""

    read: Callable[[Path], object]
    name: str
    made: Callable[[Path], None]
    mutations: tuple[mutate.Mutation, ...] = (mutate.of_json, mutate.of_bytes)
    named: bool = True
    quotes: bool = False


def _written(name: str, *contents) -> Callable[[Path], None]:
    """Makes a file of each content: bytes, or a JSON value."""

    def make(folder: Path) -> None:
        for number, content in enumerate(contents):
            (folder / str(number)).mkdir()
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / str(number) / name).write_bytes(data)

    return make


def _saved(name: str, *things) -> Callable[[Path], None]:
    """Makes a file of each of some things that have ``save``; one may be what makes a thing."""

    def make(folder: Path) -> None:
        for number, thing in enumerate(things):
            (thing() if callable(thing) else thing).save(folder / str(number) / name)

    return make


# ---- what readers are given


def _edits(folder: Path) -> None:
    memory = MemoryChange(1, torch.ones(2, 48), torch.arange(2))
    each = torch.arange(2)
    route = NearestRoute(1, torch.ones(2, 80), torch.ones(2), each, facts=each)
    prompt = PromptChange(("Paris is in Italy. ",), (("Paris",),))
    edits = (make_edit(), owned_edit(), make_edit(deltas={1: lowrank()}, values=None, keys={}))
    beside = [make_edit(changes=[prompt], values=None, keys={})]
    beside += [make_edit(changes=[memory], values=None, keys={}, route=route)]
    side = SideMemory.of_deltas(1, [torch.eye(3), torch.ones(3, 3)], torch.float32)
    masked = MaskedMemory(1, torch.tensor([0, 2]), torch.ones(3, 2), torch.tensor([[0], [2]]), torch.arange(2))
    routes = ActivationRoute(torch.ones(2), each), OverlapRoute(0.4, torch.ones(3), torch.arange(3), each)
    for change, way in zip((side, masked), routes, strict=True):
        beside += [make_edit(changes=[change], values=None, keys={}, route=way)]
    named = [["Paris"], ["Rome"]]
    for chooses in (RetrievalRoute(index_of("tfidf", None, ["Paris is", "Rome"]), torch.arange(2), named),
                    RetrievalRoute(HiddenIndex(("a", "b"), torch.ones(2, 48), torch.zeros(48), 1), torch.arange(2)),
                    ScopeRoute(Scope(1, torch.ones(3, 48), *torch.ones(2, 48), 8.0, -4.0), ("Paris", "Rome"),
                               torch.ones(2, 3), torch.arange(2))):  # fmt: skip
        texts = PromptChange(("Paris is in Italy. ", "Rome is. "), ((), ()), owners=torch.arange(2))
        beside.append(make_edit(changes=[texts], values=None, keys={}, route=chooses))
    for number, edit in enumerate((*edits, *beside)):
        edit.save(folder / str(number) / "edit.safetensors")
    (folder / "old").mkdir()
    saved_as_version_1(make_edit(), folder / "old" / "edit.safetensors")


def _log(folder: Path) -> None:
    lines = [json.dumps(result([[0.1, 0.5], [0.9, 0.3]], (0, 1), **more).to_record()) for more in ({}, {"kind": "mlp"})]
    (folder / "0").mkdir()
    (folder / "0" / "traces.jsonl").write_text("\n".join(lines) + "\n")


def _neurons() -> kf.NeuronAttribution:
    places, fact = np.array([[1, 5], [0, 2]]), kf.Fact("The capital of {} is", "France")
    found = {"p": np.ones(1, np.float32), "by_layer": np.ones((1, 2), np.float32), "attribution": np.array([0.5, 0.25])}
    return kf.NeuronAttribution(fact, (fact.text,), " Paris", 20, **found, places=places, neurons=places[:1])


def _moment() -> SecondMoment:
    return SecondMoment(torch.eye(6), 1_000, 1, fingerprint="llama", corpus="self", dtype="float32")


def _eraser() -> kf.Eraser:
    return kf.Eraser(torch.ones(6, 2), torch.ones(2, 6), torch.zeros(6))


def _published(folder: Path) -> None:
    (folder / "0").mkdir()
    held = {"mom2.mom2": np.eye(6, dtype=np.float32), "mom2.count": np.array(9), "mom2.constructor": np.array("x")}
    np.savez(folder / "0" / "layer.1.npz", **held)


MODEL = SimpleNamespace(fingerprint="llama", dtype_name="float32", n_vocab=9)


def _kept_text(folder: Path) -> None:
    (folder / "0").mkdir()
    held = {"ids": torch.ones(2, 3, dtype=torch.int64), "state": torch.Generator().get_state()}
    save_file(held, folder / "0" / "text-llama-float32-self-seed0-2x4.safetensors", {"format": TEXT})


def _gguf(path: Path) -> None:
    found = read_gguf(path.read_bytes())
    for name in found.entries:
        found.tensor(name)


def _gguf_bytes() -> bytes:
    tensors = {
        "f": ((2, 3), F32, bytes(24)), "q": ((2, 32), Q4_1, q4_1_block(0.5, -2.0, [1] * 32) * 2),
        "w": ((32,), Q8_0, q8_0_block(0.25, [3] * 32)), "v": ((32,), 6, bytes(22)), "k": ((256,), 12, bytes(144)),
        "s": ((1, 256), 14, bytes(210)),
    }  # fmt: skip
    return gguf_file(
        {"name": "tiny", "layers": 2, "tied": True, "eps": 1e-5, "words": ["a", "b"], "n": [1, 3]}, tensors
    )


def _tensors(folder: Path) -> None:
    (folder / "0").mkdir()
    held = {
        "a.weight": torch.ones(3, 4),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "c": torch.ones((), dtype=torch.int64),
    }
    save_file(held, folder / "0" / "model.safetensors", {"format": "pt"})


def _all_read(path: Path) -> None:
    for tensor in stored_tensors(path):
        if tensor.dtype in ("F32", "BF16"):
            tensor.read(), tensor.mapped().sum()


def _index(folder: Path) -> None:
    _tensors(folder)
    (folder / "0" / "model.safetensors").rename(folder / "0" / "model-1.safetensors")
    names = dict.fromkeys(("a.weight", "b", "c"), "model-1.safetensors")
    (folder / "0" / INDEX).write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": names}))


def _indexed(path: Path) -> None:
    found = Checkpoint(path.parent)
    for name in ("a.weight", "b"):
        found.stored(name).read()
    found.files, found.n_bytes  # noqa: B018 (both look at the files)


def _history(folder: Path) -> None:
    history = EditHistory(folder / "0")
    for edit in (make_edit(fingerprint="llama"), make_edit(fingerprint="llama", deltas={1: lowrank(seed=3)})):
        history.add(edit, "why", "me", check_chain=False)


def _listed_anew(data: bytes, rng) -> bytes:
    """A list of versions whose digest fits what was changed in it."""
    data = mutate.of_json(data, rng)
    try:
        record = json.loads(data)
        record["sha256"] = _sha256_of_list(record["fingerprint"], record["versions"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return data
    return json.dumps(record).encode("utf-8", "surrogatepass")


def _merged(folder: Path) -> None:
    model = tiny_model("llama", layers=2)
    model.save_pretrained(folder / "base")
    merge_checkpoint(folder / "base", make_edit(model, deltas={1: lowrank()}), folder / "0", who="me")
    shutil.rmtree(folder / "base")


def _undone(path: Path) -> None:
    shutil.rmtree(path.parents[2] / "again", ignore_errors=True)
    unmerge(path.parents[1], path.parents[2] / "again")


ASKED = {"method": "memit", "hparams": {"layers": [1]}, "memory": 9}


def _run(folder: Path) -> None:
    with Parts(folder / "0", ASKED) as keep:
        keep("part", lambda: {"x": torch.ones(3), "n": torch.arange(3)})


def _gone_on(path: Path) -> None:
    with Parts(path.parent, ASKED) as keep:
        keep.find("part")


def _adapter(folder: Path) -> None:
    kf.export_peft(make_edit(tiny_model("llama"), deltas={1: lowrank()}), folder / "0")


def _model(folder: Path) -> None:
    for number, family in enumerate(("llama", "gpt2", "gemma3")):
        tiny_model(family, layers=2).config.save_pretrained(folder / str(number))
        tiny_tokenizer().save_pretrained(folder / str(number))


def _shape(path: Path) -> None:
    shape_of(read_config(path.parent), None)


MEMIT = {
    "layers": [3, 4], "v_lr": 0.5, "clamp_norm_factor": 0.75, "mom2_update_weight": 15000, "alg_name": "MEMIT",
    "context_template_length_params": [[5, 10]], "rewrite_module_tmp": "x.{}", "fact_token": "subject_last",
}  # fmt: skip
YAML = b"alg_name: MEMIT\nlayers: [3, 4]\nv_lr: 5e-1\ncontext_template_length_params: [[5, 10]]\ndevice: 0\n"
LIMITS = {"min_answered": 0.9, "measure": "exact", "confident": True, "min_probes": 5, "policy": {"max_facts": 10}}

TENSORS = (mutate.of_tensors,)
READERS = {
    "edit": Reader(lambda path: repr(kf.Edit.load(path)), "edit.safetensors", _edits, TENSORS),
    "network": Reader(
        lambda path: repr(kf.Network.load(path)), "net.safetensors",
        _saved("net.safetensors", lambda: network(tiny_lm("llama"), "mend", torch.float32)), TENSORS,
    ),
    "trace": Reader(
        lambda path: repr(kf.TraceResult.load(path)) + str(kf.TraceResult.load(path).normalized_effect), "trace.npz",
        _saved("trace.npz", lambda: result([[0.1, 0.5], [0.9, 0.3]], (0, 1))), (mutate.of_npz,),
    ),
    "average": Reader(
        lambda path: kf.AverageTrace.load(path).in_words(1), "average.npz",
        _saved("average.npz", lambda: average([result([[0.1, 0.5], [0.9, 0.3]], (0, 1))])["state"]), (mutate.of_npz,),
    ),
    "neurons": Reader(
        lambda path: repr(kf.NeuronAttribution.load(path)), "neurons.npz",
        _saved("neurons.npz", _neurons), (mutate.of_npz,),
    ),
    "trace log": Reader(lambda path: list(map(repr, read_log(path))), "traces.jsonl", _log, (mutate.of_lines,)),
    "moments": Reader(
        lambda path: repr(SecondMoment.load(path)), "m.safetensors", _saved("m.safetensors", _moment), TENSORS
    ),
    "eraser": Reader(kf.Eraser.load, "e.safetensors", _saved("e.safetensors", _eraser), TENSORS),
    "moments, published": Reader(lambda path: repr(SecondMoment.load(path, 1)), "layer.1.npz", _published,
                                 (mutate.of_npz,)),
    "statistics folder": Reader(
        lambda path: find_moments(MODEL, path.parent, [1]), "m.safetensors", _saved("m.safetensors", _moment), TENSORS
    ),
    "sampled text": Reader(
        lambda path: _Kept(MODEL, 2, 4, 0, path.parent).ids,
        "text-llama-float32-self-seed0-2x4.safetensors", _kept_text, TENSORS,
    ),
    "gguf": Reader(_gguf, "model.gguf", _written("model.gguf", _gguf_bytes()), (mutate.of_gguf,), named=False),
    "checkpoint": Reader(_all_read, "model.safetensors", _tensors, TENSORS),
    "model config": Reader(_shape, CONFIG, _model, quotes=True),
    "tokenizer": Reader(lambda path: read_tokenizer(path.parent), TOKENIZER, _model, quotes=True),
    "checkpoint index": Reader(_indexed, INDEX, _index),
    "suite": Reader(
        kf.load_suite, "suite.json", _written("suite.json", EXAMPLE | {"facts": [COUNTERFACT]}, [COUNTERFACT])
    ),
    "thresholds": Reader(lambda path: repr(Thresholds.from_json(path)), "limits.json", _written("limits.json", LIMITS)),
    "facts": Reader(
        kf.load_facts, "facts.json",
        _written("facts.json", [fact.to_record() for fact in FACTS], [COUNTERFACT], [ZSRE], [KNOWN]),
    ),
    "facts, lines": Reader(
        lambda path: kf.load_facts(path, skip_bad=True), "facts.jsonl",
        _written("facts.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in (COUNTERFACT, KNOWN, KNOWN))),
        (mutate.of_lines,),
    ),
    "facts, packed": Reader(kf.load_facts, "facts.json.gz", _written("facts.json.gz", mutate.packed([COUNTERFACT])),
                            (mutate.of_packed,)),
    "settings": Reader(lambda path: repr(kf.Memit.from_file(path)), "memit.json", _written("memit.json", MEMIT)),
    "settings, yaml": Reader(lambda path: repr(kf.Memit.from_file(path)), "memit.yaml", _written("memit.yaml", YAML),
                             (mutate.of_bytes, mutate.of_yaml)),
    "eval report": Reader(
        lambda path: str(kf.EvalReport.load(path)) + kf.EvalReport.load(path).to_html(), "report.json",
        _saved("report.json", make_report),
    ),
    "comparison": Reader(
        lambda path: str(kf.Comparison.load(path)), "comparison.json",
        _saved("comparison.json", lambda: kf.compare({"a": make_report(), "b": make_report()})),
    ),
    "EasyEdit's results": Reader(lambda path: repr(kf.load_easyedit(path)), "r.json", _written("r.json", [EASYEDIT])),
    "capability": Reader(
        lambda path: str(kf.Capability.load(path)) + kf.Capability.load(path).to_html(), "c.json",
        _saved("c.json", capability_of),
    ),
    "layer study": Reader(
        lambda path: repr(kf.LayerStudy.load(path)) + str(kf.LayerStudy.load(path).correlations()), "study.json",
        _saved("study.json", lambda: made_up([0.1, 0.5, 0.9])),
    ),
    "history": Reader(lambda path: list(map(repr, EditHistory(path.parent).current)), "history.json", _history,
                      (mutate.of_json, mutate.of_bytes, _listed_anew)),
    "merge record": Reader(_undone, f"{KEPT}/{MANIFEST}", _merged),
    "merge originals": Reader(_undone, f"{KEPT}/{ORIGINALS}", _merged, TENSORS),
    "run": Reader(_gone_on, RUN, _run),
    "run, a part": Reader(_gone_on, "part.safetensors", _run, TENSORS),
    "adapter": Reader(lambda path: check_adapter(path.parent), RECORD, _adapter),
}  # fmt: skip
