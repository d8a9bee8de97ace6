"""The guard of the public doors: each argument and option is looked at before any work and refused in our words."""

import inspect
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kedit_fast as kf
from kedit_fast.model.source import Resident
from tests.hostile import options
from tests.hostile.__main__ import PARTS, run
from tests.hostile.doors import WRONG, doors, things
from tests.hostile.judge import REFUSED, TAKEN, Case, command, judge
from tests.hostile.judge import WRONG as FAULT

# Arguments that no table of wrong values holds, with the reason.
ELSEWHERE = {
    "tokenizer": "any object of transformers; a slow one is refused", "messages": "LM.chat: those of the template",
    "hf_model": "apply says what it writes into", "on": "of a context manager", "judge": "any function",
}  # fmt: skip
MADE_BY_US = {
    "EvalReport", "GateReport", "LogitLens", "Round", "LayerStudy", "TraceResult", "AverageTrace", "Network",
    "NeuronAttribution", "Forgotten", "Eraser", "Capability", "Implied", "Consistency", "RelationTable", "Moved",
    "Comparison", "EditSummary",
}  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return doors(tmp_path_factory.mktemp("doors"))


def test_every_option_is_looked_at():
    assert options.unread() == [], "give these a type of commands/argument_types.py"


def test_every_argument_of_a_public_function_is_in_the_table(table):
    """A new argument is added with what it refuses."""
    known = {argument for door in table for argument in door.arguments} | {"lm", "self"} | set(ELSEWHERE)
    for name in set(kf.__all__) - MADE_BY_US - {"__version__", "EDITORS", "BENCHMARKS"}:
        thing = getattr(kf, name)
        if inspect.isclass(thing) and name == "LM":
            continue
        missing = set(inspect.signature(thing).parameters) - known
        assert not missing - ELSEWHERE_BY_NAME.get(name, set()), f"{name}: {sorted(missing)} in no table"


# Fields that are looked at where they are used, or that the class makes of what it is given.
ELSEWHERE_BY_NAME = {
    "Fact": {"chat", "attached"}, "SecondMoment": {"fingerprint", "corpus", "dtype"}, "advise": {"drift", "retention"},
    "Edit": {"values", "statistics"}, "leace": {"how"}, "Suite": {"text", "context", "doubt"},
    "edit_in_rounds": {"text", "moments", "corpus"},
    "edit_by_layer": {"moments", "corpus"}, "plot_rounds": {"model"}, "open_model": {"tokenizer"},
}  # fmt: skip

ODD = st.one_of(
    st.floats(max_value=-0.5), st.integers(min_value=2**63), st.integers(max_value=-1), st.binary(),
    st.complex_numbers(), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.builds(object),
    st.lists(st.floats(), max_size=2), st.just(Ellipsis), st.functions(),
)  # fmt: skip
PLAIN = ("whole", "positive", "seed", "share", "number", "noise")  # kinds that nothing of ODD is


@settings(max_examples=250, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_wrong_values_are_refused_before_any_work(table, data):
    door = data.draw(st.sampled_from(table))
    argument = data.draw(st.sampled_from(sorted(door.arguments)))
    values, kind = st.sampled_from(door.wrong(argument)), door.arguments[argument].removesuffix("?")
    odd = ODD.filter(lambda x: kind not in ("number", "noise") or not isinstance(x, int) or x < 0)  # 2**63 is a number
    value = data.draw(st.one_of(values, odd) if kind in PLAIN else values)
    calls, call = [], Resident.call
    Resident.call = lambda self, *a, **k: calls.append(1) or call(self, *a, **k)
    try:
        with warnings.catch_warnings(), pytest.raises((ValueError, TypeError, OSError)) as refused:
            warnings.simplefilter("ignore")
            made = door.call(**{argument: value})
            next(made) if hasattr(made, "__next__") else None
    finally:
        Resident.call = call
    where = str(refused.traceback[-1].path)
    assert "kedit_fast" in where and "site-packages" not in where, (
        f"{door.name}({argument}={value!r}): {refused.value!r}"
    )
    assert len(str(refused.value)) > 10 and not calls, f"{door.name}({argument}={value!r}) began to work"


@pytest.mark.parametrize("part", sorted(set(PARTS) - {"arguments"}))
def test_a_sample_of_the_hostile_inputs(part, tmp_path):
    """One in fifteen; ``python -m tests.hostile`` runs all."""
    found = run(tmp_path, [part], every=15)
    assert len(found) > 1 and not [each for each in found if each.verdict == FAULT]


def test_there_are_enough_hostile_inputs(table):
    assert sum(len(door.wrong(argument)) for door in table for argument in door.arguments) > 2_000
    assert all(WRONG[kind.removesuffix("?")] for door in table for kind in door.arguments.values())


def test_the_judge_can_find_fault(tmp_path):
    """Each way in which an input may be wrong is seen."""
    model = things().model

    def leaves_a_file():
        (tmp_path / "half.json").write_text("{")
        raise ValueError("n = 0: expected a whole number")

    faults = {
        "taken": lambda: "something", "from within": lambda: [].pop(), "no words": lambda: int("x"),
        "left": leaves_a_file, "model": lambda: model.train(), "foreign": lambda: (_ for _ in ()).throw(KeyError("x")),
    }  # fmt: skip
    for name, fault in faults.items():
        assert judge(Case(name, fault), tmp_path, model).verdict == FAULT, name
        model.eval()
    assert judge(Case("right", lambda: 3, lambda given: given == 3), tmp_path).verdict == TAKEN
    assert judge(Case("not right", lambda: 4, lambda given: given == 3), tmp_path).verdict == FAULT
    refused = judge(Case("refused", command("trace", "--samples=0")), tmp_path)
    assert refused.verdict == REFUSED and "--samples" in refused.words
