"""``kedit-fast rounds`` and ``kedit-fast layers``: what they say, what they write, and how they fail."""

import json

import pytest

import kedit_fast as kf
from kedit_fast.commands import rounds as rounds_command
from kedit_fast.evaluation.canary import PROSE
from kedit_fast.experiments.by_layer import LayerStudy
from kedit_fast.experiments.rounds import Round
from tests.commands.cases import FACTS, run
from tests.tiny import TEXT

FACTS = [
    fact | {"paraphrase_prompts": [f"It is so: {fact['prompt'].format(fact['subject'])}"], "neighborhood": []}
    for fact in FACTS
]


@pytest.fixture
def work(work, tmp_path):
    """With facts of more fields, a text and what a run before left."""
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "there.txt").write_text("of a run before")
    return work


# The statistics need more tokens than d_ff = 80.
ROUNDS = ("rounds", "--facts", "../facts.json", "--per-round", 1, "--hparams", "../memit.json", "--tokens", 120,
          "--text", "../text.txt", "--text-tokens", 60, "--quiet")  # fmt: skip
LAYERS = ("layers", "--facts", "../facts.json", "--hparams", "../rome.json", "--tokens", 120, "--samples", 2, "--quiet")


def test_rounds(model, work, said):
    outputs = ("-o", "out/rounds.json", "--log", "out/log.jsonl", "--plot", "out/rounds.png")
    shown = said(*ROUNDS, "--model", model, *outputs)
    unedited, *table = [line.split() for line in shown.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])]
    assert [row[:2] for row in table] == [["1", "1"], ["2", "2"]] and table[0][4] == "-" and table[1][4] != "-"
    assert "memit, layers 1, 2" in shown and "earlier rounds'" in shown
    record = json.loads((work / "out/rounds.json").read_text())
    assert record["format"] == "kedit_fast.rounds" and record["stopped"] == {}
    assert record["meta"]["per_round"] == 1 and record["meta"]["hparams"]["memit"]["layers"] == [1, 2]
    found = [Round.from_record(one) for one in record["rounds"]["memit"]]
    assert [r.n_facts for r in found] == [1, 2]
    assert f"{found[1].perplexity[1]:.4g}" in table[1]
    base = found[0].base
    means = [base[name].mean for name in ("efficacy", "p_new", "paraphrase", "neighborhood")]
    figures = ["-" if mean != mean else f"{mean:.3f}" for mean in means]
    assert unedited[2:] == [*figures[:2], "-", "-", *figures[2:], f"{found[0].perplexity[0]:.4g}", "0.000", "-"]
    lines = (work / "out/log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == record["rounds"]["memit"]
    assert (work / "out/rounds.png").read_bytes().startswith(b"\x89PNG")


def test_a_network_is_for_trained_methods(model, work, capsys):
    few = ("rounds", "--facts", "../facts.json", "--model", model)
    assert run(*few, "--method", "mend,memit", "--network", "net.safetensors") == 2
    assert "--network: memit edits without one; it is for mend, malmen, ke" in capsys.readouterr().err
    assert run(*few, "--method", "mend", "--network", "net.safetensors") == 2
    assert "net.safetensors: no such file; expected a network" in capsys.readouterr().err


def test_several_methods_share_statistics_and_a_picture(model, work, said, monkeypatch):
    def short(name):
        null_space = {"nullspace_threshold": 0.0} if name == "alphaedit" else {}
        made = kf.EDITORS[name](layers=(1,), v_num_grad_steps=2, context_template_length_params=((4, 2),), **null_space)
        return lambda lm: made

    for name in ("rome", "alphaedit"):
        monkeypatch.setattr(kf.EDITORS[name], "for_model", short(name))
    asked = ("rounds", "--facts", "../facts.json", "--per-round", 2, "--tokens", 120, "--text-tokens", 60, "--quiet")
    shown = said(*asked, "--method", "rome,alphaedit", "--model", model, "-o", "r.json", "--plot", "r.png")
    assert shown.index("rome, layers 1") < shown.index("alphaedit, layers 1")
    record = json.loads((work / "r.json").read_text())
    assert list(record["rounds"]) == ["rome", "alphaedit"] and record["meta"]["text"] == "built in"
    assert record["rounds"]["rome"][0]["perplexity"][0] == record["rounds"]["alphaedit"][0]["perplexity"][0]
    assert PROSE.exists()


def test_a_method_that_breaks_down_keeps_what_it_found(model, work, said, complaint, monkeypatch):
    real = rounds_command.edit_in_rounds

    def breaking(*args, **options):
        made = real(*args, **options)
        yield next(made)
        raise ValueError("the loss of fact 3 is NaN")

    monkeypatch.setattr(rounds_command, "edit_in_rounds", breaking)
    shown = said(*ROUNDS, "--model", model, "-o", "r.json", "--plot", "r.png")
    assert "memit ends here: the loss of fact 3 is NaN" in shown
    record = json.loads((work / "r.json").read_text())
    assert len(record["rounds"]["memit"]) == 1 and record["stopped"] == {"memit": "the loss of fact 3 is NaN"}

    def broken(*args, **options):
        raise ValueError("nothing at all")
        yield

    monkeypatch.setattr(rounds_command, "edit_in_rounds", broken)
    assert "nothing at all" in complaint(*ROUNDS, "--model", model, "-o", "r2.json", "--plot", "r2.png")
    assert not (work / "r2.json").exists() and not (work / "r2.png").exists()


def test_layers(model, work, said):
    outputs = ("-o", "out/layers.json", "--log", "out/log.jsonl", "--plot", "out/layers.png")
    shown = said(*LAYERS, "--model", model, "--layers", "0-3:2", *outputs)
    found = LayerStudy.load(work / "out/layers.json")
    assert found.layers == (0, 2) and found.n_facts == 2 and list(found.traces) == ["state", "mlp"]
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line[:1].isdigit()}
    assert list(rows) == ["0", "2"] and rows["2"][2] == f"{found.edited[2]['p_new'].mean:.3f}"
    assert rows["0"][5] == f"{found.effect('state')[0]:.3f}"
    assert "rank correlation with the trace over 2 layers (too few to tell), efficacy: state" in shown
    assert "Hase et al. 2023" in shown
    assert len((work / "out/log.jsonl").read_text().splitlines()) == 2
    assert (work / "out/layers.png").read_bytes().startswith(b"\x89PNG")


