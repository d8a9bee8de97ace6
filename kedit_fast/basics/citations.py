"""The papers behind a method, a benchmark or a result, as BibTeX (``references.bib``)."""

import re
from functools import cache
from importlib.resources import files
from typing import Any

from kedit_fast.basics import checks
from kedit_fast.basics.catalog import EDITORS

PAPERS = {  # {name of a method, a benchmark or a function: keys of references.bib}
    "rome": ("meng2022rome", "gupta2024rrome"),
    "memit": ("meng2023memit",),
    "alphaedit": ("fang2025alphaedit",),
    "emmet": ("gupta2024emmet",),
    "encore": ("gupta2025encore",),
    "pmet": ("li2024pmet",),
    "memit-blue": ("meng2023memit", "li2025blue"),
    "alphaedit-blue": ("fang2025alphaedit", "li2025blue"),
    "betaedit": ("liu2026betaedit",),
    "rect": ("gu2024rect",),
    "nas": ("liu2026nas",),
    "grace": ("hartvigsen2023grace",),
    "wise": ("wang2024wise", "yadav2023ties"),
    "memoir": ("wang2025memoir",),
    "kn": ("dai2022neurons", "sundararajan2017"),
    "ft": ("zhu2020ft",),
    "ft-l": ("zhu2020ft", "meng2022rome"),
    "ft-m": ("zhang2024knowedit",),
    "locft-bf": ("yang2025locft",),
    "crispedit": ("ikram2026crispedit", "martens2015"),
    "ultraedit": ("gu2025ultraedit",),
    "stableedit": ("stableedit2026",),
    "mend": ("mitchell2022mend",),
    "malmen": ("tan2024malmen",),
    "ke": ("decao2021ke",),
    "ike": ("zheng2023ike",),
    "ike-plain": ("zheng2023ike",),
    "ice": ("cohen2024ripple",),
    "serac": ("mitchell2022serac",),
    "unlearn": ("zhang2024npo", "maini2024tofu", "li2024wmdp", "patil2024"),
    "counterfact": ("meng2022rome", "meng2023memit"),
    "counterfact+": ("hoelscher2023",),
    "questions": ("yang2025wild",),
    "zsre": ("levy2017zsre", "mitchell2022mend"),
    "zsre-true": ("levy2017zsre", "meng2022rome"),
    "mquake": ("zhong2023mquake",),
    "mquake-cot": ("zhong2023mquake",),
    "rippleedits": ("cohen2024ripple",),
    "knowedit": ("zhang2024knowedit",),
    "qaedit": ("yang2025wild",),
    "halluedit": ("huang2025halluedit",),
    "wikibigedit": ("thede2025wikibigedit",),
    "knowgic": ("baser2025knowgic",),
    "tofu": ("maini2024tofu",),
    "trace": ("meng2022rome",),
    "estimate": ("syed2023", "sundararajan2017"),
    "corrected attribution": ("kramar2024atp", "jafari2025relp"),  # measured, and not offered: tracing/attribution.py
    "second_moments": ("meng2022rome",),
    "edit_by_layer": ("hase2023",),
    "leace": ("belrose2023leace",),
    "mello": ("zhong2023mquake",),
    "capability": ("gao2021harness",),
    "what_moved": ("hoelscher2023",),
    "verify_forgotten": ("patil2024", "zhang2024quantization"),
}


def citation(*what: Any) -> str:
    """BibTeX of the papers behind these: names, editors, edits, benchmarks, reports, traces, functions of this package.

    ``print(kf.citation(edit, report, "trace"))``. Each entry once. Raises BadArgument for what no paper is known of.
    """
    if not what:
        checks.refuse("citation of", what, "an editor, an edit, a benchmark, a report, a trace, or a name")
    names = dict.fromkeys(name for one in what for name in _names(one))
    for name in names:
        if name not in PAPERS:
            checks.refuse("citation of", name, f"one of {', '.join(PAPERS)}")
    keys = dict.fromkeys(key for name in names for key in PAPERS[name])
    return "\n\n".join(entries()[key] for key in keys)


def _names(one) -> list[str]:
    """The names in ``PAPERS`` that an object goes by."""
    if isinstance(one, str):
        return [one]
    if isinstance(getattr(one, "method", None), str):  # an edit, an editor
        return one.method.split(" + ")
    if isinstance(one, type):
        return [name for name, place in EDITORS.items() if place.endswith(f".{one.__name__}")] or [one.__name__]
    if isinstance(meta := getattr(one, "meta", None), dict):  # a report
        told = [meta.get("benchmark"), *(meta.get("method") or "").split(" + ")]
        return [name for name in told if name] or [type(one).__name__]
    if hasattr(one, "p_restored"):
        return ["trace"] if getattr(one, "exact", None) is None else ["trace", "estimate"]
    return [str(getattr(one, "name", getattr(one, "__name__", type(one).__name__))).partition(",")[0]]


@cache
def entries() -> dict[str, str]:
    """{key: entry} of references.bib."""
    text = (files("kedit_fast.basics") / "references.bib").read_text(encoding="utf-8")
    return {re.match(r"@\w+\{([^,]+),", entry)[1]: entry.strip() for entry in re.split(r"\n(?=@)", text)}  # type: ignore[index]
