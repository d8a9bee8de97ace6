"""Hyper-parameters: published files load as they are, other models get derived ones and say so."""

import math
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

import kedit_fast as kf
from kedit_fast.editors import memit as memit_module
from kedit_fast.editors import rome as rome_module
from kedit_fast.editors.located import early_middle
from kedit_fast.model.shape import shape_of
from tests.conftest import refused, tiny_lm
from tests.editors.cases import MODULE_PATHS, named, written

COMMON = {"fact_token": "subject_last", "v_num_grad_steps": 20, "v_lr": 0.5, "v_loss_layer": 47, "v_weight_decay": 0.5}
COMMON |= {"kl_factor": 0.0625, "mom2_adjustment": True, "mom2_dataset": "wikipedia", "mom2_n_samples": 100000}
COMMON |= MODULE_PATHS | {"mom2_dtype": "float32"}
ROME = COMMON | {"layers": [17], "clamp_norm_factor": 4, "context_template_length_params": [[5, 10], [10, 10]]}
MEMIT = COMMON | {"layers": [13, 14, 15, 16, 17], "layer_selection": "all"}
MEMIT |= {"clamp_norm_factor": 0.75, "mom2_update_weight": 20000}


@pytest.mark.parametrize(("editor", "record", "table"), [
    (kf.Rome, ROME, rome_module.PUBLISHED),
    (kf.Memit, MEMIT, memit_module.PUBLISHED),
])  # fmt: skip
def test_a_published_file_loads_as_it_is(editor, record, table, tmp_path):
    loaded = editor.from_json(written(tmp_path, record))
    for name in {f.name for f in fields(editor)} & set(record):
        given = record[name]
        expected = tuple(tuple(x) if isinstance(x, list) else x for x in given) if isinstance(given, list) else given
        assert getattr(loaded, name) == expected, name
    assert replace(loaded, source=table["gpt2-xl"].source) == table["gpt2-xl"]
    assert len({loaded, editor.from_json(written(tmp_path, record))}) == 1, "equal settings hash alike"
    assert editor.from_json(written(tmp_path, asdict(loaded))) == loaded


@pytest.mark.parametrize("editor", [kf.Rome, kf.Memit])
@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"layers": [1], "nullspace_threshold": 2e-2, "L2": 10}, r"no field \['L2', 'nullspace_threshold'\]; it has"),
        ("{'layers': [1]}", "is not JSON"),
        ("[1, 2]", "holds an array in JSON; expected an object"),
        ('"layers"', "holds a string in JSON"),
        ("", "is not JSON"),
    ],
)  # fmt: skip
def test_a_file_that_is_none(editor, record, says, tmp_path):
    path = written(tmp_path, record)
    assert str(path) in refused(says, editor.from_json, path)


@pytest.mark.parametrize(("name", "depth", "rome_layers", "memit_layers"), [
    ("gpt2-xl", 48, (17,), (13, 14, 15, 16, 17)),
    ("openai-community/gpt2-xl", 48, (17,), (13, 14, 15, 16, 17)),
    ("EleutherAI/gpt-j-6b", 28, (5,), (3, 4, 5, 6, 7, 8)),
    ("/models/gpt2-medium", 24, (8,), None),
])  # fmt: skip
def test_for_model_gives_what_was_published(name, depth, rome_layers, memit_layers):
    lm = named(name, layers=depth)
    rome, memit = kf.Rome.for_model(lm), kf.Memit.for_model(lm)
    assert rome.layers == rome_layers and rome.source.startswith("published for gpt")
    if memit_layers is None:
        assert memit.source.startswith("derived")
    else:
        assert memit.layers == memit_layers and memit.source.startswith("published for gpt")


@pytest.mark.parametrize("table", [rome_module.PUBLISHED, memit_module.PUBLISHED])
def test_what_was_published_tells_the_depth_of_its_model(table):
    depths = {"gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48, "gpt-j-6B": 28, "gpt-neox-20b": 44}
    for name, editor in table.items():
        assert editor.v_loss_layer == depths[name] - 1 and name in editor.source


@pytest.mark.parametrize("layers", [4, 47, 49])
def test_a_name_alone_makes_no_published_model(layers):
    """A folder may be called anything."""
    lm = named("/models/gpt2-xl", layers=layers)
    for editor in (kf.Rome.for_model(lm), kf.Memit.for_model(lm)):
        assert editor.source.startswith(f"derived for {layers} layers")
        editor.check(lm)


@pytest.mark.parametrize("layers", [1, 2, 4, 12])
def test_for_model_derives_the_rest_and_says_so(layers):
    lm = named("somebody/gpt2-xl-tuned", layers=layers)
    rome, memit = kf.Rome.for_model(lm), kf.Memit.for_model(lm)
    assert rome.source == f"derived for {layers} layers"
    assert memit.source == f"derived for {layers} layers, d_ff 80"
    assert memit.mom2_update_weight == 80 and memit.clamp_norm_factor == 0.75
    assert 1 <= len(memit.layers) <= 5 and memit.layers == tuple(range(memit.layers[0], memit.layers[-1] + 1))
    for editor in (rome, memit):
        assert editor.v_loss_layer is None
        editor.check(lm)


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "emmet", "pmet", "encore", "memit-blue"])
def test_behind_a_norm_steps_are_relative(method):
    """Published settings and derived ones elsewhere have the published steps."""
    made = {family: kf.EDITORS[method].for_model(tiny_lm(family)) for family in ("llama", "gemma2", "gemma3")}
    steps = {family: (one.v_num_grad_steps, one.v_lr, one.v_lr_relative) for family, one in made.items()}
    derived = (20, 0.35, True) if method in ("rome", "emmet") else (40, 0.12, True)
    assert steps == {"llama": (20, 0.5, False), "gemma2": derived, "gemma3": derived}


