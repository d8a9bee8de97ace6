"""Comparisons by hand: whose facts are the same, paired differences, EasyEdit beside a report, tables, files."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics.intervals import PROBABILITY, SCORE, SHARE, paired, paired_scores
from kedit_fast.evaluation import BENCHMARKS, EvalReport, compare
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT
from kedit_fast.evaluation.benchmarks.knowedit import KNOWEDIT
from kedit_fast.evaluation.compare import Comparison
from kedit_fast.evaluation.easyedit import load_easyedit
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.formats import Question
from kedit_fast.pictures.comparison import plot_comparison
from tests.evaluation.test_easyedit import BARE, RECORD, REQUEST

NAN = math.nan
FACTS = tuple(Fact("{} is in", f"<b>Town {i}</b>", "Rome", "Paris", (f"Where is town {i}?",)) for i in range(4))


def columns(benchmark, **given):
    """Columns with NaN where nothing is given; "__" is the dot."""
    given = {name.replace("__", "."): values for name, values in given.items()}
    n = len(next(iter(given.values())))
    return {name: torch.tensor(given.get(name, [NAN] * n)) for name in benchmark.metrics}


def report(benchmark=COUNTERFACT, facts=FACTS, base=None, **edited):
    base = base or {name: [0.0] * len(values) for name, values in edited.items()}
    meta = {"model": "tiny", "method": "by hand", "benchmark": benchmark.name}
    sides = columns(benchmark, **base), columns(benchmark, **edited)
    return EvalReport.of(benchmark, *sides, facts, meta)


ROME = dict(efficacy=[0.0, 1.0, 0.0, 0.0], p_new=[0.1, 0.2, NAN, 0.4], paraphrase=[0.5, 0.5, 0.5, NAN],
            neighborhood=[1.0, 1.0, 0.5, 1.0], p_true=[0.9, 0.8, 0.9, 0.9])  # fmt: skip
MEMIT = dict(efficacy=[1.0, 1.0, 1.0, 1.0], p_new=[0.2, 0.4, 0.3, 0.7], paraphrase=[0.5, 1.0, 0.5, 1.0],
             neighborhood=[1.0, 0.5, 0.5, 1.0], p_true=[0.1, 0.1, 0.1, 0.1])  # fmt: skip


def both(**options):
    return compare({"rome": report(**ROME), "memit": report(**MEMIT)}, **options)


def test_paired_differences_by_hand():
    found = both()
    ours, theirs = columns(COUNTERFACT, **MEMIT), columns(COUNTERFACT, **ROME)
    assert found.against == "rome" and set(found.differences["efficacy"]) == {"memit"}
    efficacy = found.differences["efficacy"]["memit"]
    assert efficacy == paired(theirs["efficacy"], ours["efficacy"], SHARE) and efficacy.mean == 0.75
    p_new = found.differences["p_new"]["memit"]
    assert p_new.n == 3 and p_new.mean == pytest.approx((0.1 + 0.2 + 0.3) / 3)  # of the pairs alone
    assert p_new == paired(theirs["p_new"], ours["p_new"], PROBABILITY)
    assert found.differences["neighborhood"]["memit"].mean == -0.125
    names = ("efficacy", "paraphrase", "neighborhood")
    assert found.differences[SCORE]["memit"] == paired_scores(theirs, ours, names)
    summary = found.summary["p_new"]
    assert list(summary) == ["base", "rome", "memit"] and [one.n for one in summary.values()] == [4, 3, 4]
    assert summary["rome"] == report(**ROME).summary()["p_new"]["edited"]


def test_who_is_better():
    """Only where the interval leaves 0 out; of the old answer's probability less is better."""
    found = both()
    assert found.verdict("p_true", "memit") == "better" and found.verdict("neighborhood", "memit") == ""
    assert found.differences["neighborhood"]["memit"].low < 0 < found.differences["neighborhood"]["memit"].high
    turned = both(against="memit")
    assert turned.verdict("p_true", "rome") == "worse" and list(turned.differences["p_true"]) == ["rome"]
    assert turned.differences["p_new"]["rome"].mean == pytest.approx(-0.2)
    zsre = {
        name: report(KNOWEDIT, rewrite__p_other=[p] * 4, rewrite__p=[p] * 4) for name, p in (("a", 0.1), ("b", 0.9))
    }
    assert compare(zsre).verdict("rewrite.p_other", "b") == "worse", "of what the answer is compared with, too"
    assert compare(zsre).verdict("rewrite.p", "b") == "better"
    base = both(against="base")
    assert set(base.differences["p_new"]) == {"rome", "memit"}
    assert base.differences["p_new"]["memit"].mean == pytest.approx(0.4)


