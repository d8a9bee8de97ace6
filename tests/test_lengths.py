"""A text beyond the model's positions is refused at once, in every flow: no sweep begins."""

import re
from dataclasses import replace

import pytest

import kedit_fast as kf
from tests.conftest import refused, tiny_lm
from tests.tiny import POSITIONS

LONG = "The Eiffel Tower is in the city of Paris. " * 15
FACT = kf.Fact(
    prompt="{} is in the city of", subject="The Eiffel Tower", target_new="Rome", target_true="Paris",
    paraphrases=["The Eiffel Tower is in"],
)  # fmt: skip
WORDY = replace(FACT, prompt=LONG + "{} is in the city of")
ASKED = replace(
    FACT, neighborhood=("Space Needle is in the city of Seattle. " * 16,), subject="Big Ben", prompt="{} is in"
)  # only evaluation reads this
EDITOR = kf.Rome(layers=(1,), mom2_adjustment=False, v_num_grad_steps=1)

FLOWS = {
    "trace": lambda lm: kf.trace(lm, [FACT, WORDY]),
    "attribution": lambda lm: kf.trace(lm, [FACT, WORDY], method="attribution"),
    "edit": lambda lm: EDITOR.edit(lm, [replace(FACT, subject="Big Ben"), WORDY]),
    "ft": lambda lm: kf.Ft(layers=(1,)).edit(lm, [WORDY]),
    "evaluate": lambda lm: kf.evaluate(lm, [FACT, ASKED]),
    "evaluate, generating": lambda lm: kf.evaluate(lm, [FACT], generate=POSITIONS),
    "generate": lambda lm: lm.generate(["Big Ben", LONG]),
    "generate more than there is room": lambda lm: lm.generate("Big Ben", POSITIONS),
    "top_tokens": lambda lm: lm.top_tokens(LONG),
    "lens": lambda lm: kf.logit_lens(lm, [FACT, WORDY]),
    "rounds": lambda lm: kf.edit_in_rounds(lm, [FACT, ASKED], EDITOR, per_round=1, contexts=["{}"]),
    "layers": lambda lm: kf.edit_by_layer(lm, [FACT, ASKED], EDITOR, contexts=["{}"]),
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_text_that_is_too_long_is_refused_before_any_sweep(flow, family, no_sweep):
    """The first has a table of learned positions, the second one of rotary angles."""
    long = rf"a text of 1\d\d tokens; this model takes {POSITIONS} here: its position"
    says = refused(long, FLOWS[flow], tiny_lm(family))
    if flow in ("trace", "edit", "evaluate", "rounds", "layers"):
        assert re.search(r"fact .*(Eiffel Tower|Big Ben).*: a text of", says)


def test_a_text_as_long_as_the_model_s_positions_is_taken():
    """The last token that is generated is not read."""
    lm = tiny_lm("gpt2")
    room = POSITIONS - len(lm.encode("Big Ben"))
    lm.generate("Big Ben", room + 1)
    refused(r"a prompt of \d and \d+ new tokens: a text of 129 tokens", lm.generate, "Big Ben", room + 2)
