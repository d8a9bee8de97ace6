"""The door: what opens a model, what is refused there, and what is asked of an argument ``lm``."""

import inspect
import json
import shutil
from dataclasses import fields

import pytest

import kedit_fast as kf
from kedit_fast.shipping.merge import merge_checkpoint
from tests.conftest import refused, save_tiny
from tests.make import TOWER, make_edit
from tests.tiny import tiny_model


def made(editor):
    """An editor of one layer, of a class that names layers."""
    return editor(**{field.name: (1,) for field in fields(editor) if field.name == "layers"})


DOORS = {
    "trace": lambda lm: kf.trace(lm, [TOWER]),
    "second_moments": lambda lm: kf.second_moments(lm, [1]),
    "evaluate": lambda lm: kf.evaluate(lm, [TOWER]),
    "logit_lens": lambda lm: kf.logit_lens(lm, [TOWER]),
    "gate": lambda lm: kf.gate(lm, []),
    "edit_by_layer": lambda lm: kf.edit_by_layer(lm, [TOWER]),
    "edit_in_rounds": lambda lm: kf.edit_in_rounds(lm, [TOWER], kf.Rome(layers=(1,)), per_round=1),
} | {
    f"{name}.{what}": lambda lm, editor=editor, what=what: (
        editor.for_model(lm) if what == "for_model" else made(editor).edit(facts=[TOWER], lm=lm)
    )
    for name, editor in kf.EDITORS.items()
    for what in ("for_model", "edit")
}


@pytest.mark.parametrize("door", DOORS)
def test_what_open_model_returns_is_asked_for(door):
    """The model alone has no tokenizer; whoever gives it is told how to come by an LM."""
    with pytest.raises(TypeError, match=r"lm = <LlamaFor.*>: expected what open_model returns.*open_model\(model, tok"):
        DOORS[door](tiny_model("llama"))
    with pytest.raises(TypeError, match=r"lm = 'smollm2': expected what open_model returns, lm = kf\.open_model"):
        DOORS[door]("smollm2")


def test_no_public_function_that_takes_an_lm_goes_unguarded():
    public = [getattr(kf, name) for name in kf.__all__]
    made = [member for each in public if isinstance(each, type) for member in vars(each).values()]
    functions = [getattr(each, "__func__", each) for each in (*public, *made)]
    taking = [f for f in functions if inspect.isfunction(f) and "lm" in inspect.signature(f).parameters]
    taking = [f for f in taking if not f.__name__.startswith("_")]
    assert len(taking) > 10
    bare = [f.__qualname__ for f in taking if f.__code__.co_name != "door"]
    # Asked by ``edit``, which is decorated.
    of_editors = {
        "check", "check_layers", "moments_of", "sampled_contexts", "rome_contexts", "values", "z_settings", "kept",
        "read", "routed", "settings", "solve_bytes", "task", "texts",
    }  # fmt: skip
    assert {name.rpartition(".")[2] for name in bare} <= of_editors, "decorate it with takes_lm"


# ---- folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model's folder, which tests copy."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = tiny_model("llama", layers=2)
    model.set_attn_implementation("sdpa")
    return save_tiny(folder, model)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_folder_opens(folder):
    by_path, by_text = (kf.open_model(place).top_tokens("The Eiffel Tower is") for place in (folder, str(folder)))
    assert by_path == by_text


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.json", '{\n  "model_type": "llama",\n  oops\n}', r"config\.json is not JSON \(.*line 3 column 3"),
        ("config.json", "[1]", r"config\.json holds an array; expected an object"),
        ("config.json", "{}", r"config\.json names no model_type"),
        ("config.json", b"\xff\xfe\x00", r"config\.json is not JSON \(not UTF-8 text"),
        ("config.json", None, r"tiny has no config\.json; expected a model's folder"),
        ("tokenizer.json", "{", r"tokenizer\.json is not JSON \(.*line 1 column 2"),
        ("tokenizer.json", "{}", r"tokenizer of '.*tiny': its tokenizer\.json cannot be used \(KeyError"),
        ("tokenizer.json", None, r"tiny has no tokenizer\.json.*tokenizer\.save_pretrained writes it.*tokenizer="),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not JSON"),
        ("adapter_config.json", "{}", r"is an adapter \(it has an adapter_config\.json\).*merge it into its base"),
    ],
)
def test_a_folder_that_is_none(folder, name, text, says):
    file = folder / name
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=says):
        kf.open_model(folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hidden_size": "many"}, r"its config\.json cannot be used \(.*'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, r"its config\.json cannot be used \(ZeroDivisionError"),
        ({"model_type": "nosuch"}, r"its config\.json cannot be used \(ValueError.*model type `nosuch`"),
    ],
)
def test_a_config_that_says_what_cannot_be(folder, values, says):
    changed(folder / "config.json", **values)
    with pytest.raises(ValueError, match=says):
        kf.open_model(folder)


def test_a_folder_with_an_adapter_is_said_to_be_one_without_its_config_too(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").unlink()
    for memory in (None, "2GB"):
        with pytest.raises(ValueError, match="is an adapter"):
            kf.open_model(folder, memory=memory)
    with pytest.raises(ValueError, match="holds a PEFT adapter"):
        merge_checkpoint(folder, make_edit(), folder.parent / "merged")


def test_a_file_is_no_folder(folder):
    with pytest.raises(ValueError, match=r"is a file; expected a model's folder"):
        kf.open_model(folder / "model.safetensors")


# ---- code that comes with a model


CODE = "open({!r}, 'w').write('ran')\nclass Own: pass\n"


@pytest.fixture
def evil(folder, tmp_path, monkeypatch):
    """A model's folder with code in it, and the file that the code would write. Nobody is asked anything."""

    def asked(prompt=""):
        raise AssertionError(f"somebody is asked: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(str(ran)))
    yield folder
    assert not ran.exists()


OWN = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
REFUSED = r"made by code of its own \(auto_map\), and code that comes with a model is never run here"


def test_a_model_s_own_code_is_refused_and_not_run(evil):
    changed(evil / "config.json", model_type="own", auto_map=OWN)
    for memory in (None, "1MB"):
        with pytest.raises(ValueError, match=REFUSED):
            kf.open_model(evil, memory=memory)
    with pytest.raises(ValueError, match=REFUSED):
        merge_checkpoint(evil, make_edit(), evil.parent / "merged")


def test_a_tokenizer_s_own_code_is_refused_and_not_run(evil):
    changed(evil / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    with pytest.raises(ValueError, match=f"the tokenizer of .*{REFUSED}"):
        kf.open_model(evil)
    model = tiny_model("llama")
    model.config._name_or_path = str(evil)
    with pytest.raises(ValueError, match=REFUSED):
        kf.open_model(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_own_code_that_is_passed_over_is_said(evil, file):
    """transformers knows the family by itself: its own class is used, and nobody should think otherwise."""
    changed(evil / file, auto_map=OWN if file == "config.json" else {"AutoTokenizer": ["own.Own", "own.Own"]})
    with pytest.warns(UserWarning, match=r"brings code of its own \(auto_map\), which is not run: transformers'"):
        assert kf.open_model(evil).n_layers == 2


@pytest.mark.parametrize("name", ["smollm", "smolm2", "gemma-3"])
def test_a_slip_in_a_models_name_asks_no_hub(name):
    refused(f"model {name!r}: no such folder, and no name of a model on the hub; did you mean", kf.open_model, name)
