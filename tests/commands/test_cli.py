"""The command line: what it accepts, what it writes, and how it fails."""

import json
import resource
import shlex
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kedit_fast as kf
from kedit_fast.basics import progress
from kedit_fast.commands import cli, info
from kedit_fast.commands import edit as edit_command
from kedit_fast.commands.arguments import BENCHMARKS
from kedit_fast.commands.inputs import fact_file, find_moments, read_edits
from kedit_fast.commands.outputs import fresh_log
from kedit_fast.editors import EDITORS
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.evaluation import EvalReport
from kedit_fast.moments.second_moment import FORMAT, SecondMoment
from kedit_fast.tracing.trace import KINDS, METRICS, read_log
from tests.make import make_edit
from tests.tiny import D_FF, TEXT, tiny_model, tiny_tokenizer

COMMANDS = tuple(name for name in cli.HANDLERS if " " not in name)  # the others: test_cli_edits.py
FACTS = (
    {"prompt": "{} is located in the city of", "subject": "Big Ben", "target_new": "Seattle", "target_true": "London"},
    {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome", "target_true": "Paris"},
)
ONE = ["--prompt", "The capital of {} is", "--subject", "France"]
FAST = {"v_num_grad_steps": 3, "context_template_length_params": [[4, 2]], "mom2_update_weight": 80.0}


def save_tiny(folder, family="llama"):
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to run in, with a fact file and the cache beside it."""
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    (tmp_path / "memit.json").write_text(json.dumps(FAST | {"layers": [1, 2]}))
    return folder


def run(*args):
    return cli.main([str(arg) for arg in args])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- help


def test_help_imports_no_torch_and_is_quick():
    script = (
        "import sys, kedit_fast.commands.cli as cli\n"
        "for name in (None, *cli.HANDLERS):\n"
        "    try: cli.main([*(name or '').split(), '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # the least of CPU times, which a busy machine stretches less than the clock
    assert min(took) < 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    example = shown[shown.index("example:") :].split("\n")[1].strip()
    assert end.value.code == 0 and example.startswith(f"kedit-fast {command}")
    runs_a_model = () if command == "merge" else ("--memory", "--device", "--dtype", "--threads")
    for option in ("--model", "--debug", *runs_a_model):
        assert option in shown
    assert ("--output" in shown) == (command != "generate")  # it writes to the screen alone
    assert ("--seed" in shown) == (command not in ("info", "merge", "generate"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_example_is_accepted(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    line = shown[shown.index("example:") :].split("\n")[1]
    assert cli.build_parser().parse_args(shlex.split(line)[1:]).command == command


@pytest.mark.parametrize("command", ["trace", "edit", "rounds", "layers", "eval", "gate"])
def test_bad_records_can_be_passed_over_wherever_facts_are_read(command, tmp_path):
    good = {"prompt": "Paris is in", "subject": "Paris", "target_new": "Italy"}
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([good | {"subject": "Rome"}, good]))
    option = "--suite" if command == "gate" else "--facts"
    line = [command, *["e.safetensors"] * (command == "gate"), option, str(path)]
    strict, lenient = (cli.build_parser().parse_args(line + more) for more in ([], ["--skip-bad"]))
    assert lenient.skip_bad and not strict.skip_bad
    if command != "gate":
        with pytest.raises(ValueError, match="'Rome' not in prompt"):
            fact_file(strict)
        with pytest.warns(UserWarning, match="passed over, 1 record: "):
            assert [fact.subject for fact in fact_file(lenient)] == ["Paris"]


def test_the_parser_knows_what_the_package_knows():
    assert cli.build_parser().parse_args(["trace"]).kinds == KINDS
    for metric in METRICS:
        assert cli.build_parser().parse_args(["trace", "--metric", metric]).metric == metric
    assert tuple(kf.BENCHMARKS) == BENCHMARKS
    for method in EDITORS:
        assert cli.build_parser().parse_args(["edit", "--method", method]).method == method


@pytest.mark.parametrize(
    "text, layers", [("3-7", (3, 4, 5, 6, 7)), ("5", (5,)), ("3, 5", (3, 5)), ("0-2,8,1", (0, 1, 2, 8))]
)
def test_layers(text, layers):
    assert cli.build_parser().parse_args(["stats", "--layers", text]).layers == layers


@pytest.mark.parametrize(
    "args, says",
    [
        (["stats", "--layers", "7-3"], "expected layers such as"),
        (["stats", "--layers", "x"], "expected layers such as"),
        (["stats", "--layers=-3"], "expected layers such as"),
        (["trace", "--kinds", "state,foo"], "'state,foo': expected some of"),
        (["trace", "--samples", "0"], "at least 1"),
        (["trace", "--plots", "-1"], "at least 0"),
        (["edit", "--method", "mend"], "invalid choice"),
        (["forget"], "invalid choice"),
    ],
)
def test_wrong_arguments(args, says, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2 and says in capsys.readouterr().err


# ---- errors


def handler(monkeypatch, act):
    module = SimpleNamespace(run=act)
    monkeypatch.setattr(cli, "import_module", lambda name: module)


def raising(error):
    def act(args):
        raise error

    return act


class OutOfMemoryError(RuntimeError):
    """Named as torch's for CUDA, which a test without a GPU cannot raise."""


@pytest.mark.parametrize("kind", [ValueError, OSError, ImportError, FileNotFoundError, MemoryError, OutOfMemoryError])
def test_an_error_is_a_line(kind, monkeypatch, capsys):
    handler(monkeypatch, raising(kind("v")))
    assert run("info") == 2
    assert capsys.readouterr() == ("", "kedit-fast: error: v\n")
    with pytest.raises(kind):
        run("info", "--debug")


def test_too_little_memory_on_the_cpu_is_a_line(monkeypatch, capsys):
    handler(monkeypatch, lambda args: torch.empty(1 << 60))
    assert run("info") == 2 and "can't allocate memory" in capsys.readouterr().err


def test_an_error_without_words_is_named(monkeypatch, capsys):
    handler(monkeypatch, raising(MemoryError()))
    assert run("info") == 2 and capsys.readouterr().err == "kedit-fast: error: MemoryError\n"


@pytest.mark.parametrize("kind", [AssertionError, TypeError, RuntimeError, KeyError, AttributeError, IndexError])
def test_a_fault_of_the_package_keeps_its_traceback(kind, monkeypatch, capsys):
    handler(monkeypatch, raising(kind("ours")))
    with pytest.raises(kind):
        run("info")
    assert capsys.readouterr().err == ""


def test_interrupt(monkeypatch, capsys):
    handler(monkeypatch, raising(KeyboardInterrupt()))
    assert run("info") == 130 and capsys.readouterr().err == "kedit-fast: interrupted\n"


def test_a_closed_pipe_is_quiet():
    script = "import sys; from kedit_fast.commands.cli import main; sys.exit(main(['info']))"
    command = f"{sys.executable} -c {script!r} | head -c 1"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 141)


