"""The published procedure, one fact after the other over Hugging Face's forward: what ``bench.values`` compares with.

Values, layer loop and ROME's update are the tests' oracle. Here is what the published code does besides, in its own
shapes: MEMIT's second pass through norm and head for the target's loss, keys of 128 padded rows a forward, and the
evaluation of one fact as one padded batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.common import Timing, timed
from kedit_fast.facts.fact import Fact
from tests.oracle import access
from tests.oracle.values import Fact as OracleFact
from tests.oracle.values import in_context, optimize_value, value_batch

KEY_ROWS = 128  # padded rows that one forward of the published code takes keys of


def plain(fact: Fact) -> OracleFact:
    """The fact as the oracle takes it."""
    return OracleFact(fact.prompt, fact.subject, fact.target_new, tuple(one.prompt for one in fact.phrased()))


@dataclass(frozen=True)
class Loop:
    """The loop over one model, with contexts for everyone.

    groups: of templates; options: of ``optimize_value`` (lr, steps, weight_decay, kl_factor, clamp)
    """

    lm: object
    groups: list[list[str]]
    options: dict

    @property
    def contexts(self) -> list[str]:
        return [template for group in self.groups for template in group]

    def value(self, fact: Fact, layer: int, site: str, *, twice: bool = False) -> Timing:
        """The oracle's value of one fact. twice: MEMIT's second projection is made, as published."""
        with second_projection(self.lm.model, len(self.contexts) if twice else 0):
            return timed(
                optimize_value,
                self.lm.model,
                self.lm.tokenizer,
                plain(fact),
                self.contexts,
                layer,
                site,
                **self.options,
            )

    def value_slots(self, fact: Fact) -> int:
        """Rows x longest row of the batch that a fact's value is optimized on: the work of one iteration."""
        return value_batch(self.lm.tokenizer, plain(fact), self.contexts, torch.device("cpu")).ids.numel()

    def keys(self, facts: Sequence[Fact], layer: int) -> Tensor:
        """k* [n, d_ff]: mean over groups of the mean over their contexts, ``KEY_ROWS`` rows a forward."""
        rows = self._read(facts, self.contexts, layer, "mlp_out", key=True).view(len(facts), len(self.contexts), -1)
        parts = rows.split([len(group) for group in self.groups], 1)
        return torch.stack([part.mean(1) for part in parts]).mean(0)

    def current(self, facts: Sequence[Fact], layer: int) -> Tensor:
        """The layer's output [n, d] at the bare prompts' lookup tokens."""
        return self._read(facts, self.contexts[:1], layer, "layer_out")

    def read_slots(self, facts: Sequence[Fact]) -> tuple[int, int]:
        """(of keys, of current values): tokens of all rows; what padding adds depends on the batch and is left out."""
        lengths = [len(ids) for ids, _ in self._places(facts, self.contexts)]
        return sum(lengths), sum(lengths[:: len(self.contexts)])

    def _places(self, facts, contexts) -> list[tuple[list[int], int]]:
        lookup = access.lookup
        return [lookup(self.lm.tokenizer, in_context(c, fact.prompt), fact.subject) for fact in facts for c in contexts]

    @torch.no_grad()
    def _read(self, facts, contexts, layer: int, site: str, *, key: bool = False) -> Tensor:
        places, parts = self._places(facts, contexts), []
        module = access.site_module(self.lm.model, layer, site)
        for first in range(0, len(places), KEY_ROWS):
            some = places[first : first + KEY_ROWS]
            rows, at = torch.arange(len(some)), torch.tensor([index for _, index in some])
            seen: list[Tensor] = []
            hook = (
                module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
                if key
                else module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(access.first(out)))
            )
            try:
                self.lm.model(**_padded([ids for ids, _ in some]))
            finally:
                hook.remove()
            parts.append(seen[0][rows, at])
        return torch.cat(parts)

    @torch.no_grad()
    def probabilities(self, fact: Fact) -> Tensor:
        """[prompts, 2]: P(new) and P(true) after the rewrite prompt, the paraphrases and the neighborhood prompts, each
        exp of its tokens' mean log-probability; one padded batch, logits of all its tokens."""
        tok = self.lm.tokenizer
        prompts = [tok(text)["input_ids"] for text in (fact.text, *fact.paraphrases, *fact.neighborhood)]
        targets = [access.target_ids(tok, target) for target in (fact.target_new, fact.target_true)]
        pairs = [(prompt, target) for prompt in prompts for target in targets]
        log_p = self.lm.model(**_padded([prompt + target for prompt, target in pairs])).logits.log_softmax(-1)
        means = [
            log_p[row, torch.arange(len(prompt) - 1, len(prompt) + len(target) - 1), target].mean()
            for row, (prompt, target) in enumerate(pairs)
        ]
        return torch.stack(means).exp().view(-1, 2)

    def probe_slots(self, fact: Fact) -> int:
        """Rows x longest row of the batch that a fact is evaluated on."""
        tok = self.lm.tokenizer
        longest = max(len(tok(text)["input_ids"]) for text in (fact.text, *fact.paraphrases, *fact.neighborhood))
        target = max(len(access.target_ids(tok, text)) for text in (fact.target_new, fact.target_true))
        return 2 * (1 + len(fact.paraphrases) + len(fact.neighborhood)) * (longest + target)


def scaled(timings: Sequence[Timing], cost: Callable[[int], float], n: int) -> Timing:
    """What all n facts would take, from the first ones' timings: seconds are as ``cost(i)`` of fact i.

    timings: of facts 0, 1, ...
    """
    share = sum(map(cost, range(n))) / sum(cost(i) for i in range(len(timings)))
    return Timing(None, share * sum(t.cpu for t in timings), share * sum(t.wall for t in timings))


@contextmanager
def second_projection(model: nn.Module, n_rows: int) -> Iterator[None]:
    """While open, logits of the first n_rows rows come from a second pass of the last layer's output through norm and
    head, at all positions; the others are the model's own, which are computed for all rows all the same. 0: nothing."""
    if not n_rows:
        yield
        return
    seen: list[Tensor] = []

    def project(module, args, output):
        normed = model.get_submodule(access.paths(model).norm)(seen.pop()[:n_rows])
        output.logits = torch.cat([model.get_output_embeddings()(normed), output.logits[n_rows:]])
        return output

    last = access.site_module(model, len(access.layers(model)) - 1, "layer_out")
    handle = model.register_forward_hook(project)
    try:
        with access.changing([(last, lambda hidden: seen.append(hidden) or hidden)]):
            yield
    finally:
        handle.remove()


@contextmanager
def written(model: nn.Module, layer: int, delta: Tensor) -> Iterator[None]:
    """While open, Δ [d, d_ff] is in the layer's down projection; the weight is put back bit for bit."""
    down = access.site_module(model, layer, "mlp_out")
    kept = down.weight.detach().clone()
    access.add_delta(down, delta)
    try:
        yield
    finally:
        with torch.no_grad():
            down.weight.copy_(kept)


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Right-padded ids and mask; ids behind an end are read by nobody."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }
