"""Reading rows: what was read is the site's value, and what nobody read shows."""

from types import SimpleNamespace

import torch

from kedit_fast.jobs.collect import Collect
from kedit_fast.sweep.sites import Site


def test_a_place_that_nobody_read_is_nan():
    job = Collect(Site.mlp_key, [2], torch.tensor([0, 1, 2]), torch.tensor([4, 4, 4]))
    assert job.sites(2) == (Site.mlp_key,) and job.sites(1) == () and job.reads(1) is None
    x = torch.arange(6.0).view(2, 3)
    call = SimpleNamespace(find=lambda run, pos: (torch.tensor([2]), torch.tensor([1])))
    job.at(Site.mlp_key, 2, x, call)
    assert torch.equal(job.values[2][2], x[1])
    assert job.values[2][:2].isnan().all()
