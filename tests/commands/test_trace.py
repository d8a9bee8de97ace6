"""``kedit-fast trace``: what it says, draws and logs."""

import pytest

import kedit_fast as kf
from kedit_fast.basics.unfinished import MANIFEST, run_folder
from kedit_fast.commands.outputs import check_outputs
from kedit_fast.tracing import trace as tracing
from kedit_fast.tracing.trace import KINDS, read_log
from tests.commands.cases import FACTS, ONE, files, parsed, run


def test_trace_a_file(model, work, said):
    args = ["trace", "--facts", "../facts.json", "--model", model, "--samples", "2", "--window", "2", "-o", "out"]
    shown = said(*args)
    logged = read_log(work / "out" / "traces.jsonl")
    assert [(r.fact.subject, r.kind) for r in logged] == [(f["subject"], kind) for f in FACTS for kind in KINDS]
    lm = kf.open_model(model)
    expected = kf.trace(lm, kf.load_facts(work.parent / "facts.json"), samples=2, window=2)
    for got, want in zip(logged, expected, strict=True):
        assert (got.p_restored == want.p_restored).all() and got.window == want.window
    pictures = {f"average-{kind}.{suffix}" for kind in KINDS for suffix in ("png", "npz")}
    assert set(files(work / "out")) == pictures | {"fact-0.png", "fact-1.png", "traces.jsonl"}
    assert (
        "mlp: " in shown
        and "at the last subject token" in shown
        and "does not by itself predict" in shown
        and "2 facts" in shown
    )
    assert (kf.AverageTrace.load(work / "out" / "average-mlp.npz")).n_facts == 2

    assert run(*args) == 2  # what is there stays
    assert run(*args, "--force", "-n", "1", "--kinds", "mlp", "--plots", "0") == 0
    assert len(read_log(work / "out" / "traces.jsonl")) == 1


def test_trace_one_fact_is_drawn_in_the_terminal(model, work, said):
    # a prompt with the subject in it does as well as one with {}
    shown = said("trace", "--prompt", "The capital of France is", "--subject", "France", "--model", model)
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
    assert run("trace", *ONE, "--method", "strided", "--stride", "2", "--model", model, "-o", "d") == 0
    strided = read_log(work / "d" / "traces.jsonl")
    for got, want in zip(strided, kf.trace(lm, fact, method="strided", stride=2), strict=True):
        assert (got.p_restored == want.p_restored).all() and (got.stride, got.reliability) == (2, want.reliability)
    assert run("trace", *ONE, "--corrupt", "England", "--model", model, "-o", "b") == 0
    assert read_log(work / "b" / "traces.jsonl")[0].noise is None


def test_a_second_trace_is_refused_and_leaves_the_first_one_s_log(model, work, capsys, monkeypatch):
    """While the first is at its second fact."""
    args = ["trace", "--facts", "../facts.json", "--model", model, "--samples", "1", "--kinds", "state", "--plots", "0"]
    monkeypatch.setattr(tracing, "TOGETHER", 0)
    assert run(*args, "-o", "alone") == 0
    trace_group, said = tracing._trace_group, []

    def meanwhile(*each):
        if (work / "out" / "traces.jsonl").exists():
            said.append((run(*args, "-o", "out", "--force"), capsys.readouterr().err))
        return trace_group(*each)

    monkeypatch.setattr(tracing, "_trace_group", meanwhile)
    assert run(*args, "-o", "out") == 0
    ((status, shown),) = said
    assert status == 2 and "traces.jsonl.run: another run works there; wait for it" in shown
    assert (work / "out" / "traces.jsonl").read_bytes() == (work / "alone" / "traces.jsonl").read_bytes()
    assert files(work / "out") == files(work / "alone")


def test_a_trace_says_how_reliable_it_is_and_what_it_cost(model, work, said):
    args = ["trace", *ONE, "--kinds", "state", "--model", model]
    shown = said(*args, "-o", "a")
    (result,) = read_log(work / "a" / "traces.jsonl")
    assert f"1 fact, reliability {result.reliability:.2f}" in shown and "strided" not in shown
    shown = said(*args, "--method", "strided", "--stride", "2", "-o", "b")
    (result,) = read_log(work / "b" / "traces.jsonl")
    assert f"each noise draw at one layer in 2, {result.cost:.0%} of an exact trace's rows x layers" in shown
    assert "interpolated between" in shown.replace("\n", " ")
    assert "reliability" not in said(*args, "--samples", "1", "-o", "c")


def test_a_stride_that_is_too_long_is_refused(model, work, capsys):
    assert run("trace", *ONE, "--method", "strided", "--stride", "99", "--model", model, "-o", "a") == 2
    assert "--stride 99: expected a whole number from 1 to" in capsys.readouterr().err


def test_a_page_of_traces_is_written_where_it_is_asked_for(model, work, said, complaint):
    args = ["trace", "--facts", "../facts.json", "--model", model, "--samples", "2", "--kinds", "state", "--plots", "1"]
    shown = said(*args, "-o", "out", "--html", "page.html")
    text = (work / "page.html").read_text(encoding="utf-8")
    assert "written: page.html" in shown and "1 of 2 facts are drawn" in text and "Big Ben" in text
    results = read_log(work / "out" / "traces.jsonl")
    assert text == kf.trace_page(results, most=1, model=kf.open_model(model).name)
    assert "page.html is there already" in complaint(*args, "-o", "b", "--html", "page.html")
    assert "would replace what --facts reads" in complaint(*args, "-o", "b", "--html", "../facts.json", "--force")
    assert "writes anyway; name another file" in complaint(*args, "-o", "b", "--html", "b/traces.jsonl")
    assert not (work / "b").exists()


def test_a_run_that_goes_on_may_replace_the_page_that_it_wrote(work):
    args = parsed("trace", *ONE, "-o", "out", "--html", "page.html")
    (work / "page.html").write_text("of the run that was killed")
    log = work / "out" / "traces.jsonl"
    with pytest.raises(ValueError, match="there already"):
        check_outputs(args, "html", beside=[log])
    run_folder(log).mkdir(parents=True)
    (run_folder(log) / MANIFEST).write_text("{}")
    assert [path.name for path in check_outputs(args, "html", beside=[log])] == ["page.html"]
