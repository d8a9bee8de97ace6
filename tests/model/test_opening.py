"""The door: what opens a model, what is refused there, and what is asked of an argument ``lm``."""

import pytest

import kedit_fast as kf
from tests.tiny import tiny_model

FACT = kf.Fact(prompt="{} is in the city of", subject="The Eiffel Tower", target_new="Rome", target_true="Paris")
DOORS = {
    "trace": lambda lm: kf.trace(lm, [FACT]),
    "second_moments": lambda lm: kf.second_moments(lm, [1]),
    "evaluate": lambda lm: kf.evaluate(lm, [FACT]),
    "logit_lens": lambda lm: kf.logit_lens(lm, [FACT]),
    "gate": lambda lm: kf.gate(lm, []),
    "sweep_layers": lambda lm: kf.sweep_layers(lm, [FACT]),
    "edit_in_rounds": lambda lm: kf.edit_in_rounds(lm, [FACT], kf.Rome(layers=(1,)), per_round=1),
} | {
    f"{name}.{what}": lambda lm, editor=editor, what=what: (
        editor.for_model(lm) if what == "for_model" else editor(layers=(1,)).edit(facts=[FACT], lm=lm)
    )
    for name, editor in kf.EDITORS.items()
    for what in ("for_model", "edit")
}


@pytest.mark.parametrize("door", DOORS)
def test_what_open_model_returns_is_asked_for(door):
    """The model alone has no tokenizer; whoever gives it is told how to come by an LM."""
    with pytest.raises(TypeError, match=r"lm: expected what open_model returns, got LlamaFor.*open_model\(model, tok"):
        DOORS[door](tiny_model("llama"))
    with pytest.raises(TypeError, match=r"got str; lm = kf\.open_model\(\.\.\.\)"):
        DOORS[door]("smollm2")
