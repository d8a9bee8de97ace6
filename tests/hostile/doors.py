"""Every public function with its arguments: what is no value for each, and a call that is right but for it."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch

import kedit_fast as kf
from kedit_fast.gating.questions import Sizes
from tests.conftest import open_tiny
from tests.make import FACTS, make_edit
from tests.tiny import D_FF, tiny_model

THING = object()
NO_NUMBER = (None, "a", "", b"1", [1], {}, THING, math.nan, math.inf, True, 10**400, "1", torch.ones(2), np.ones(2), 1j)
# By kind of argument: values that none of that kind takes.
WRONG = {
    "whole": (*NO_NUMBER, 1.5, 2.0, -1, 10**30),
    "positive": (*NO_NUMBER, 1.5, 2.0, -1, 0, 10**30),
    "number": (*NO_NUMBER, -0.5, -math.inf),
    "share": (*NO_NUMBER, -0.1, 1.5, 90),
    "seed": (*NO_NUMBER, 1.5, -1, 2**32, 10**30),
    "flag": (None, "true", "False", 0, 1, 2.0, [], {}, THING),
    "text": (None, 3, 0.5, b"x", ["x"], {}, THING, "", "  ", "\ud800"),
    "words": (None, 3, b"x", ["x"], {}, THING, "\ud800"),
    "choice": (None, 3, "nothing", "", b"x", ["exact"], {}, THING),
    "name": (3, "nothing", "", b"x", ["a"], {}, THING),
    "reports": (None, 3, "a", [3], {}, {"a": 3, "b": 3}, {3: None}, THING),
    "choices": (None, 3, "nothing", "", ["state", "nothing"], [], {}, THING, [3], [None]),
    "path": (None, 3, 0.5, "", b"x", ["x"], {}, THING, "a\0b"),
    "layers": (1, "1", "0-1", None, [-1], [99], [1.5], ["a"], [True], [None], {1: 2}, range(10**12), [10**30], THING),
    "facts": (None, 3, "Paris", [3], [None], [], {"prompt": "x"}, THING, [FACTS[0], "x"]),
    "edit": (3, "edit.safetensors", {}, THING, [3], [None], b"x"),
    "object": (3, "x", [3], {}, THING, 0.5),
    "dict": (3, "x", [3], THING, 0.5),
    "changes": (None, 3, "x", [3], [None], THING, 0.5, {1: 3}, {"a": None}, {None: 1}),
    "any layers": (1, "1", "0-1", [-1], [1.5], ["a"], [True], [None], {1: 2}, range(10**12), [10**30], THING),
    "thing": (3, [3], {}, THING, 0.5, b"x"),
    "chat": (3, "yes", [3], [{"role": "user"}], {}, THING, [("a",)]),
    "noise": (None, "t3", "s", -1, "u-1", math.nan, math.inf, [3], {}, THING, True, "snan"),
    "size": (0, -5, "much", "1e400", "nan", 1.5, True, [1], {}, THING, "GB", 2**70),
    "dtype": (3, "int8", "float8_e4m3fn", "x", "", torch.int8, [], THING),
    "device": (3, "x", "meta", "cuda:99", "", [], THING, 1.5),
    "contexts": (3, [], [[]], [3], ["no place"], [["So. {}"]], [["{}"], []], {}, THING, [["{}"], ["{} {}"]]),
    "corpus": (3, 0.5, [], [3], {}, THING, b"x", [None]),
    "moments": (3, "x", [3], THING, {1: 3}, {}, 0.5),
    "prompts": (None, 3, [3], [None], {}, THING, [], "", [""]),
    "texts": (None, 3, 0.5, [3], [None], {}, THING),
    "pairs": (3, "x", [3], [[1]], [[1, 2, 3]], [[0, 1]], [["a", 1]], {}, THING, None),
}


@dataclass(frozen=True, repr=False)
class Door:
    """A public function or class. call: with its right arguments, but for the one that is given; arguments: {name: kind
    of WRONG, with a question mark where None is taken}"""

    name: str
    call: Callable
    arguments: dict[str, str]

    def __repr__(self) -> str:
        return f"Door({self.name})"

    def wrong(self, argument: str) -> tuple:
        """What this argument must refuse."""
        kind = self.arguments[argument]
        values = WRONG[kind.removesuffix("?")]
        return tuple(value for value in values if value is not None) if kind.endswith("?") else values


@cache
def things() -> SimpleNamespace:
    """What right arguments are made of, made once; nothing may change it."""
    model = tiny_model("gpt2", layers=2)
    lm = open_tiny(model)
    edit = make_edit(model, deltas={1: make_edit().deltas[1]}, keys={})
    single = make_edit(model, deltas={1: make_edit().deltas[2]}, keys={}, values=None, facts=FACTS[:1])
    quick = {"layers": (1,), "mom2_adjustment": False, "v_num_grad_steps": 1, "context_template_length_params": ()}
    rome = kf.Rome(**quick)
    result = kf.trace(lm, FACTS[0], kinds=("state", "mlp"), samples=2)
    moment = kf.SecondMoment(torch.eye(D_FF), 1_000, 1, lm.fingerprint)
    report = kf.evaluate(lm, list(FACTS[:1]), edit)
    consistency = kf.consistency(lm, edit, generate=0)
    return SimpleNamespace(
        lm=lm, model=model, edit=edit, single=single, rome=rome, quick=quick, traces=result, moment=moment,
        report=report, consistency=consistency, average=kf.average(result), facts=list(FACTS),
    )  # fmt: skip


def _with(function, *before, **right):
    """A call of a function with right arguments, any of which may be replaced by name."""
    return lambda **wrong: function(*before, **right | wrong)


def doors(folder) -> list[Door]:
    """All of them. folder: an empty one, for what may be written."""
    t = things()
    out = str(folder / "out")
    edit_args = dict(facts="facts", contexts="contexts?", previous="edit?", independent="flag", seed="seed")
    rounds = dict(per_round=1, contexts=["{}"], text=None)
    return [
        Door("open_model", _with(kf.open_model, model=t.model, tokenizer=t.lm.tokenizer), dict(
            model="path", memory="size", device="device", dtype="dtype", accept_licence="flag")),
        Door("LM.top_tokens", _with(t.lm.top_tokens, prompt="Paris is"), dict(prompt="text", k="positive")),
        Door("LM.encode", _with(t.lm.encode), dict(text="words")),
        Door("LM.generate", _with(t.lm.generate, prompts="Paris is", max_new_tokens=1), dict(
            prompts="prompts", max_new_tokens="positive", temperature="number", top_k="positive?", seed="seed?",
            until="object")),
        Door("LM.with_edit", _with(t.lm.with_edit, edit=t.edit), dict(edit="object", written="dtype")),
        Door("Fact", _with(kf.Fact, prompt="{} is in", subject="Paris"), dict(
            prompt="text", subject="text?", target_new="text?", target_true="text?", phrasings="object",
            paraphrases="object",
            neighborhood="object", same_subject="object", id="words", provenance="dict")),
        Door("load_facts", _with(kf.load_facts, path="builtin"), dict(path="path", n="positive?", skip_bad="flag")),
        Door("trace", _with(kf.trace, t.lm, facts=t.facts[0], samples=1, kinds=("state",)), dict(
            facts="facts", kinds="choices", window="positive", samples="positive", noise="noise", seed="seed",
            answer="text?", metric="choice", sever="choice?", method="choice", top="positive", log="path?",
            checkpoint="path?")),
        Door("trace.stride", _with(kf.trace, t.lm, facts=t.facts[0], samples=1, method="strided"), dict(
            stride="positive")),
        Door("trace.corrupt", _with(kf.trace, t.lm, facts=t.facts[0], samples=1), dict(corrupt="object")),
        Door("average", _with(kf.average), dict(results="facts")),
        Door("AverageTrace.recommend_layers", _with(t.average["state"].recommend_layers), dict(n="positive")),
        Door("TraceResult.load", _with(kf.TraceResult.load), dict(path="path")),
        Door("TraceResult.save", _with(t.traces[0].save), dict(path="path")),
        Door("TraceResult.to_html", _with(t.traces[0].to_html), dict(path="path?")),
        Door("trace_page", _with(kf.trace_page, results=t.traces), dict(
            results="changes", path="path?", most="whole", model="words")),
        Door("TraceResult.plot", _with(t.traces[0].plot), dict(path="path?")),
        Door("AverageTrace.load", _with(kf.AverageTrace.load), dict(path="path")),
        Door("AverageTrace.save", _with(t.average["state"].save), dict(path="path")),
        Door("AverageTrace.plot", _with(t.average["state"].plot), dict(path="path?")),
        Door("second_moments", _with(kf.second_moments, t.lm, layers=(0,), n_tokens=10), dict(
            layers="layers", corpus="corpus", n_tokens="positive?", seed="seed", cache_dir="path?")),
        Door("SecondMoment", _with(kf.SecondMoment, matrix=torch.eye(3), n_tokens=9, layer=0), dict(
            matrix="object", n_tokens="positive", layer="whole")),
        Door("SecondMoment.load", _with(kf.SecondMoment.load), dict(path="path")),
        Door("SecondMoment.save", _with(t.moment.save), dict(path="path")),
        *(Door(name, _with(editor), _fields_of(editor)) for name, editor in kf.EDITORS.items()),
        *(Door(f"{name}.from_json", _with(editor.from_json), dict(path="path")) for name, editor in kf.EDITORS.items()),
        Door("train_editor", _with(kf.train_editor, t.lm, facts=t.facts), dict(
            facts="facts", method="choice", settings="object", held_out="share", routed="flag", checkpoint="path?",
            seed="seed")),
        Door("Mend.network", _with(kf.Mend), dict(network="object")),
        Door("Network.load", _with(kf.Network.load), dict(path="path")),
        Door("Rome.edit", _with(t.rome.edit, t.lm, facts=t.facts[:1], contexts=["{}"]), edit_args | {
            "checkpoint": "path?"}),
        Door("Memit.edit", _with(kf.Memit(**t.quick).edit, t.lm, facts=t.facts[:1], contexts=["{}"]), edit_args),
        Door("Rome.edit.moments", _with(kf.Rome(layers=(1,)).edit, t.lm, facts=t.facts[:1], contexts=["{}"]), dict(
            moments="moments", corpus="corpus")),
        Door("Ft.edit", _with(kf.Ft(layers=(1,), num_steps=1).edit, t.lm, facts=t.facts[:1]), dict(
            facts="facts", previous="edit?", independent="flag", seed="seed")),
        Door("evaluate", _with(kf.evaluate, t.lm, facts=t.facts[:1]), dict(
            facts="facts", edit="edit", benchmark="object", text="corpus", generate="whole", max_tokens="positive",
            log="path?", both_forms="flag", checkpoint="path?")),
        Door("evaluate.given", _with(kf.evaluate, t.lm, facts=t.facts[:1]), dict(known="object", judge="object")),
        Door("compare", _with(kf.compare, reports={"a": t.report, "b": t.report}), dict(
            reports="reports", against="name?")),
        Door("Comparison.load", _with(kf.Comparison.load), dict(path="path")),
        Door("Comparison.save", _with(kf.compare({"a": t.report, "b": t.report}).save), dict(path="path")),
        Door("Comparison.to_html", _with(kf.compare({"a": t.report, "b": t.report}).to_html), dict(path="path?")),
        Door("citation", _with(lambda what: kf.citation(what)), dict(what="object")),
        Door("counterfact_with", _with(kf.counterfact_with), dict(path="path")),
        Door("load_easyedit", _with(kf.load_easyedit), dict(path="path")),
        Door("capability", _with(kf.capability, t.lm, tasks="kedit_common"), dict(
            tasks="texts", edit="edit", limit="positive?", num_fewshot="whole?", task_folder="path?", chat="flag",
            seed="seed")),
        Door("Capability.load", _with(kf.Capability.load), dict(path="path")),
        Door("Capability.save", _with(kf.Capability({}, {}).save), dict(path="path")),
        Door("Capability.to_html", _with(kf.Capability({}, {}).to_html), dict(path="path?")),
        Door("EvalReport.load", _with(kf.EvalReport.load), dict(path="path")),
        Door("EvalReport.save", _with(t.report.save), dict(path="path")),
        Door("EvalReport.to_html", _with(t.report.to_html), dict(path="path?")),
        Door("Edit", _with(kf.Edit, method="m", hparams={}, fingerprint="", facts=(), changes={}), dict(
            method="words", hparams="dict", fingerprint="words", facts="dict", changes="changes",
            provenance="dict", keys="dict")),
        Door("Edit.only", _with(t.edit.only), dict(i="whole")),
        Door("Edit.load", _with(kf.Edit.load), dict(path="path")),
        Door("Edit.save", _with(t.edit.save), dict(path="path")),
        Door("Edit.apply", _with(t.edit.apply), dict(hf_model="object")),
        Door("compose", _with(kf.compose), dict(edits="edit")),
        Door("export_peft", _with(kf.export_peft, edits=t.edit, folder=out, model=t.model), dict(
            edits="edit", folder="path", max_rank="positive?", truncate="flag", server="choice?",
            check_fingerprint="flag")),
        Door("load_peft", _with(kf.load_peft, hf_model=t.model, folder=out), dict(hf_model="object", folder="path")),
        Door("merge_checkpoint", _with(kf.merge_checkpoint, source=str(folder), edits=t.edit, out=out), dict(
            source="path", edits="edit", out="path", who="words", message="words", force="flag")),
        Door("unmerge", _with(kf.unmerge, folder=str(folder)), dict(folder="path", out="path?")),
        Door("EditHistory", _with(kf.EditHistory), dict(folder="path")),
        Door("EditHistory.add", _with(kf.EditHistory(out).add, edit=t.edit), dict(
            edit="object", message="words", who="words", check_chain="flag")),
        Door("EditHistory.edits_of", _with(kf.EditHistory(out).edits_of), dict(number="whole")),
        Door("EditHistory.rollback", _with(kf.EditHistory(out).rollback, number=0), dict(
            number="whole", message="words", who="words")),
        Door("gate", _with(kf.gate, t.lm, edit=t.edit), dict(
            edit="edit", suite="object", thresholds="object", written="dtype", requantize="choice?", group="positive",
            builtin="flag", sizes="object", chat="chat")),
        Door("Suite", _with(kf.Suite), dict(
            facts="object", portability="object", specificity="object", languages="object", name="words")),
        Door("Thresholds", _with(kf.Thresholds), _fields_of(kf.Thresholds)),
        Door("Thresholds.from_json", _with(kf.Thresholds.from_json), dict(path="path")),
        Door("Sizes", _with(Sizes), dict.fromkeys([f.name for f in dataclasses.fields(Sizes)], "positive")),
        Door("load_suite", lambda paths: kf.load_suite(paths), dict(paths="path")),
        Door("logit_lens", _with(kf.logit_lens, t.lm, facts=t.facts[:1]), dict(facts="facts", edit="edit")),
        Door("what_moved", _with(kf.what_moved, t.lm, edit=t.edit), dict(
            edit="edit", facts="facts?", texts="dict?", prompts="prompts?", max_tokens="positive", seed="seed")),
        Door("Moved.load", _with(kf.Moved.load), dict(path="path")),
        Door("evaluate_edit", _with(kf.evaluate_edit, t.lm, edit=t.edit, tasks=()), dict(
            edit="edit", cases="facts?", suite="object", thresholds="object", tasks="object", texts="dict?",
            relations="path?", generate="positive", seed="seed")),
        Door("EditPolicy", _with(kf.EditPolicy), dict(
            max_facts="positive", max_growth="number", max_drift="number", min_retention="share", warn_at="share")),
        Door("advise", _with(kf.advise, n_facts=1, growth={}), dict(
            n_facts="whole", growth="dict", policy="object")),
        Door("edit_in_rounds", _with(kf.edit_in_rounds, t.lm, facts=t.facts, editor=t.rome, **rounds), dict(
            facts="facts", editor="object", per_round="positive", contexts="contexts?", max_tokens="positive",
            old="whole", seed="seed", log="path?", checkpoint="path?")),
        Door("retrieve", _with(kf.retrieve, texts=["a", "b"], queries=["a"], k=1), dict(
            texts="texts", queries="texts", k="positive", retriever="words")),
        Door("mello", _with(kf.mello, t.lm, edit=t.edit, questions="Who?"), dict(
            edit="edit", questions="prompts", max_hops="positive", max_new_tokens="positive", chat="flag")),
        Door("routed", _with(kf.routed, t.lm, edit=t.single, route="names"), dict(edit="edit", route="choice")),
        Door("related", _with(kf.related, facts=t.facts), dict(
            facts="facts", among="facts?", phrasings="whole", same_subject="whole")),
        Door("forgetting", _with(kf.forgetting, facts=t.facts), dict(facts="facts", say="text?")),
        Door("verify_forgotten", _with(kf.verify_forgotten, t.lm, edit=t.edit), dict(
            edit="edit", budget="positive", bits="any layers", relearning_steps="whole", relearn="object",
            keep="object")),
        Door("load_relations", lambda tables: kf.load_relations(tables), dict(tables="path")),
        Door("implied", _with(kf.implied, facts=t.facts, table="builtin"), dict(
            facts="facts", table="path", hops="positive", lm="object")),
        Door("consistency", _with(kf.consistency, t.lm, edit=t.edit, generate=1), dict(
            edit="edit", table="path", hops="positive", ask="flag", by="choice", generate="whole")),
        Door("Consistency.load", _with(kf.Consistency.load), dict(path="path")),
        Door("Consistency.save", _with(t.consistency.save), dict(path="path")),
        Door("Consistency.save_rest", _with(t.consistency.save_rest), dict(path="path")),
        Door("Consistency.to_html", _with(t.consistency.to_html), dict(path="path?")),
        Door("knowledge_neurons", _with(kf.knowledge_neurons, t.lm, facts=t.facts[:1]), dict(
            facts="facts", steps="positive", threshold="share", share="share", common="share", answer="text?",
            paraphrases="flag", layers="layers?", top="whole")),
        Door("leace", _with(kf.leace, t.lm, prompts=["a", "b"], labels=[0, 1], layers=[1]), dict(
            prompts="prompts", labels="thing", site="choice", positions="choice")),
        Door("LeaceFitter", _with(kf.LeaceFitter, x_dim=3, z_dim=1), dict(
            x_dim="positive", z_dim="positive", method="choice", affine="flag", constrain_cov_trace="flag",
            shrinkage="flag", svd_tol="number")),
        Door("edit_by_layer", _with(kf.edit_by_layer, t.lm, facts=t.facts, editor=t.rome, contexts=["{}"]), dict(
            facts="facts", editor="object", layers="layers?", contexts="contexts?", trace="object", kinds="choices",
            samples="positive", seed="seed", log="path?", checkpoint="path?")),
        Door("LayerStudy.load", _with(kf.LayerStudy.load), dict(path="path")),
        Door("plot_rounds", _with(kf.plot_rounds), dict(rounds="object")),
        *(
            Door(f"{name}.lm", call, dict(lm="object"))
            for name, call in {
                "trace": _with(kf.trace, facts=t.facts), "evaluate": _with(kf.evaluate, facts=t.facts),
                "capability": _with(kf.capability, tasks="kedit_common"),
                "second_moments": _with(kf.second_moments, layers=(0,)), "gate": _with(kf.gate, edit=t.edit),
                "logit_lens": _with(kf.logit_lens, facts=t.facts), "what_moved": _with(kf.what_moved, edit=t.edit),
                "Rome.edit": _with(t.rome.edit, facts=t.facts),
                "Rome.for_model": _with(kf.Rome.for_model), "Ft.edit": _with(kf.Ft(layers=(1,)).edit, facts=t.facts),
                "edit_by_layer": _with(kf.edit_by_layer, facts=t.facts),
                "edit_in_rounds": _with(kf.edit_in_rounds, facts=t.facts, editor=t.rome, per_round=1),
            }.items()
        ),
    ]  # fmt: skip


def _fields_of(kind: type) -> dict[str, str]:
    """{field: kind} of a class of settings, by its annotations."""
    positive = getattr(kind, "POSITIVE", ())
    kinds = {
        int: "whole", float: "number", bool: "flag", str: "words", int | None: "whole?", float | None: "share?",
        tuple[int, ...]: "any layers", tuple[str, ...]: "texts", tuple[tuple[int, int], ...]: "pairs",
    }  # fmt: skip
    found = {f.name: kinds[f.type] for f in dataclasses.fields(kind) if f.type in kinds}
    found |= dict.fromkeys(set(positive) & {name for name, k in found.items() if k == "whole"}, "positive")
    if kind is kf.Thresholds:
        found |= {name: "share" for name, k in found.items() if k == "number"}
        found |= {name: "positive" for name, k in found.items() if k == "whole"}
    return found
