"""Every method and benchmark has its papers, and every paper that the package names has an entry."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import kedit_fast as kf
from kedit_fast.basics.citations import PAPERS, entries
from tests.conftest import refused

PACKAGE = Path(kf.__file__).parent
NUMBERS = {
    number
    for file in PACKAGE.rglob("*.py")
    for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", file.read_text(encoding="utf-8"))
}


def test_every_paper_that_is_named_has_an_entry_and_every_entry_is_named():
    cited = {key: re.search(r"eprint = \{([\d.]+)\}", entry) for key, entry in entries().items()}
    assert len({match[1] for match in cited.values() if match}) == sum(map(bool, cited.values()))
    assert {match[1] for match in cited.values() if match} >= NUMBERS
    assert {key for keys in PAPERS.values() for key in keys} == set(cited)
    assert {*kf.EDITORS, *kf.BENCHMARKS} <= set(PAPERS)


@pytest.mark.parametrize("key", entries())
def test_an_entry_is_whole(key):
    entry = entries()[key]
    assert entry.startswith(f"@{entry[1:].split('{')[0]}{{{key},") and entry.endswith("}")
    assert entry.count("{") == entry.count("}") and re.search(r"title = \{.+\}", entry) and re.search(r"year = ", entry)


def test_what_is_cited():
    rome = kf.citation("rome")
    assert rome == kf.citation(kf.Rome) == kf.citation(kf.Rome(layers=(5,)))
    assert "Locating and Editing Factual Associations" in rome and rome.count("@") == 2
    assert kf.citation("rome", kf.BENCHMARKS["counterfact"]).count("meng2022rome") == 1
    assert kf.citation(kf.capability).startswith("@misc{gao2021harness")
    for name, editor in kf.EDITORS.items():
        assert kf.citation(editor) == kf.citation(name)
    refused("citation of", kf.citation)
    refused("citation of = 'nobody'", kf.citation, "nobody")
    refused("citation of", kf.citation, object())


def test_results_are_cited_by_what_they_say_of_themselves():
    from tests.conftest import tiny_lm

    lm = tiny_lm("llama")
    fact = kf.Fact("{} is in the city of", "Big Ben", "Rome", "London")
    (state,) = kf.trace(lm, [fact], kinds=("state",), samples=1, noise=0.1)
    assert kf.citation(state) == kf.citation("trace")
    (screened,) = kf.trace(lm, [fact], kinds=("state",), samples=1, noise=0.1, method="screen")
    assert kf.citation(screened) == kf.citation("trace", "estimate")
    report = kf.evaluate(lm, [fact], benchmark=kf.BENCHMARKS["zsre"], generate=0)
    assert kf.citation(report) == kf.citation("zsre")
    assert kf.citation(replace(report, meta=report.meta | {"method": "rome + memit"})) == kf.citation(
        "zsre", "rome", "memit"
    )
