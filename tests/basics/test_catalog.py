"""The catalog: names for the parser, and what stands behind them for everybody else."""

import pytest

import kedit_fast as kf
from kedit_fast.basics import catalog
from kedit_fast.commands.edit_arguments import METHODS
from kedit_fast.editors.editor import Editor
from kedit_fast.evaluation import Benchmark


def test_the_parser_and_the_dicts_have_the_same_names():
    assert tuple(kf.EDITORS) == METHODS == tuple(catalog.EDITORS)
    assert tuple(kf.BENCHMARKS) == tuple(catalog.BENCHMARKS)


def test_what_is_loaded_is_what_the_names_say():
    assert kf.EDITORS["rome"] is kf.Rome and kf.EDITORS["ft-l"] is kf.FtL
    assert all(issubclass(editor, Editor) for editor in kf.EDITORS.values())
    assert all(isinstance(one, Benchmark) and one.name == name for name, one in kf.BENCHMARKS.items())
    assert {name: editor().method for name, editor in kf.EDITORS.items()} == {name: name for name in METHODS}


def test_a_place_where_nothing_stands_is_an_error():
    with pytest.raises(AttributeError, match="Nothing"):
        catalog.loaded({"none": "editors.rome.Nothing"})


def test_a_name_that_is_none_is_told_what_there_is():
    with pytest.raises(KeyError, match=r"'rom' is none of rome, memit.*did you mean rome"):
        kf.EDITORS["rom"]
    with pytest.raises(KeyError, match=r"'zzz' is none of counterfact.*[^?]$"):
        kf.BENCHMARKS["zzz"]
    assert "rom" not in kf.EDITORS and kf.EDITORS.get("rom") is None
