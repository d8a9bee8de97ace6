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
    trace, to_rome = ("trace", *ONE, *m, *o), ("edit", *m, *ONE, "--target", "Rome")
    rome = (*to_rome, *o)
    evaluate, gate = ("eval", *m, str(edit)), ("gate", *m, str(edit))
    rounds, layers = ("rounds", *m, "--facts", str(facts)), ("layers", *m, "--facts", str(facts))
    merge, no_file = ("merge", str(edit), "--model", str(model)), str(folder / "no")
    lines = (
        ("trace", *m, *o), (*trace, "--facts", str(facts)), (*trace, "--sever", "mlp"), (*trace, "--corrupt", "Rome"),
        (*trace, "--samples", "1000000000"), (*trace, "--metric", "logit_diff"), ("trace", *ONE[:2], *m, *o),
        ("trace", "--prompt", "is in", "--subject", "Paris", *m, *o), ("trace", "--facts", str(binary), *m, *o),
        ("trace", "--facts", str(folder / "no.json"), *m, *o), ("trace", *ONE, "--model", str(folder / "none"), *o),
        ("trace", *ONE, "--model", str(folder), *o), ("trace", *ONE, "--model", str(facts), *o),
        ("trace", *ONE, *m, "-o", str(facts)), (*trace, "--device", "meta"), (*trace, "--device", "cuda:99"),
        (*trace, "--device", "nonsense"), (*trace, "--memory", "1MB"),
        ("stats", *m, "--layers", "9", *o), ("stats", *m, "--corpus", str(empty), *o),
        ("stats", *m, "--corpus", str(folder / "no.txt"), *o), ("stats", *m, "-o", str(facts)),
        ("stats", *m, "--corpus", str(text), "--tokens", "1000000", *o), ("stats", *m, "--corpus", str(binary), *o),
        ("edit", *m, *ONE, *o), (*rome, "--layers", "99"), (*rome, "--layers", "0-99"),
        (*rome, "--layers", "0-9999999999"), (*rome, "--layers", "99", "--stats", str(folder)),
        (*rome, "--stats", str(facts)), (*rome, "--stats", str(folder)), (*rome, "--tokens", "5"),
        (*rome, "--stats", str(folder), "--tokens", "5"), (*rome, "--hparams", str(facts)),
        (*rome, "--hparams", str(binary)),
        (*rome, "--on-top-of", str(facts)), (*rome, "--method", "ft", "--independent"),
        (*rome, "--method", "ft", "--checkpoint", str(folder / "c")), (*rome, "--method", "nothing"),
        *((*to_rome, "--method", "ft", "-o", str(place)) for place in (facts, folder, facts / "below")),
        ("eval", *m), ("eval", *m, str(facts)), (*evaluate, "--text", str(empty)), (*evaluate, "--text", str(binary)),
        (*evaluate, "--html", str(facts)), (*evaluate, "--log", str(edit)), (*evaluate, "--log", str(folder)),
        (*evaluate, str(edit)), ("eval", *m, str(folder)),
        ("summary", *m), ("summary", *m, str(facts)), ("summary", *m, str(edit), "--relations", str(binary)),
        ("compare", *m), ("compare", *m, str(facts), str(edit)), ("compare", *m, str(edit), str(binary)),
        ("compare", *m, "--methods", "rome,memit", "--facts", str(facts), "--against", "no"),
        ("capability", *m, str(facts)), ("capability", *m, "--tasks", ","),
        ("capability", *m, "--task-folder", no_file),
        ("gate", *m), ("gate", *m, str(facts)), (*gate, str(edit)), (*gate, "--suite", str(binary)),
        (*gate, "--thresholds", str(binary)), (*gate, "--text", str(empty)),
        (*gate, "--written", "none", "--requantize", "int8"),
        (*rounds, "--method", "nothing"), (*rounds, "--layers", "99"), (*rounds, "--text", str(empty)),
        (*rounds, "--plot", "x.txt"), (*layers, "--traces", str(binary)), (*layers, "--method", "ft"),
        (*layers, "--layers", "99"), (*layers, "--plot", str(folder)),
        ("merge", str(edit), "--model", str(folder), *o), ("merge", str(edit), *o),
        ("merge", *o, "--model", str(model)), (*merge, str(edit), *o), (*merge, "-o", str(folder)),
        ("merge", str(facts), "--model", str(model), *o),
        ("merge", str(edit), "--truncate", *o), ("merge", str(edit), "--peft", "-o", str(facts)),
        (*merge, "-o", str(facts)), ("merge", "undo", str(model)), ("merge", "undo", str(facts)),
        ("merge", "undo", no_file),
        ("history", "log", no_file), ("history", "log", str(facts)), ("history", "rollback", no_file, "0"),
        ("history", "add", str(facts), str(edit)), ("history", "add", str(folder / "h"), str(facts)),
        ("edit", "inspect", str(facts)), ("edit", "inspect", no_file), ("edit", "diff", str(edit), str(facts)),
        ("info", "-o", str(facts)), ("info", "-o", str(folder)), ("info", "--memory", "0"), ("nothing",),
        ("history", "nothing"), ("trace", "--nothing"),
        ("edit", "inspect", str(edit), "--model", str(folder / "none")),
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