def test_warnings_are_lines(monkeypatch, capsys):
    def act(args):
        warnings.warn("mind this", stacklevel=1)
        warnings.warn("not for users", DeprecationWarning, stacklevel=1)

    handler(monkeypatch, act)
    shown = warnings.showwarning
    assert run("info") == 0 and capsys.readouterr().err == "kedit-fast: warning: mind this\n"
    assert warnings.showwarning is shown


def test_progress_is_on_unless_quiet(monkeypatch):
    seen = []
    handler(monkeypatch, lambda args: seen.append(progress._shown.get()))
    run("info"), run("info", "--quiet")
    assert seen == [True, False] and progress._shown.get() is False


@pytest.mark.parametrize(
    "args, says",
    [
        (["trace", "--facts", "bad.jsonl"], "line 2"),
        (["trace", "--facts", "none.json"], "none.json"),
        (["trace"], "which facts?"),
        (["trace", "--prompt", "{} is in"], "which facts?"),
        (["trace", *ONE, "--facts", "../facts.json"], "both given"),
        (["trace", "--prompt", "Paris is in", "--subject", "Rome"], "subject 'Rome' not in prompt"),
        (["trace", *ONE, "--sever", "mlp"], "sever"),
        (["trace", *ONE, "--noise", "x3"], "--noise: 'x3'"),
        (["trace", *ONE, "--noise", "nan"], "--noise: 'nan'"),
        (["trace", *ONE, "--noise", "snan"], "--noise: 'snan'"),
        (["trace", *ONE, "--corrupt", "Danielle Darrieux"], "give a subject of 2 tokens"),
        (["trace", *ONE, "-o", "taken"], "taken/traces.jsonl is there already"),
        (["trace", *ONE, "-o", "bad.jsonl"], "is no folder"),
        (["trace", *ONE, "--device", "cuda:99"], "--device 'cuda:99': expected a device of this machine"),
        (["trace", *ONE, "--device", "abacus"], "--device 'abacus': expected a device of this machine"),
        (["trace", *ONE, "--dtype", "float7"], "float7"),
        (["trace", *ONE, "--memory", "much"], "much"),
        (["stats", "--layers", "9"], "--layers 9: this model has layers 0 to"),
        (["stats", "--corpus", "none.txt"], "none.txt"),
        (["stats", "-o", "bad.jsonl"], "bad.jsonl is no folder"),
        (["stats", "-o", "bad.jsonl/deeper"], "bad.jsonl is no folder"),
        (["edit", *ONE], "which facts?"),
        (["edit", *ONE, "--target", " "], "--target: is empty"),
        (["edit", *ONE, "--target", "Rome", "--layers", "9"], "--layers 9: this model has layers 0 to"),
        (["edit", *ONE, "--target", "Rome", "--tokens", "20"], f"20: fewer than d_ff = {D_FF}"),
        (["edit", *ONE, "--target", "Rome", "--corpus", "none.txt"], "none.txt"),
        (["edit", *ONE, "--target", "Rome", "--stats", "taken", "--corpus", "self"], "--stats and --corpus are both"),
        (["edit", *ONE, "--target", "Rome", "--stats", "taken", "--tokens", "99"], "--stats and --tokens are both"),
        (["edit", *ONE, "--target", "Rome", "--hparams", "bad.jsonl"], "bad.jsonl is not JSON"),
        (["edit", *ONE, "--target", "Rome", "--stats", "none"], "no such folder"),
        (["edit", *ONE, "--target", "Rome", "--stats", "taken"], "has no statistics"),
        (["edit", *ONE, "--target", "Rome", "-o", "taken"], "is a folder"),
        (["edit", *ONE, "--target", "Rome", "-o", "bad.jsonl"], "--force replaces it"),
        (["edit", "--facts", "clash.json"], "France"),
        (["edit", "--facts", "known.json"], "target_new"),
        (["eval"], "evaluate what?"),
        (["eval", "--facts", "../facts.json", "--benchmark", "counterfacts"], "did you mean counterfact?"),
        (["eval", "cut.safetensors"], "cut.safetensors is cut short"),
        (["eval", "bad.jsonl"], "bad.jsonl"),
        (["eval", "clash.json"], "clash.json: an edit is a safetensors file"),
        (["eval", "none.safetensors"], "none.safetensors"),
        (["eval", "--facts", "../facts.json", "--text", "none.txt"], "none.txt"),
        (["eval", "--facts", "../facts.json", "-o", "bad.jsonl"], "--force replaces it"),
    ],
)
def test_bad_input_is_a_line_and_writes_nothing(args, says, model, work, capsys):
    (work / "bad.jsonl").write_text(json.dumps(FACTS[0]) + "\n{broken\n")
    (work / "clash.json").write_text(json.dumps([FACTS[1], FACTS[1] | {"target_new": "Madrid"}]))
    (work / "known.json").write_text(json.dumps([{k: v for k, v in FACTS[1].items() if k != "target_new"}]))
    (work / "taken").mkdir()
    (work / "taken" / "traces.jsonl").write_text("kept")
    whole = work / "whole.safetensors"
    Edit("memit", {}, "", (kf.Fact("{} is", "It"),), {}).save(whole)
    (work / "cut.safetensors").write_bytes(whole.read_bytes()[:-9])
    before = files(work.parent)  # the cache too
    try:
        status = run(*args, "--model", model)
    except SystemExit as ended:  # of an option that says something else
        status = ended.code
    err = capsys.readouterr().err
    assert status == 2 and " error: " in err and says in err and "Traceback" not in err
    assert files(work.parent) == before and (work / "taken" / "traces.jsonl").read_text() == "kept"