@pytest.mark.parametrize(("family", "depth", "many", "one"), [
    ("llama", 30, [3, 4, 5, 6, 7], 5),
    ("llama", 3, [0, 1, 2], 0),
    ("gemma2", 18, [2, 3, 4, 5, 6], 2),
    ("gemma2", 26, [3, 4, 5, 6, 7], 3),
    ("gemma2", 42, [4, 5, 6, 7, 8], 4),
    ("gemma2", 2, [0, 1], 0),
    ("gemma2", 1, [0], 0),
])  # fmt: skip
def test_derived_layers_lie_in_the_early_middle(family, depth, many, one):
    lm = named("somebody's", family, layers=depth)
    assert [list(kf.EDITORS[name].for_model(lm).layers) for name in ("memit", "alphaedit", "pmet")] == 3 * [many]
    assert [kf.EDITORS[name].for_model(lm).layers for name in ("rome", "emmet")] == 2 * [(one,)]
    assert list(early_middle(shape_of(lm.config))) == many, "plans are of these layers, too"


def test_the_source_is_kept_with_an_edit():
    lm = named("tiny")
    editor = replace(kf.Memit.for_model(lm), mom2_adjustment=False, v_num_grad_steps=1)
    made = editor.edit(lm, kf.Fact(prompt="{} is in", subject="Big Ben", target_new="Rome"), contexts=["{}"])
    assert made.hparams["source"] == "derived for 4 layers, d_ff 80"
    assert made.hparams["layers"] == list(editor.layers)


def test_settings_are_frozen_and_listed():
    expected = {"rome": kf.Rome, "memit": kf.Memit, "alphaedit": kf.AlphaEdit, "ft": kf.Ft, "ft-l": kf.FtL}
    assert expected.items() <= kf.EDITORS.items()
    with pytest.raises(FrozenInstanceError):
        kf.Rome().v_lr = 1.0
    refused("key = 'both': expected one of published, averaged", kf.Rome, key="both")
    with pytest.raises(TypeError):
        kf.Memit(lr=0.5)


NUMBERS = ("v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor", "regularizer")
WRONG = [
    *(("layers", value, "layers") for value in (17, "17", [1.0], ["1"], [True], [-1], [[1]], None)),
    *(("v_num_grad_steps", value, "a whole number") for value in (2.5, 20.0, "20", True, None, [20])),
    *(("v_loss_layer", value, "a whole number.*, or None") for value in (-1, 47.0, "47", True)),
    *((name, value, "a finite number") for name in NUMBERS for value in (None, "0.5", math.nan, math.inf, [0.5], True)),
    *(("mom2_adjustment", value, "True or False") for value in ("false", 0, 1, None)),
    *(("context_template_length_params", value, "(pairs|a whole number from 1)") for value in (
        [[4, -1]], [[0, 3]], [4, 2], [[4]], [[4, 2, 1]], [["4", "2"]], [[4.0, 2]], "4", 4, None,
    )),
    ("source", 3, "a text"),
    ("fact_token", None, "a text"),
    ("fact_token", "last", "one of subject_last"),
    ("layers", (1, 1), "each layer once"),
    *((name, -5, "a finite number of at least 0") for name in ("v_weight_decay", "kl_factor", "regularizer")),
    *((name, value, "(number above 0|of at least 1)") for name in kf.Rome.POSITIVE for value in (0, -1)),
]  # fmt: skip


@pytest.mark.parametrize("editor", [kf.Rome, kf.Memit])
@pytest.mark.parametrize(("name", "value", "says"), WRONG)
def test_a_value_of_another_kind_is_refused(editor, name, value, says, tmp_path):
    """When the editor is made: not after hours of statistics, and not in the words of what failed inside."""
    expected = rf"{name} .*: expected .*{says}"
    refused(f"^{expected}", editor, **{name: value})
    refused(f"^{expected}", replace, editor(), **{name: value})
    path = written(tmp_path, {name: value})
    refused(f"^{re.escape(str(path))}: {expected}", editor.from_json, path)


@pytest.mark.parametrize("value", [None, "15000", 0, -1, math.nan, True])
def test_memit_s_weight_is_a_number_above_0(value):
    refused(r"^mom2_update_weight = .*: expected a finite number above 0", kf.Memit, mom2_update_weight=value)


def test_what_the_fields_take():
    made = kf.Memit(layers=[3, 4], v_lr=1, v_weight_decay=0, kl_factor=0.0, context_template_length_params=[[4, 2]])
    assert made.layers == (3, 4) and made.context_template_length_params == ((4, 2),) and made.v_loss_layer is None
    assert kf.Rome(context_template_length_params=()).context_template_length_params == ()