def test_models_as_they_are_stand_for_themselves():
    small, large = (replace(report(**one), base=columns(COUNTERFACT, **one), edited=None) for one in (ROME, MEMIT))
    found = compare({"small": small, "large": large})
    assert found.base is None and list(found.summary["efficacy"]) == ["small", "large"]
    assert found.differences["efficacy"]["large"].mean == 0.75


def test_other_ways_of_writing_are_said():
    one = report(**ROME)
    settings = [{"generate": 2, "judge": None}, {"generate": 32, "judge": None}, {"generate": 2, "judge": "j"}]
    few, many, other = (replace(one, meta=one.meta | more) for more in settings)
    (note,) = compare({"few": few, "many": many, "of before": one}).notes
    assert note.startswith("tokens written behind a prompt: not the same in all") and note.endswith("few 2, many 32")
    (note,) = compare({"few": few, "other": other}).notes
    assert note.startswith("the judge: not the same") and note.endswith("few none, other j")
    assert compare({"few": few, "again": few}).notes == []


def test_another_base_is_said():
    other = report(base={"efficacy": [0.5] * 4}, **MEMIT)
    assert (
        "the unedited model of memit is not that of rome" in compare({"rome": report(**ROME), "memit": other}).notes[0]
    )
    assert not both().notes


@pytest.mark.parametrize(
    "other, says",
    [
        (dict(facts=FACTS[::-1]), "are of other facts: fact 0 is '<b>Town 0</b> is in' -> 'Rome' and '<b>Town 3"),
        (dict(facts=tuple(replace(fact, target_new="Nice") for fact in FACTS)), "-> 'Nice'; expected the same in the"),
        (dict(facts=FACTS[:3], efficacy=[1.0] * 3), "are of 4 facts and of 3, the first of them the same"),
        (dict(facts=tuple(replace(fact, paraphrases=()) for fact in FACTS)), "ask fact 0, '<b>Town 0</b> is in', "
         "otherwise: paraphrases is ('Where is town 0?',) and ()"),
        (dict(benchmark=BENCHMARKS["zsre"], rewrite__token=[1.0] * 4), "(benchmark counterfact) and 'b' (zsre) measure "
         "other things: 'efficacy' is in 'a' alone"),
    ],
)  # fmt: skip
def test_other_reports_are_refused(other, says):
    other = {"efficacy": [1.0] * 4} | other if "rewrite__token" not in other else other
    with pytest.raises(ValueError, match=re.escape(says)):
        compare({"a": report(efficacy=[0.0] * 4), "b": report(**other)})


