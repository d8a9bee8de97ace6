"""A program as README has them, for a type checker: `make check` reads it, nothing runs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel

import kedit_fast as kf


def one_fact(model: PreTrainedModel) -> kf.EvalReport:
    lm = kf.open_model("smollm2", memory="8GB", dtype=torch.bfloat16)
    assert_type(lm, kf.LM)
    assert_type(kf.open_model("gemma3", accept_licence=True), kf.LM)
    assert_type(kf.__version__, str)
    fact = kf.Fact("{} is in the city of", "The Eiffel Tower", target_new="Rome", target_true="Paris")
    state, _mlp, _attn = kf.trace(lm, [fact])
    assert_type(state, kf.TraceResult)
    assert_type(state.plot("eiffel.png"), Figure)
    assert_type(state.to_html(), str)
    assert_type(kf.trace_page([state], "traces.html", most=3), str)
    assert_type(kf.average([state]), dict[str, kf.AverageTrace])
    editor = kf.Memit.for_model(lm)
    assert_type(editor, kf.Memit)
    assert_type(kf.FtL.for_model(lm), kf.FtL)
    assert_type(kf.Rome.from_file("rome.json"), kf.Rome)
    assert_type(editor.layers, tuple[int, ...])
    with kf.show_progress():
        moments = kf.second_moments(lm, editor.layers, cache_dir=kf.statistics_folder())
    assert_type(moments, dict[int, kf.SecondMoment])
    edit = editor.edit(lm, [fact], moments=moments)
    assert_type(edit, kf.Edit)
    assert_type(lm.with_edit(edit).generate(fact.text, max_new_tokens=8), str)
    assert_type(lm.generate([fact.text], temperature=1.0, seed=1), list[str])
    assert_type(lm.chat([{"role": "user", "content": "Where is it?"}]), str)
    with edit.apply(model) as applied:
        assert_type(applied.undone, bool)
    edit.save(Path("edit.safetensors"))
    assert_type(kf.Edit.load("edit.safetensors"), kf.Edit)
    return kf.evaluate(lm, fact, edit, text="Paris is a city.", benchmark=kf.BENCHMARKS["counterfact"])


def many_facts(lm: kf.LM, editor: kf.Memit, moments: dict[int, kf.SecondMoment]) -> None:
    facts = kf.load_facts("builtin", n=8)
    assert_type(facts, list[kf.Fact])
    singles = editor.edit(lm, facts, moments=moments, independent=True)
    first = editor.edit(lm, facts[:4], corpus="self", checkpoint="parts")
    second = editor.edit(lm, facts[4:], moments=moments, contexts=[["{}"], ["So. {}"]], previous=first)
    kf.export_peft(kf.compose([first, second]), "adapter", model=lm, server="vllm")
    kf.merge_checkpoint("llama", [first, second], Path("edited"))
    assert_type(kf.unmerge("edited"), Path)
    assert_type(kf.EditHistory("edits").current, tuple[kf.Edit, ...])
    able = kf.capability(lm, ["kedit_common"], second, limit=10)
    assert_type(able, kf.Capability)
    assert_type(
        {task: score.base for task, of_task in able.scores.items() for score in of_task.values()}, dict[str, float]
    )
    lens = kf.logit_lens(lm, facts, singles.only(0))
    assert_type(lens, kf.LogitLens)
    assert_type(lens.plot(), Figure)
    moved = kf.what_moved(lm, first, facts, texts={"news": "Paris is a city.", "code": "x = 1"})
    assert_type(moved, kf.Moved)
    assert_type(moved.measures["kl"].edited.mean, float)


def judged(lm: kf.LM, edit: kf.Edit, facts: list[kf.Fact]) -> bool:
    suite = kf.load_suite("suite.json", Path("more.json"))
    report = kf.gate(lm, edit, suite, thresholds=kf.Thresholds(policy=kf.EditPolicy(max_facts=100)), requantize="int8")
    assert_type(suite, kf.Suite)
    assert_type(report, kf.GateReport)
    assert_type(kf.advise(10, {5: 0.1}).stop, bool)
    rounds = kf.edit_in_rounds(lm, facts, kf.AlphaEdit.for_model(lm), per_round=4, corpus="self")
    assert_type(rounds, Iterator[kf.Round])
    assert_type(kf.plot_rounds({"alphaedit": list(rounds)}, "rounds.png"), Figure)
    study = kf.edit_by_layer(lm, facts, layers=[2, 3], corpus="self")
    assert_type(study, kf.LayerStudy)
    assert_type(study.effect("mlp"), np.ndarray)
    for name, editor_class in kf.EDITORS.items():
        editor = editor_class.for_model(lm)
        assert_type(name, str)
        assert_type(editor.edit(lm, facts), kf.Edit)
    return report.passed


def refused(lm: kf.LM, fact: kf.Fact) -> None:
    """What a checker must not let pass: an error that is not one is one, by ``warn_unused_ignores``."""
    kf.open_model(5)  # type: ignore[arg-type]
    kf.trace(fact, [fact])  # type: ignore[arg-type]
    kf.trace(lm, [fact], sampels=3)  # type: ignore[call-arg]
    kf.Memit.for_model("smollm2")  # type: ignore[arg-type]
    kf.evaluate(lm, ["a fact"])  # type: ignore[arg-type]
    kf.Memit.for_model(lm).edit(lm)  # type: ignore[call-arg]
    _ = kf.nothing  # type: ignore[attr-defined]
