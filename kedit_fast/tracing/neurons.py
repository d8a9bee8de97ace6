"""Knowledge neurons of facts: which neurons of all MLPs give an answer, and in which layers they are (Dai et al. 2022,
Knowledge Neurons in Pretrained Transformers, arXiv:2104.08696).

``jobs/integrate.py`` has the equation, ``jobs/neurons.py`` the rules by which neurons are a fact's own. The editor that
changes them is ``editors/neurons.py``.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from kedit_fast.basics import checks
from kedit_fast.facts.fact import Fact, fact_list
from kedit_fast.facts.wordings import wordings
from kedit_fast.jobs.neurons import Attributed, NeuronSettings, Wordings, attribute, chosen
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.kept import Checkpoint, asked_of, begun, check_run, fitting
from kedit_fast.tracing.results import TraceResult, read_npz, write_npz

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = ("p", "by_layer", "places", "attribution", "neurons")  # the fields of a result that are arrays


@dataclass(frozen=True, eq=False)
class NeuronAttribution:
    """What the neurons of all MLPs give to one fact's answer; w wordings, L layers.

    prompts: the wordings, the fact's own first; answer: what is asked for
    p: [w] P(answer), the mean over its tokens
    by_layer: [w, L] sums over each layer's neurons: P(answer) - P(answer | the layer's key is 0), within the steps
    places: [k, 2] int64 (layer, neuron) of the strongest, and of those above the threshold of a wording
    attribution: [k] of each, the mean over wordings
    neurons: [r, 2] the fact's knowledge neurons, the strongest first
    """

    fact: Fact
    prompts: tuple[str, ...]
    answer: str
    steps: int
    p: np.ndarray
    by_layer: np.ndarray
    places: np.ndarray
    attribution: np.ndarray
    neurons: np.ndarray

    def __post_init__(self):
        checks.instance("fact", self.fact, Fact, "a Fact")
        w, k, shape = len(self.prompts), len(self.places), np.shape(self.by_layer)
        wanted = {"p": (w,), "by_layer": (w, *shape[1:2]), "places": (k, 2), "attribution": (k,)}
        wanted["neurons"] = (len(self.neurons), 2)
        for name, size in wanted.items():
            array = getattr(self, name)
            if np.shape(array) != size or array.dtype.kind not in ("f" if name in ("p", "by_layer") else "fi"):
                raise ValueError(f"{name}: expected numbers {list(size)}, found {array.dtype} {list(np.shape(array))}")

    def plot(self, path: checks.AnyPath | None = None, trace: TraceResult | None = None) -> "Figure":
        """Heat map of ``by_layer``, below the fact's causal trace where one is given; PNG or what the suffix says."""
        from kedit_fast.pictures.neurons import plot_neurons

        return plot_neurons(self, path, trace)

    def to_record(self) -> dict:
        """Plain values, for a line of JSON."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record |= {"fact": self.fact.to_record(), "prompts": list(self.prompts)}
        return record | {name: record[name].tolist() for name in TABLES}

    def save(self, path: checks.AnyPath) -> None:
        """Writes an .npz file without pickle; ``load`` gives it back. One of that name is replaced, folders made."""
        record = {name: value for name, value in self.to_record().items() if name not in TABLES}
        write_npz(path, record=json.dumps(record), **{name: getattr(self, name) for name in TABLES})

    @classmethod
    def load(cls, path: checks.AnyPath) -> "NeuronAttribution":
        """Raises ValueError for a file that ``save`` did not write."""
        return read_npz(path, "saved knowledge neurons", cls._of_arrays, *TABLES, "record")

    @classmethod
    def _of_arrays(cls, *arrays) -> "NeuronAttribution":
        *tables, record = arrays
        read = json.loads(str(record)) | dict(zip(TABLES, tables, strict=True))
        return cls(**read | {"fact": Fact.from_record(read["fact"]), "prompts": tuple(read["prompts"])})

    def __repr__(self) -> str:
        n, layers = len(self.neurons), self.by_layer.shape[1]
        found = f"{n} neuron{'s' * (n != 1)} of {layers} layers, {len(self.prompts)} wordings"
        return f"NeuronAttribution({self.fact.text!r} -> {self.answer!r}, P {self.p[0]:.3g}, {found})"

    def _repr_html_(self) -> str:
        from kedit_fast.pictures.figure import figure_html

        return figure_html(self.plot())


@takes_lm
def knowledge_neurons(
    lm: LM,
    facts: Fact | Iterable[Fact],
    *,
    steps: int = 20,
    threshold: float = 0.2,
    share: float = 0.7,
    common: float = 0.1,
    answer: str | None = None,
    paraphrases: bool = True,
    layers: Iterable[int] | None = None,
    top: int = 1000,
    checkpoint: Checkpoint = None,
) -> list[NeuronAttribution]:
    """The neurons by which the model says each fact's answer, in all layers; with the edits that ``lm`` carries.

    steps: m, points of the integral from a key of 0 to the key
    threshold: t, a wording's neurons are those with more than t times its largest attribution
    share: p, of its wordings (the prompt, phrasings, paraphrases) that a fact's neuron must be in: more than this
    common: neurons that more than this share of the other facts of the relation have (by relation_id, else by prompt)
        are left out, where there are at least 1 / common of them
    answer: the text asked for; None: the fact's target_true, else the model's own likeliest token
    paraphrases: whether they are read too. An edit must not be made of what is held out to test it: editors do not
    layers: where to look; None: all. top: neurons whose attribution is given
    checkpoint: as of ``trace``

    Raises ValueError, before any work, for settings out of range, layers that the model lacks and mixtures of experts,
    then for NaN and for what does not fit the memory. One forward and one backward pass over the weights for what it
    holds.
    """
    if lm.family.experts:
        raise ValueError(
            f"neurons are the keys of dense MLPs, and the layers of this {lm.config.model_type} model are mixtures of "
            "experts, whose keys are not scaled; kf.trace (kedit-fast trace) shows in which layers a fact is read"
        )
    facts, steps = fact_list(facts), checks.whole("steps", steps, least=1, most=10_000, like=20)
    amounts = {"threshold": threshold, "share": share, "common": common}
    amounts = {name: checks.number(name, value, least=0, most=1, like=0.2) for name, value in amounts.items()}
    chosen_layers = range(lm.n_layers) if layers is None else sorted(set(checks.layers("layers", layers, lm.n_layers)))
    top = checks.whole("top", top, like=1000)
    how = NeuronSettings(tuple(chosen_layers), steps, top=top, **amounts)
    paraphrases, answer = checks.flag("paraphrases", paraphrases), checks.optional(checks.text, "answer", answer)
    others = [(*fact.phrased(), *(_paraphrased(fact) if paraphrases else ())) for fact in facts]
    asked = [Wordings(*wordings(lm.tokenizer, *each, answer)) for each in zip(facts, others, strict=True)]
    settings = {"answer": answer, "paraphrases": paraphrases} | vars(how)
    with begun(check_run(checkpoint), partial(asked_of, lm, "knowledge neurons", facts, **settings)) as keep:
        found = fitting(lm, keep, lambda lm: attribute(lm, asked, how, keep))
    neurons = chosen(asked, found, how)
    texts = [tuple(one.text for one in (fact, *more)) for fact, more in zip(facts, others, strict=True)]
    every = zip(facts, texts, found, neurons, strict=True)
    return [_result(lm, fact, prompts, one, mine, steps) for fact, prompts, one, mine in every]


def _paraphrased(fact: Fact) -> list[Fact]:
    """The fact in each of its paraphrases, as facts of their own; these need not name the subject."""
    bare = replace(fact, subject=None, prompt=fact.text, paraphrases=(), neighborhood=(), same_subject=(), phrasings=())
    return [replace(bare, prompt=paraphrase) for paraphrase in fact.paraphrases]


def _result(lm, fact, prompts, found: Attributed, neurons: torch.Tensor, steps: int) -> NeuronAttribution:
    def places(flat: torch.Tensor) -> np.ndarray:
        return torch.stack([flat // lm.d_ff, flat % lm.d_ff], 1).numpy()

    return NeuronAttribution(
        fact=fact, prompts=prompts, answer=lm.tokenizer.decode(found.answers[0]), steps=steps,
        p=found.p.float().numpy(), by_layer=found.by_layer.float().numpy(), places=places(found.neurons),
        attribution=found.attribution.float().numpy(), neurons=places(neurons),
    )  # fmt: skip