def test_bad_models(model, work, capsys):
    strange = work / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert run("trace", *ONE, "--model", strange) == 2
    assert "unknown model family 'bert'" in capsys.readouterr().err

    broken = save_tiny(work / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert run("trace", *ONE, "--model", broken) == 2
    assert "NaN" in capsys.readouterr().err

    assert run("trace", *ONE, "--model", "./none") == 2
    assert "model './none': no such folder" in capsys.readouterr().err
    assert files(work) == sorted(f for f in files(work) if f.startswith(("strange", "broken")))


def test_statistics_and_edits_of_another_model_are_refused(model, work, capsys):
    other = save_tiny(work / "other", "qwen2")
    assert run("stats", "--layers", "1,2", "--model", other, "-o", "stats") == 0
    assert run("edit", *ONE, "--target", "Rome", "--stats", "stats", "--layers", "1,2", "--model", model) == 2
    assert "it holds statistics of qwen2-" in capsys.readouterr().err
    made = ["edit", *ONE, "--target", "Rome", "--hparams", "../memit.json", "--stats", "stats", "--model", other]
    assert run(*made) == 0
    assert run("eval", "edit.safetensors", "--model", model) == 2
    assert "this edit was made on qwen2-" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, says",
    [
        (["eval", "-o", "new", "--html", "new"], "--output and --html both name new"),
        (["eval", "-o", "new", "--log", "../work/new"], "--output and --log both name ../work/new"),
        (["eval", "--html", "new", "--log", "linked/new"], "--html and --log both name"),
        (["eval", "--html", "edit.safetensors"], "--html edit.safetensors would replace an edit that is read"),
        (["eval", "-o", "linked/edit.safetensors"], "would replace an edit that is read"),
        (["eval", "-o", "hard"], "would replace an edit that is read"),
        (["eval", "--log", "facts.json"], "would replace what --facts reads"),
        (["eval", "--html", "text.txt"], "would replace what --text reads"),
        (["eval", "-o", "model/config.json"], "would replace what --model reads"),
        (["edit", "-o", "facts.json"], "would replace what --facts reads"),
        (["edit", "-o", "hparams.json"], "would replace what --hparams reads"),
        (["edit", "-o", "text.txt", "--corpus", "text.txt"], "would replace what --corpus reads"),
        (["edit", "-o", "stats/one.safetensors", "--stats", "stats"], "would replace what --stats reads"),
        (["edit", "-o", "model/config.json"], "would replace what --model reads"),
        (["trace", "-o", "traced"], "is the log that these traces would replace"),
    ],
)
def test_outputs_spare_each_other_and_what_is_read(args, says, work, capsys):
    for name in ("edit.safetensors", "facts.json", "text.txt", "hparams.json"):
        (work / name).write_text(name)
    for name in ("stats/one.safetensors", "model/config.json", "traced/traces.jsonl"):
        (work / name).parent.mkdir()
        (work / name).write_text(name)
    (work / "linked").symlink_to(work)
    (work / "hard").hardlink_to(work / "edit.safetensors")
    (work / "facts.json").write_text(json.dumps(FACTS))
    (work / "traced" / "traces.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    command, *rest = args
    given = {
        "eval": ["edit.safetensors", "--facts", "facts.json", "--text", "text.txt"],
        "edit": ["--facts", "facts.json"] + ["--hparams", "hparams.json"] * (rest[1] == "hparams.json"),
        "trace": ["--facts", "traced/traces.jsonl"],
    }[command]
    before = {name: (work / name).read_bytes() for name in files(work) if (work / name).is_file()}
    assert run(command, *rest, *given, "--force", "--model", "model") == 2
    assert says in capsys.readouterr().err
    assert before == {name: (work / name).read_bytes() for name in files(work) if (work / name).is_file()}


# ---- trace


def test_trace_a_file(model, work, capsys):
    args = ["trace", "--facts", "../facts.json", "--model", model, "--samples", "2", "--window", "2", "-o", "out"]
    assert run(*args) == 0
    shown = capsys.readouterr().out
    logged = read_log(work / "out" / "traces.jsonl")
    assert [(r.fact.subject, r.kind) for r in logged] == [(f["subject"], kind) for f in FACTS for kind in KINDS]
    lm = kf.open_model(model)
    expected = kf.trace(lm, kf.load_facts(work.parent / "facts.json"), samples=2, window=2)
    for got, want in zip(logged, expected, strict=True):
        assert (got.p_restored == want.p_restored).all() and got.window == want.window
    pictures = {f"average-{kind}.{suffix}" for kind in KINDS for suffix in ("png", "npz")}
    assert set(files(work / "out")) == pictures | {"fact-0.png", "fact-1.png", "traces.jsonl"}
    assert "mlp: layers 0-3 carry most" in shown and "does not by itself predict" in shown and "2 facts" in shown
    assert (kf.AverageTrace.load(work / "out" / "average-mlp.npz")).n_facts == 2

    assert run(*args) == 2  # what is there stays
    assert run(*args, "--force", "-n", "1", "--kinds", "mlp", "--plots", "0") == 0
    assert len(read_log(work / "out" / "traces.jsonl")) == 1


def test_trace_one_fact_is_drawn_in_the_terminal(model, work, capsys):
    # a prompt with the subject in it does as well as one with {}
    assert run("trace", "--prompt", "The capital of France is", "--subject", "France", "--model", model) == 0
    shown = capsys.readouterr().out
    assert "Impact of restoring state" in shown and "Impact of restoring MLP" in shown and "ance*" in shown
    assert (work / "kedit-fast-out" / "trace" / "fact-0.png").read_bytes()[:4] == b"\x89PNG"


def test_trace_options_arrive(model, work):
    args = ["--kinds", "state", "--sever", "attn", "--metric", "logprob", "--noise", "u0.5", "--answer", "Rome"]
    assert run("trace", *ONE, *args, "--seed", "5", "--samples", "3", "--model", model, "-o", "a") == 0
    lm = kf.open_model(model)
    fact = kf.Fact("The capital of {} is", "France")
    want = kf.trace(
        lm, fact, kinds=("state",), sever="attn", metric="logprob", noise="u0.5", answer="Rome", seed=5, samples=3
    )
    got = read_log(work / "a" / "traces.jsonl")
    assert (got[0].p_restored == want[0].p_restored).all() and got[0].answer == want[0].answer
    assert run("trace", *ONE, "--method", "screen", "--top", "3", "--model", model, "-o", "c") == 0
    screened = read_log(work / "c" / "traces.jsonl")
    assert screened[0].exact[:, :-1].sum() == screened[1].exact.sum() == 3
    assert run("trace", *ONE, "--corrupt", "England", "--model", model, "-o", "b") == 0
    assert read_log(work / "b" / "traces.jsonl")[0].noise is None


def test_a_log_that_gets_no_line_gives_the_older_one_back(tmp_path):
    log = tmp_path / "a" / "log.jsonl"
    with fresh_log(log):
        assert files(tmp_path / "a") == []
        log.write_text("first")
    with pytest.raises(RuntimeError), fresh_log(log):
        raise RuntimeError
    assert log.read_text() == "first"
    with pytest.raises(RuntimeError), fresh_log(log):
        log.write_text("begun")
        raise RuntimeError
    assert log.read_text() == "begun" and files(tmp_path / "a") == ["log.jsonl"]


# ---- stats, edit, eval


def test_from_statistics_to_a_report(model, work, capsys):
    assert run("stats", "--layers", "1-2", "--tokens", "600", "--model", model, "-o", "stats") == 0
    shown = capsys.readouterr().out
    assert "600" in shown and "condition number" in shown and len(files(work / "stats")) == 2

    hparams = work.parent / "memit.json"
    args = ["edit", "--facts", "../facts.json", "--hparams", hparams, "--stats", "stats", "--model", model]
    assert run(*args, "-o", "deep/edit.safetensors") == 0
    shown = capsys.readouterr().out
    assert f"read from {hparams}" in shown and "g / d_ff" in shown and "P(new) at the value" in shown
    lm = kf.open_model(model)
    edit = Edit.load(work / "deep" / "edit.safetensors")
    facts = kf.load_facts(work.parent / "facts.json")
    moments = {layer: SecondMoment.load(p) for layer, p in enumerate(sorted((work / "stats").iterdir()), 1)}
    want = kf.Memit.from_json(hparams).edit(lm, facts, moments=moments)
    for layer in (1, 2):
        assert torch.equal(edit.deltas[layer].dense(), want.deltas[layer].dense())
    assert run(*args, "-o", "deep/edit.safetensors") == 2  # not replaced
    assert run(*args, "-o", "deep/edit.safetensors", "--force") == 0
    capsys.readouterr()

    (work / "text.txt").write_text(TEXT)
    files_ = ["-o", "report.json", "--html", "report.html", "--log", "log.jsonl"]
    args = ["deep/edit.safetensors", "--text", "text.txt", "--generate", "3", "--model", model, *files_]
    assert run("eval", *args) == 0
    shown = capsys.readouterr().out
    assert "efficacy" in shown and "perplexity" in shown and "before:" in shown and "after:" in shown
    report = EvalReport.load(work / "report.json")
    expected = kf.evaluate(lm, facts, edit)
    assert torch.equal(report.edited["p_new"], expected.edited["p_new"]) and report.perplexity is not None
    assert "<table" in (work / "report.html").read_text()
    assert [json.loads(line)["edited"]["p_new"] for line in (work / "log.jsonl").read_text().splitlines()]

    assert run("eval", "--facts", "../facts.json", "-n", "1", "--model", model) == 0  # the model as it is
    assert "no edit" in capsys.readouterr().out
    some = ["deep/edit.safetensors", "-n", "1", "-o", "some.json"]
    assert run("eval", *some, "--model", model) == 0
    assert EvalReport.load(work / "some.json").facts == tuple(facts[:1])


def test_the_seed_and_the_corpus_of_statistics_arrive(model, work):
    (work / "text.txt").write_text(TEXT)
    layer = ["--layers", "1", "--tokens", "90", "--model", model, "-o", "stats"]
    assert run("stats", *layer, "--seed", "5") == run("stats", *layer, "--corpus", "text.txt") == 0
    corpora = {SecondMoment.load(path).corpus for path in (work / "stats").iterdir()}
    assert "self-seed5" in corpora and any(corpus.startswith("text.txt-") for corpus in corpora) and len(corpora) == 2


def test_the_seed_and_the_corpus_of_an_edit_arrive(model, work):
    (work / "text.txt").write_text(TEXT)
    args = ["edit", *ONE, "--target", "Rome", "--hparams", "../memit.json", "--tokens", "90", "--model", model]
    kept = work.parent / "cache" / "statistics"
    assert run(*args, "--seed", "5", "-o", "a.safetensors") == 0
    assert {SecondMoment.load(path).corpus for path in kept.iterdir()} == {"self-seed5"}
    lm = kf.open_model(model)
    moments = {i: SecondMoment(torch.eye(D_FF), 90, i, lm.fingerprint) for i in (1, 2)}
    editor, fact = kf.Memit.from_json(work.parent / "memit.json"), kf.Fact("The capital of {} is", "France", "Rome")
    contexts = [editor.edit(lm, [fact], moments=moments, seed=seed).contexts for seed in (5, 0)]
    assert Edit.load("a.safetensors").contexts == contexts[0] != contexts[1]

    for path in kept.iterdir():
        path.unlink()
    assert run(*args, "--corpus", "text.txt", "-o", "b.safetensors") == 0
    assert [SecondMoment.load(path).corpus.split("-")[0] for path in kept.iterdir()] == ["text.txt"] * 2


def test_statistics_without_layers_are_of_both_editors(model, work, capsys, monkeypatch):
    for editor, layers in ((kf.Rome, (3,)), (kf.Memit, (0, 2)), (kf.AlphaEdit, (2,))):
        monkeypatch.setattr(editor, "for_model", classmethod(lambda cls, lm, layers=layers: cls(layers=layers)))
    assert run("stats", "--tokens", "20", "--model", model, "-o", "stats") == 0
    assert sorted(SecondMoment.load(path).layer for path in (work / "stats").iterdir()) == [0, 2, 3]
    assert f"20 tokens are fewer than d_ff = {D_FF}" in capsys.readouterr().out
    assert run("stats", "--tokens", str(D_FF), "--layers", "1", "--model", model, "-o", "enough") == 0
    assert "fewer than" not in capsys.readouterr().out


def test_an_edit_that_needs_no_statistics_measures_none(model, work, capsys):
    hparams = work.parent / "rome.json"
    fields = {k: v for k, v in FAST.items() if k != "mom2_update_weight"}
    hparams.write_text(json.dumps(fields | {"layers": [1], "mom2_adjustment": False}))
    args = ["edit", *ONE, "--target", "Rome", "--method", "rome", "--hparams", hparams, "--model", model]
    assert run(*args) == 0
    assert not (work.parent / "cache").exists() and "condition of C" not in capsys.readouterr().out


def test_the_table_of_an_edit_shows_steps_and_probability(capsys):
    fact = kf.Fact("The capital of {} is", "France", "Rome")
    provenance = {"layers": {}, "found": {"steps": [7], "loss": [1.5], "p_new": [0.25]}}
    asked = {"written": {"written": [False], "p_new": [0.125], "says": [" Paris"]}}
    edit_command.say_facts(Edit("memit", {}, "", (fact,), {}, provenance=provenance | asked))
    header, row, written = capsys.readouterr().out.splitlines()
    assert header.split() == ["fact", "new", "answer", "steps", "P(new)", "at", "the", "value", "P(new)", "it", "says"]
    assert row.split()[-6:] == ["Rome", "7", "0.250", "0.125", "'", "Paris'"]
    assert written.startswith("written: 0 of 1 facts")


def test_strict_refuses_what_is_not_written(model, work, capsys):
    """The file is there all the same: what to do about it is asked of a person."""
    hparams = work.parent / "ft.json"
    args = ["edit", *ONE, "--target", "Rome", "--method", "ft", "--hparams", hparams, "--model", model, "--force"]
    for steps, lr, written in ((1, 1e-6, False), (25, 1e-2, True)):
        hparams.write_text(json.dumps({"layers": [1], "num_steps": steps, "lr": lr}))
        assert run(*args) == 0
        assert run(*args, "--strict") == (0 if written else 1)
        out, err = capsys.readouterr()
        assert f"written: {int(written)} of 1 facts" in out
        assert ("warning: facts not written: 1 of 1: 'The capital of France is' -> 'Rome' (P 0.0" in err) != written
        assert Edit.load("edit.safetensors").provenance["written"]["written"] == [written]


def test_rome_with_statistics_from_the_cache(model, work, capsys, monkeypatch):
    hparams = work.parent / "rome.json"
    hparams.write_text(json.dumps({k: v for k, v in FAST.items() if k != "mom2_update_weight"} | {"layers": [1]}))
    args = ["edit", *ONE, "--target", "Rome", "--method", "rome", "--hparams", hparams, "--tokens", "200"]
    assert run(*args, "--model", model, "-o", "a.safetensors") == 0
    assert "ROME writes the value exactly" in capsys.readouterr().out
    assert len(files(work.parent / "cache" / "statistics")) == 1
    monkeypatch.setattr("kedit_fast.moments.corpus._sampled", raising(AssertionError("sampled again")))
    assert run(*args, "--model", model, "-o", "b.safetensors") == 0
    assert torch.equal(Edit.load("a.safetensors").deltas[1].dense(), Edit.load("b.safetensors").deltas[1].dense())
    assert run(*args, "--layers", "2", "--tokens", "20", "--model", model) == 2  # other statistics are asked for


def test_of_several_statistics_the_largest_is_taken(model, work):
    lm = kf.open_model(model)
    for n_tokens in (90, 300, 200):
        kf.second_moments(lm, [1], n_tokens=n_tokens, cache_dir=work)
    (work / "note.txt").write_text("not a statistics file")
    Edit("memit", {}, "", (kf.Fact("{} is", "It"),), {}).save(work / "edit.safetensors")
    assert find_moments(lm, work, [1])[1].n_tokens == 300
    with pytest.raises(ValueError, match=r"for layers 2\. `kedit-fast stats --layers 2"):
        find_moments(lm, work, [1, 2])


def test_published_statistics(model, work):
    lm = kf.open_model(model)
    total = np.eye(D_FF, dtype=np.float32)
    np.savez(work / "model.layers.2.mlp.down_proj_float32_mom2_100.npz", **{"mom2.mom2": total, "mom2.count": 4})
    found = find_moments(lm, work, [2])[2]
    assert found.layer == 2 and found.n_tokens == 4 and torch.equal(found.matrix, torch.eye(D_FF) / 4)


def test_a_damaged_statistics_file_is_named(model, work):
    lm, path = kf.open_model(model), work / "cut.safetensors"
    whole = {"layer": 1, "n_tokens": 5, "fingerprint": lm.fingerprint, "corpus": None, "dtype": None}
    headers = [
        {"format": FORMAT},
        {"format": FORMAT, "record": "{broken"},
        {"format": FORMAT, "record": "[1]"},
        *(
            {"format": FORMAT, "record": json.dumps(whole | changed)}
            for changed in ({"layer": None}, {"n_tokens": "x"})
        ),
        {"format": FORMAT, "record": json.dumps({k: v for k, v in whole.items() if k != "fingerprint"})},
    ]
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match=r"cut\.safetensors is damaged"):
        find_moments(lm, work, [1])
    for header in headers:
        save_file({"matrix": torch.eye(D_FF)}, path, header)
        with pytest.raises(ValueError, match=r"cut\.safetensors is damaged"):
            find_moments(lm, work, [1])


