"""Whole command lines on a tiny model: asked for what it has not, what contradicts itself, what is not there."""

from pathlib import Path

from tests.conftest import save_tiny
from tests.hostile.doors import things
from tests.hostile.judge import Case, command

ONE = ("--prompt", "{} is in the city of", "--subject", "The Eiffel Tower")
QUICK = ("--quiet",)


def cases(folder: Path) -> list[Case]:
    """Each with the words of its command; the truth of what is taken is in what it printed or wrote."""
    t = things()
    model, out = folder / "model", folder / "out"
    save_tiny(model, t.model)
    edit, text, empty = folder / "edit.safetensors", folder / "text.txt", folder / "empty.txt"
    t.edit.save(edit)
    text.write_text("The tower is in the city. " * 40)
    empty.write_text("")
    binary = folder / "binary.jsonl"
    binary.write_bytes(b"\x80\x81\xff" * 50)
    m = ("--model", str(model), *QUICK)
    facts = folder / "facts.json"
    facts.write_text('[{"prompt": "{} is in", "subject": "Paris", "target_new": "Rome"}]')
    o = ("-o", str(out))
    lines = (
        ("trace", *m, *o), ("trace", *ONE, *m, *o, "--facts", str(facts)), ("trace", *ONE, *m, *o, "--sever", "mlp"),
        ("trace", *ONE, *m, *o, "--corrupt", "Rome"), ("trace", *ONE, *m, *o, "--samples", "1000000000"),
        ("trace", *ONE, *m, *o, "--metric", "logit_diff"), ("trace", *ONE[:2], *m, *o),
        ("trace", "--prompt", "is in", "--subject", "Paris", *m, *o),
        ("trace", "--facts", str(binary), *m, *o), ("trace", "--facts", str(folder / "no.json"), *m, *o),
        ("trace", *ONE, "--model", str(folder / "none"), *o), ("trace", *ONE, "--model", str(folder), *o),
        ("trace", *ONE, "--model", str(facts), *o), ("trace", *ONE, *m, "-o", str(facts)),
        ("trace", *ONE, *m, *o, "--device", "meta"), ("trace", *ONE, *m, *o, "--device", "cuda:99"),
        ("trace", *ONE, *m, *o, "--device", "nonsense"), ("trace", *ONE, *m, *o, "--memory", "1MB"),
        ("stats", *m, "--layers", "9", *o), ("stats", *m, "--corpus", str(empty), *o),
        ("stats", *m, "--corpus", str(folder / "no.txt"), *o), ("stats", *m, "-o", str(facts)),
        ("stats", *m, "--corpus", str(text), "--tokens", "1000000", *o), ("stats", *m, "--corpus", str(binary), *o),
        ("edit", *m, *ONE, *o), ("edit", *m, *ONE, "--target", "Rome", "--layers", "99", *o),
        ("edit", *m, *ONE, "--target", "Rome", "--layers", "0-99", *o),
        ("edit", *m, *ONE, "--target", "Rome", "--layers", "0-9999999999", *o),
        ("edit", *m, *ONE, "--target", "Rome", "--layers", "99", "--stats", str(folder), *o),
        ("edit", *m, *ONE, "--target", "Rome", "--stats", str(facts), *o),
        ("edit", *m, *ONE, "--target", "Rome", "--stats", str(folder), *o),
        ("edit", *m, *ONE, "--target", "Rome", "--stats", str(folder), "--tokens", "5", *o),
        ("edit", *m, *ONE, "--target", "Rome", "--tokens", "5", *o),
        ("edit", *m, *ONE, "--target", "Rome", "--hparams", str(facts), *o),
        ("edit", *m, *ONE, "--target", "Rome", "--hparams", str(binary), *o),
        ("edit", *m, *ONE, "--target", "Rome", "--on-top-of", str(facts), *o),
        ("edit", *m, *ONE, "--target", "Rome", "--method", "ft", "--independent", *o),
        ("edit", *m, *ONE, "--target", "Rome", "--method", "ft", "--checkpoint", str(folder / "c"), *o),
        ("edit", *m, *ONE, "--target", "Rome", "--method", "nothing", *o),
        ("edit", *m, *ONE, "--target", "Rome", "--method", "ft", "-o", str(facts)),
        ("edit", *m, *ONE, "--target", "Rome", "--method", "ft", "-o", str(folder)),
        ("edit", *m, *ONE, "--target", "Rome", "--method", "ft", "-o", str(facts / "below")),
        ("eval", *m), ("eval", *m, str(facts)), ("eval", *m, str(edit), "--text", str(empty)),
        ("eval", *m, str(edit), "--text", str(binary)), ("eval", *m, str(edit), "--html", str(facts)),
        ("eval", *m, str(edit), "--log", str(edit)), ("eval", *m, str(edit), "--log", str(folder)),
        ("eval", *m, str(edit), str(edit)), ("eval", *m, str(folder)),
        ("gate", *m), ("gate", *m, str(facts)), ("gate", *m, str(edit), str(edit)),
        ("gate", *m, str(edit), "--suite", str(binary)), ("gate", *m, str(edit), "--thresholds", str(binary)),
        ("gate", *m, str(edit), "--text", str(empty)),
        ("gate", *m, str(edit), "--written", "none", "--requantize", "int8"),
        ("rounds", *m, "--facts", str(facts), "--method", "nothing"),
        ("rounds", *m, "--facts", str(facts), "--layers", "99"),
        ("rounds", *m, "--facts", str(facts), "--text", str(empty)),
        ("rounds", *m, "--facts", str(facts), "--plot", "x.txt"),
        ("layers", *m, "--facts", str(facts), "--traces", str(binary)),
        ("layers", *m, "--facts", str(facts), "--method", "ft"),
        ("layers", *m, "--facts", str(facts), "--layers", "99"),
        ("layers", *m, "--facts", str(facts), "--plot", str(folder)),
        ("merge", str(edit), "--model", str(folder), *o),
        ("merge", str(edit), *o),
        ("merge", *o, "--model", str(model)),
        ("merge", str(edit), str(edit), "--model", str(model), *o), ("merge", str(facts), "--model", str(model), *o),
        ("merge", str(edit), "--model", str(model), "-o", str(folder)), ("merge", str(edit), "--truncate", *o),
        ("merge", str(edit), "--model", str(model), "-o", str(facts)), ("merge", str(edit), "--peft", "-o", str(facts)),
        ("merge", "undo", str(model)), ("merge", "undo", str(facts)), ("merge", "undo", str(folder / "no")),
        ("history", "log", str(folder / "no")),
        ("history", "log", str(facts)),
        ("history", "rollback", str(folder / "no"), "0"),
        ("history", "add", str(facts), str(edit)), ("history", "add", str(folder / "h"), str(facts)),
        ("edit", "inspect", str(facts)),
        ("edit", "inspect", str(folder / "no")),
        ("edit", "diff", str(edit), str(facts)),
        ("info", "-o", str(facts)),
        ("info", "-o", str(folder)),
        ("nothing",),
        ("history", "nothing"),
        ("trace", "--nothing"),
        ("edit", "inspect", str(edit), "--model", str(folder / "none")), ("info", "--memory", "0"),
    )  # fmt: skip
    made = [Case(_name(line, folder), command(*line)) for line in lines]
    bare = folder / "bare"  # a model without any file of a tokenizer, for which an empty one would be made
    t.model.save_pretrained(bare)
    bare_model = command("trace", *ONE, "--model", str(bare), *o)
    made.append(Case("kedit-fast trace of a model without a tokenizer", bare_model))
    taken = {
        ("edit", "inspect", str(edit)): lambda said: "The Eiffel Tower" in said,
        ("edit", "inspect", str(edit), "--model", str(model), "--quiet"): lambda said: "change / W" in said,
        ("edit", "diff", str(edit), str(edit)): lambda said: "same model, method, settings and facts" in said,
        ("info",): lambda said: "python" in said,
        ("info", "--model", str(model)): lambda said: "2 layers" in said,
        ("eval", *m, "--facts", str(facts)): lambda said: "efficacy" in said and "1 fact" in said,
        ("trace", *ONE, *m, "--samples", "1", "--kinds", "state", "--plots", "0", "-o", str(folder / "t")): (
            lambda said: (folder / "t" / "traces.jsonl").stat().st_size > 0
        ),
        ("merge", str(edit), "--model", str(model), "-o", str(folder / "merged")): lambda said: (
            "1 tensor edited" in said
        ),
        ("merge", "undo", str(folder / "merged")): lambda said: "1 tensor restored bit for bit" in said,
    }
    return made + [Case(_name(line, folder), command(*line), truth) for line, truth in taken.items()]


def _name(line: tuple[str, ...], folder: Path) -> str:
    return f"kedit-fast {' '.join(line)}".replace(str(folder), "F")
