"""Attribution: the first-order effect of putting another run's value at a place, for every place at once."""

import torch
from torch import Tensor

from kedit_fast.sweep.sites import Site


class Attribute:
    """``effects`` of an objective at sites of all layers, from one backward pass through a sweep with ``grad=True``.

    At place i and layer l:  ∇ objective · (value of from_run[i] - value of run[i]), both at pos[i]; the gradient is
    taken at the value of run[i].

    sites: of attn_out, mlp_out, layer_out; run, pos, from_run: [k]
    """

    def __init__(self, sites: tuple[Site, ...], n_layers: int, run: Tensor, pos: Tensor, from_run: Tensor):
        self._sites, self._n_layers, self.run, self.pos = sites, n_layers, run, pos
        places, self._source = torch.stack([from_run, pos], 1).unique(dim=0, return_inverse=True)
        self._source_run, self._source_pos = places.unbind(1)
        self._seen: dict[tuple[Site, int], list[tuple]] = {}

    def sites(self, layer):
        return (Site.embed, *self._sites) if layer == 0 else self._sites

    def reads(self, layer):
        return None  # a place in the last layer that nobody else reads has no effect

    def at(self, site, layer, x, call):
        if site is Site.embed:
            return x.detach().requires_grad_()
        if call.again:
            return x
        x.retain_grad()
        found = call.find(self.run, self.pos), call.find(self._source_run, self._source_pos)
        self._seen.setdefault((site, layer), []).append((x, *found))
        return x

    def effects(self, objective: Tensor) -> dict[Site, Tensor]:
        """{site: [n_layers, k]} fp32 on the CPU; ``objective`` is any tensor of what the sweep computed, summed."""
        objective.sum().backward()
        made = {site: torch.zeros(self._n_layers, len(self.run)) for site in self._sites}
        for (site, layer), calls in self._seen.items():
            made[site][layer] = self._effect(calls)
        self._seen.clear()
        return made

    def _effect(self, calls) -> Tensor:
        """[k] at one site of one layer; 0 where a place was not reached."""
        width, device = calls[0][0].shape[1], calls[0][0].device
        theirs = torch.zeros(len(self._source_run), width, device=device)
        mine, gradient = torch.zeros(2, len(self.run), width, device=device)
        for x, (which, row), (source, source_row) in calls:
            value = x.detach().float()
            theirs[source] = value[source_row]
            mine[which] = value[row]
            if x.grad is not None:
                gradient[which] = x.grad.float()[row]
        return (gradient * (theirs[self._source.to(device)] - mine)).sum(1).cpu()