# ---- info


def test_info(model, work, capsys):
    assert run("info", "--model", model, "-o", "info.json") == 0
    shown = capsys.readouterr().out
    found = json.loads((work / "info.json").read_text())
    for name in ("python", "packages", "devices", "native extension", "triton", "threads", "instruction sets", "cache"):
        assert name in found and name in shown
    assert found["kedit-fast"] == kf.__version__ and torch.__version__ in found["packages"]
    assert found["model"]["fingerprint"] == kf.open_model(model).fingerprint
    assert not any(str(value).startswith("unknown") for value in found.values())


def test_info_says_which_build_of_torch_this_is(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu999")
    assert "torch 2.99.0+cu999, transformers" in info._packages()


def test_nothing_in_info_fails(work, capsys, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "abacus")
    monkeypatch.setattr(info, "LINES", (("torn", lambda: 1 / 0), *info.LINES))
    assert run("info", "--model", "./none") == 0
    shown = capsys.readouterr().out
    assert "KEDIT_FAST_BACKEND=abacus: expected one of" in shown and "unknown: ZeroDivisionError" in shown
    assert "no such folder" in shown and "python" in shown


def test_a_folder_of_versions_stands_for_its_edits(tmp_path):
    made = make_edit(tiny_model("gpt2"))
    made.save(tmp_path / "edit.safetensors")
    history = kf.EditHistory(tmp_path / "versions")
    history.add(made)
    for name in ("edit.safetensors", "versions"):
        assert [digest(edit) for edit in read_edits(tmp_path / name)] == [digest(made)]
    history.rollback(0)
    with pytest.raises(ValueError, match=r"no edits in force; `kedit-fast history log .*versions` shows"):
        read_edits(tmp_path / "versions")
