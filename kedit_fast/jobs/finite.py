"""What is said of a model that gives NaN, and the check of its answers: no figure is made of them in silence."""

from collections.abc import Callable, Sequence

from torch import Tensor, isfinite

SHOWN = 80  # characters of a prompt


def not_finite(lm, said: str, *causes: str) -> ValueError:
    """The error of a model that gives NaN or infinity: what was seen, and where it may come from with the way out.

    said: what holds NaN, in words; causes: further ones, of what was done to the model
    """
    found = ["damaged weights (fetch the model again)"]
    found += ["an edit on the model that is too large"] * bool(lm.edits)
    found += causes
    if lm.dtype.itemsize < 4:
        found.append(f"{lm.dtype_name}, too narrow a dtype for this model (open it in float32, --dtype float32)")
    return ValueError(f"{said}: {', '.join(found[:-1])}{', or ' * (len(found) > 1)}{found[-1]}")


def is_broken(answers: Tensor) -> Tensor:
    """[n] bool: the rows of answers [n, ...] that hold NaN, or infinity in place of a logit or a log-probability."""
    return (answers.isnan() | answers.isposinf()).reshape(len(answers), answers[:1].numel()).any(1)


def check_answers(lm, answers: Tensor, prompt: Callable[[int], list[int]]) -> None:
    """Raises ValueError, naming the first prompt, where the model answered NaN.

    answers: [n, ...] as in ``is_broken``, read of the logits after ``prompt(i)``, the token ids of text i
    """
    bad = is_broken(answers).nonzero()[:, 0].tolist()
    if bad:
        text = lm.tokenizer.decode(prompt(bad[0]))
        text = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
        more = f" ({len(bad)} of {len(answers)} answers)" * (len(answers) > 1)
        raise not_finite(lm, f"{lm.name} gives NaN after {text!r}{more}")


def check_losses(lm, loss: Tensor, names: Sequence, when: str) -> None:
    """Raises ValueError, naming the first fact, where its loss is not finite. when: "at step 2 of 25" """
    bad = (~isfinite(loss)).nonzero()[:, 0].tolist()
    if bad:
        became = "NaN" if loss[bad[0]].isnan() else "infinite"
        said = f"the loss of fact {names[bad[0]]} became {became} {when} ({len(bad)} of {len(loss)} facts)"
        raise not_finite(lm, said, "a learning rate that is too high (lower it)")
