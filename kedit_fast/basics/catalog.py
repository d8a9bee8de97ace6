"""What goes by a name on the command line, and where in the package it stands: a new one is its file and a line here.

The parser reads the names and may not load torch; the dicts ``EDITORS`` and ``BENCHMARKS`` are made of the same lines.
"""

from importlib import import_module
from typing import Any

from kedit_fast.basics.words import did_you_mean

EDITORS = {
    "rome": "editors.rome.Rome",
    "memit": "editors.memit.Memit",
    "alphaedit": "editors.alphaedit.AlphaEdit",
    "emmet": "editors.emmet.Emmet",
    "encore": "editors.encore.Encore",
    "pmet": "editors.pmet.Pmet",
    "memit-blue": "editors.blue.MemitBlue",
    "alphaedit-blue": "editors.blue.AlphaEditBlue",
    "betaedit": "editors.betaedit.BetaEdit",
    "rect": "editors.rect.Rect",
    "nas": "editors.nas.Nas",
    "grace": "editors.grace.Grace",
    "wise": "editors.wise.Wise",
    "memoir": "editors.memoir.Memoir",
    "kn": "editors.neurons.KnowledgeNeurons",
    "ft": "editors.finetune.Ft",
    "ft-l": "editors.finetune.FtL",
    "ft-m": "editors.finetune.FtM",
    "locft-bf": "editors.locft.LocFt",
    "ultraedit": "editors.ultraedit.UltraEdit",
    "stableedit": "editors.ultraedit.StableEdit",
    "crispedit": "editors.crispedit.CrispEdit",
    "ike": "editors.ike.Ike",
    "ike-plain": "editors.ike.IkePlain",
    "ice": "editors.ice.Ice",
    "serac": "editors.serac.Serac",
    "mend": "editors.mend.Mend",
    "malmen": "editors.malmen.Malmen",
    "ke": "editors.ke.Ke",
    "unlearn": "editors.unlearn.Unlearn",
}
TRAINED = {  # editors that a network is trained for: the hyper-parameters of its training
    "mend": "editors.mend.MendTraining",
    "malmen": "editors.malmen.MalmenTraining",
    "ke": "editors.ke.KeTraining",
}
ROUTES = ("names", "scope")  # around independent edits (``editors/routed.py``)
SELF = "self"  # of corpora, the text that the model samples itself
CAPABILITY = ("kedit_common", "kedit_short")  # tasks of lm-evaluation-harness that lie in ``evaluation/tasks``
BENCHMARKS = {
    "counterfact": "evaluation.benchmarks.counterfact.COUNTERFACT",
    "questions": "evaluation.benchmarks.knowedit.QUESTIONS",
    "zsre": "evaluation.benchmarks.zsre.ZSRE",
    "zsre-true": "evaluation.benchmarks.zsre.ZSRE_TRUE",
    "mquake": "evaluation.benchmarks.mquake.MQUAKE",
    "mquake-cot": "evaluation.benchmarks.mquake.MQUAKE_COT",
    "rippleedits": "evaluation.benchmarks.rippleedits.RIPPLEEDITS",
    "knowedit": "evaluation.benchmarks.knowedit.KNOWEDIT",
    "qaedit": "evaluation.benchmarks.qaedit.QAEDIT",
    "halluedit": "evaluation.benchmarks.halluedit.HALLUEDIT",
    "wikibigedit": "evaluation.benchmarks.wikibigedit.WIKIBIGEDIT",
    "knowgic": "evaluation.benchmarks.knowgic.KNOWGIC",
    "tofu": "evaluation.benchmarks.tofu.TOFU",
}


class Loaded(dict[str, Any]):
    """{name: what stands there}; KeyError for a name that is none says which there are, and the one that is nearest."""

    def __missing__(self, name):
        raise KeyError(f"{name!r} is none of {', '.join(self)}{did_you_mean(str(name), self)}")


def loaded(catalog: dict[str, str]) -> Loaded:
    """{name: what stands there}, in their order; imports the modules."""
    found = Loaded()
    for name, place in catalog.items():
        module, _, attribute = place.rpartition(".")
        found[name] = getattr(import_module(f"kedit_fast.{module}"), attribute)
    return found