def test_layers_beside_traces_that_are_there(model, work, complaint):
    one = ("--facts", "../facts.json", "--model", model, "--samples", 2, "--quiet")
    assert run("trace", *one, "-n", 1, "--kinds", "mlp", "-o", "traces") == 0
    given = ("--layers", "1", "--traces", "traces/traces.jsonl", "-o", "layers.json")
    says = complaint(*LAYERS, "--model", model, *given)
    assert "lacks 1 of 2 facts, for instance 'The capital of France is'" in says
    assert run(*LAYERS, "--model", model, *given, "-n", 1) == 0
    assert list(LayerStudy.load(work / "layers.json").traces) == ["mlp"]


@pytest.mark.parametrize(
    "args, says",
    [
        (("rounds",), "which facts?"),
        ((*ROUNDS, "--method", "memit,nobody"), "--method 'nobody': expected one of rome, memit"),
        ((*ROUNDS, "--method", "rome,memit"), "with 2 methods: expected one --method"),
        ((*ROUNDS, "--plot", "r.pdf"), "pictures are written as .png"),
        ((*ROUNDS, "--plot", "r.png", "-o", "r.png"), "both name r.png"),
        ((*ROUNDS, "-o", "../text.txt", "--force"), "would replace what --text reads"),
        ((*ROUNDS, "--log", "../there.txt"), "is there already"),
        ((*ROUNDS, "--stats", "s"), "--stats and --tokens are both given"),
        ((*ROUNDS[:7], "--tokens", 20), "fewer than d_ff = 80"),
        ((*ROUNDS[:-2], 1), "argument --text-tokens: 1: expected a whole number of at least 2, e.g. 5120"),
        ((*LAYERS, "--method", "nobody"), "--method 'nobody'"),
        ((*LAYERS, "--layers", "0,9"), "--layers 0, 9: this model has layers 0 to 3"),
        ((*LAYERS, "--plot", "r.jpg"), "pictures are written as .png"),
        ((*LAYERS, "--traces", "../facts.json"), "is no trace"),
    ],
)
def test_errors_leave_nothing_behind(args, says, model, work, complaint):
    assert says in complaint(*args, "--model", model)
    assert not list(work.iterdir())