@pytest.mark.parametrize(
    "reports, options, says",
    [
        (3, {}, "reports = 3: expected reports of the same facts"),
        ({"a": 1, "b": 2}, {}, "reports['a'] = 1: expected an EvalReport"),
        ({"a": report(**ROME)}, {}, "reports: 1 report; expected two or more"),
        ({"a": report(**ROME), "base": report(**ROME)}, {}, "'base' is taken"),
        ({"a": report(**ROME), "b": report(**ROME)}, {"against": "c"}, "against = 'c': expected one of a, b, base"),
    ],
)
def test_other_arguments_are_refused(reports, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        compare(reports, **options)


# ---- EasyEdit's columns


OURS = (
    Fact("{} is located in the city of", "Big Ben", "Seattle", "London", ("Where is Big Ben? In",),
         (Question("The Louvre is in", "Paris"), Question("Rome is in", "Italy")),
         (Question("Big Ben was built by", "Barry"),),
         provenance={"portability": REQUEST["portability"]}),
    Fact("{} is owned by", "Vimeo", "Apple"),
)  # fmt: skip


def easyedit(tmp_path, *records):
    (tmp_path / "results.json").write_text(json.dumps(records))
    return load_easyedit(tmp_path / "results.json")


def knowedit(facts=OURS, **edited):
    given = dict(
        rewrite__token=[0.5, 0.0],
        paraphrase__token=[1.0, NAN],
        locality__same=[1.0, NAN],
        rewrite__p=[0.5, 0.5],
    )
    given |= {"reasoning__token": [1.0, NAN], "alias__token": [0.5, NAN]} | edited
    given["kept__same"] = given["locality__same"]
    return report(KNOWEDIT, facts, **given)


def test_easyedit_beside_a_report(tmp_path):
    found = compare({"memit": knowedit(), "easyedit": easyedit(tmp_path, RECORD, BARE)})
    assert found.differences["rewrite.token"]["easyedit"].mean == 0.5 and found.facts == OURS
    assert found.differences["paraphrase.token"]["easyedit"][::3] == (-0.5, 1)
    assert found.differences["locality.same"]["easyedit"].mean == -0.25
    assert found.differences["reasoning.token"]["easyedit"].mean == -1
    assert found.score_of == KNOWEDIT.score_of
    notes = "\n".join(found.notes)
    assert "left out, of memit alone: rewrite.p" in notes and "of easyedit alone: same_subject.same, " in notes
    assert "fluency.ngram_entropy" in notes and "post.rewrite_ppl" in notes and "choice.success" not in notes


def test_other_prompts_are_left_out_and_said(tmp_path):
    first = replace(OURS[0], paraphrases=("Big Ben stands in",))
    found = compare({"memit": knowedit((first, OURS[1])), "easyedit": easyedit(tmp_path, RECORD, BARE)})
    assert "paraphrase.token" not in found.metrics and found.score_of == ()
    assert "paraphrase: easyedit asked other prompts of all facts; 0 facts compared" in found.notes
    more = RECORD | {"requested_rewrite": REQUEST | {"rephrase_prompt": "Big Ben is in"}}
    three = (*OURS, replace(OURS[0], paraphrases=("Big Ben is in",)))
    names = "paraphrase__token rewrite__token locality__same alias__token reasoning__token rewrite__p"
    columns = {name: [1.0, NAN, 1.0] for name in names.split()}
    found = compare({"memit": knowedit(three, **columns), "easyedit": easyedit(tmp_path, more, BARE, more)})
    assert found.differences["paraphrase.token"]["easyedit"].n == 1
    assert "paraphrase: easyedit asked other prompts of some facts; 1 fact compared" in found.notes


def test_easyedit_of_zsre_asks_for_portability(tmp_path):
    """Its "one_hop" is what the benchmark knows as portability."""
    fact = replace(
        OURS[0], provenance={"portability": {"New Question": "The country of Big Ben is", "New Answer": "USA"}}
    )
    record = RECORD | {"requested_rewrite": REQUEST | {"portability": {"one_hop": REQUEST["portability"]["one_hop"]}}}
    record |= {side: RECORD[side] | {"portability": {"one_hop_acc": [0.0]}} for side in ("pre", "post")}
    ours = report(BENCHMARKS["zsre"], (fact,), rewrite__token=[1.0], portability__token=[1.0])
    found = compare({"easyedit": easyedit(tmp_path, record), "memit": ours})
    assert found.differences["portability.token"]["memit"].mean == 1 and "reasoning.token" not in found.metrics


def test_two_of_easyedit(tmp_path):
    one = easyedit(tmp_path, RECORD, BARE)
    two = easyedit(tmp_path, RECORD | {"post": RECORD["post"] | {"fluency": {"ngram_entropy": 6.5}}}, BARE)
    found = compare({"rome": one, "memit": two})
    assert found.differences["fluency.ngram_entropy"]["memit"].mean == 1 and "fluency" in str(found)
    assert found.summary["fluency.ngram_entropy"]["base"].mean == 6.5


def test_nothing_in_common_is_said(tmp_path):
    facts = tuple(replace(fact, provenance={}) for fact in OURS)
    ours = report(COUNTERFACT, facts, efficacy=[1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"nothing was measured alike: memit has efficacy, .*; easyedit has rewrite\.token"
    ):
        compare({"memit": ours, "easyedit": easyedit(tmp_path, RECORD, BARE)})
    with pytest.raises(ValueError, match="fact 1 is 'Vimeo is owned by' -> 'Apple' and 'Big Ben"):
        compare({"memit": knowedit(), "easyedit": easyedit(tmp_path, RECORD, RECORD)})


# ---- what is shown, and files


def test_tables():
    lines = str(both()).splitlines()
    assert lines[0] == "tiny: rome, memit on 4 facts" and lines[1].split() == ["mean", "base", "rome", "memit", "facts"]
    rows = {line.split()[0]: line for line in lines[2:] if line}
    assert "-0.775 [-0.855, -0.695] better  4" in rows["p_true"]
    second = lines.index(next(line for line in lines if line.startswith("difference to rome")))
    assert lines[second].split()[3:] == ["memit", "pairs"]
    p_new = next(line for line in lines[second:] if line.startswith("p_new"))
    assert p_new.endswith("  3") and "+0.200 [-0.048, +0.448]" in p_new
    means = next(line for line in lines if line.startswith("p_new"))
    assert means.endswith("  4, 3") and "neighborhood_left_out" not in str(both())
    assert "nan" not in str(both()) and "one in twenty does" in lines[-1]


def test_modes_that_are_shown():
    two = [knowedit(), knowedit(rewrite__token=[1.0, 1.0])]
    found = compare(dict(zip("ab", two, strict=True)))
    assert found.modes() == ("token", "same") and "rewrite.p" not in str(found)
    assert "modes not shown: success, p, p_other, exact" in str(found)
    text = found.to_text(("p",))
    assert "rewrite.p" in text and "rewrite.token" not in text and "score" in text
    with pytest.raises(ValueError, match="modes = 'none': expected some of same, success, p, p_other, token"):
        found.to_text(("none",))


def test_page_and_picture(tmp_path):
    found = both()
    fragment = found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert fragment in page and fragment == found._repr_html_() and "script" not in page
    assert page.count("<table>") == 2 and 'class="good">-0.775 [-0.855, -0.695] better</td>' in page
    assert "data:image/png;base64," in page and "Means of each side. score: base 0.00" in page
    assert "<details>" not in page and "<details>" in compare({"a": knowedit(), "b": knowedit()}).to_html()
    figure = plot_comparison(found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"
    assert "neighborhood: base 0.00, rome 0.88, memit 0.75" in figure.get_label()
    assert figure.get_figwidth() <= 4.4  # on a phone as wide as the page


def test_a_saved_comparison_comes_back(tmp_path):
    path = tmp_path / "c.json"
    for found in (both(against="base"), compare({"a": knowedit(), "b": knowedit()})):
        found.save(path)
        again = Comparison.load(path)
        assert str(again) == str(found) and again.against == found.against and again.facts == found.facts
        assert all(torch.equal(again.sides[a][m].nan_to_num(-1), x.nan_to_num(-1)) for a in found.sides
                   for m, x in found.sides[a].items())  # fmt: skip
    assert "NaN" not in path.read_text() and repr(again) == "Comparison(tiny: a, b on 2 facts)"


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c.json"
    both().save(path)
    record = json.loads(path.read_text())
    short = {name: values[:2] for name, values in record["sides"]["rome"].items()}
    for broken in ({"version": 2}, {"against": "c"}, {"sides": {"rome": short}}, {"cases": [1, 1]}, {"notes": [3]},
                   {"meta": {"rome": 3}}, {"sides": {"rome": {}, "memit": 3}}):  # fmt: skip
        path.write_text(json.dumps(record | broken))
        with pytest.raises(ValueError, match=re.escape(f"{path} is not a saved comparison")):
            Comparison.load(path)


def test_it_is_public():
    assert kf.compare is compare and kf.Comparison is Comparison
