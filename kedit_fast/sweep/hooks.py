"""Where jobs see the rows inside a block: hooks on its modules for the length of one call, only where a job asked."""

from contextlib import ExitStack, contextmanager

from torch import Tensor

from kedit_fast.model.experts import is_experts, routed_keys
from kedit_fast.model.source import hidden
from kedit_fast.sweep.rows import Call
from kedit_fast.sweep.sites import INSIDE, Site


class Enough(Exception):
    """Leaves a block once everything that anybody wanted of this call has been seen."""


def through(jobs, site: Site, layer: int, x: Tensor, call: Call) -> Tensor:
    """The rows x as the jobs leave them, one job after the other."""
    for job in jobs:
        if site in job.sites(layer):
            out = job.at(site, layer, x, call)
            x = x if out is None else out
    return x


def last_read(jobs, layer: int) -> Site | None:
    """The last site inside the layer at which a job reads that wants rows of it: nobody looks at what follows. None
    where the layer's output is wanted."""
    if any(Site.layer_out in job.sites(layer) for job in jobs):
        return None
    read = {site for job in jobs if job.reads(layer) is not None for site in job.sites(layer)}
    return next((site for site in reversed(INSIDE) if site in read), None)


@contextmanager
def hooked(lm, jobs, layer: int, call: Call, final: Site | None):
    """Hooks on the layer's modules; behind ``final`` nobody looks."""
    wanted = {site for job in jobs for site in job.sites(layer)}

    def see(site, x):
        out = through(jobs, site, layer, x.squeeze(0), call)
        if site is final:
            raise Enough
        return out[None]  # also where nobody changed it: a gradient is taken of what the jobs saw

    def before(site):
        return lambda module, args: (see(site, args[0]), *args[1:])

    def routed(site):
        def hook(module, args):
            keys = routed_keys(module, *args)
            if through(jobs, site, layer, keys, call) is not keys:
                raise ValueError(
                    f"layer {layer} is a mixture of experts, whose keys are read and not written: choose mlp_out"
                )
            if site is final:
                raise Enough

        return hook

    def behind(site):
        def hook(module, args, out):
            seen = see(site, hidden(out))
            return (seen, *out[1:]) if isinstance(out, tuple) else seen

        return hook

    with ExitStack() as stack:
        for site in (site for site in INSIDE if site in wanted):
            name, is_input = INSIDE[site]
            module = lm.source.layers[layer].get_submodule(getattr(lm.family, name))
            if is_input:
                hook = (routed if is_experts(module) else before)(site)
                stack.callback(module.register_forward_pre_hook(hook).remove)
            else:
                stack.callback(module.register_forward_hook(behind(site)).remove)
        yield
