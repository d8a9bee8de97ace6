"""What the unedited model answers, kept while several edits of it are evaluated on the same facts.

One edit is read with its base in one sweep, and below the first edited layer the two share every row. Of several it
costs less to ask the base once: for 197 probes of SmolLM2-135M on one CPU core, base and edited together took 20.6 s
with layers 3 to 7 edited, the edited model alone 11.2 s and the base alone 10.8 s; with layer 20 edited 16.8, 12.3 s.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kedit_fast.basics.bits import digest
from kedit_fast.evaluation.perplexity import edited_perplexity, perplexity
from kedit_fast.evaluation.probes import Answer, Probe, read_edited, read_probes
from kedit_fast.evaluation.written import write_probes


class Known:
    """What models without edits answer and write, and their perplexity of texts; for ``evaluate(known=...)``.

    told: {digest of model and question: what it said, as JSON gives it back}
    """

    def __init__(self, told: Mapping[str, Any] | None = None) -> None:
        self.told: dict[str, Any] = dict(told or {})

    def read(self, lm, probes: Sequence[Probe], advance=None) -> tuple[list[Answer], list[Answer] | None]:
        """As ``read_probes``; the base model is asked for what it was not asked before."""

        def ask(new: list[Probe]) -> list[Answer]:
            return read_probes(_bare(lm), new, None if lm.edits else advance)[0]

        questions = [(one.prompt, one.answers, one.likeliest) for one in probes]
        base = [Answer.of(*each) for each in self._of(lm, "read", questions, probes, ask)]
        if not lm.edits:
            return base, None
        asked = [one._replace(top=answer.top) for one, answer in zip(probes, base, strict=True)]
        return base, read_edited(lm, asked, advance)

    def written(self, bare, probes: Sequence[Probe]) -> list[str | None]:
        """As ``write_probes`` of a model without edits, for what it did not write before."""
        questions = [(one.prompt, one.n_written, one.until, one.accepted) for one in probes]
        return self._of(bare, "written", questions, probes, lambda new: write_probes(bare, new))

    def perplexity(self, lm, windows: list[list[int]]) -> tuple[float, float | None]:
        """As ``perplexity``; the base model reads a text once."""
        (base,) = self._of(lm, "perplexity", [windows], [windows], lambda new: [perplexity(_bare(lm), new[0])[0]])
        return base, edited_perplexity(lm, windows) if lm.edits else None

    def _of(self, lm, what: str, questions: list, things: Sequence, ask) -> list:
        """What is told of each question; ``ask`` is given the things whose questions are new, each once."""
        keys = [digest(lm.fingerprint, lm.dtype_name, what, question) for question in questions]
        new = {key: one for key, one in zip(keys, things, strict=True) if key not in self.told}
        if new:
            self.told.update(zip(new, ask(list(new.values())), strict=True))
        return [self.told[key] for key in keys]


def _bare(lm):
    return dataclasses.replace(lm, edits=())
