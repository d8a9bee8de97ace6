"""A model is one thread's at a time: what a sweep puts in place, every forward of the model would run."""

import sys
import threading

import pytest
import torch

import kedit_fast as kf
from kedit_fast.jobs.collect import GraphRows
from kedit_fast.model.seam import prepared
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.runs import RunList, add_sequences
from tests.conftest import tiny_lm
from tests.editors.cases import GROUPS

PROMPT = "The Space Needle is in"
FACT = kf.Fact("{} is in", "The Space Needle", "Rome", "Seattle")


def state(model):
    """What a sweep changes for its length."""
    flags = [(module.training, "forward" in vars(module), "_attn" in vars(module)) for module in model.modules()]
    return flags, [p.requires_grad for p in model.parameters()], model.config._attn_implementation


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_threads_wait_for_each_other(family):
    """78 of 300 answers were another thread's, and the model stayed changed."""
    lm = tiny_lm(family)
    lm.model.train()
    before = state(lm.model)
    edit = kf.Rome(layers=(1,), mom2_adjustment=False, v_num_grad_steps=3).edit(lm, FACT, contexts=GROUPS)
    views = {"bare": lm, "edited": lm.with_edit(edit)}
    wanted = {name: view.top_tokens(PROMPT) for name, view in views.items()}
    assert wanted["bare"] != wanted["edited"]
    wrong = []

    def ask(name):
        try:
            wrong.extend(1 for _ in range(25) if views[name].top_tokens(PROMPT) != wanted[name])
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=ask, args=(name,)) for name in views]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and state(lm.model) == before


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("around", [True, False])
def test_autograds_thread_goes_back_down_for_the_one_that_waits(family, around):
    """A GPU's autograd runs recomputed layers in a thread of its own, where context variables are empty."""
    lm = tiny_lm(family)
    runs = RunList()
    ids = lm.encode(PROMPT)
    number = add_sequences(runs, [ids])
    h = torch.randn(len(ids), lm.d_model, generator=torch.Generator().manual_seed(0)).requires_grad_()
    failed = []

    def down(loss):
        try:
            loss.backward()
        except Exception as error:
            failed.append(error)

    def up_and_down():
        job = GraphRows(lm.n_layers - 1, number, torch.tensor([len(ids) - 1]))
        sweep(lm, runs.runs(), [job], h=h, grad=True, recompute=True)
        thread = threading.Thread(target=down, args=(job.take().sum(),))
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), "it waits for the thread that waits for it"

    if around:
        with prepared(lm.model, lm.family):
            up_and_down()
    else:
        up_and_down()
    assert not failed and h.grad.isfinite().all() and h.grad.any()
