"""Where weights go: by arithmetic, before any of them is read, and as the sources then do it."""

import pytest
import torch

import kedit_fast as kf
from kedit_fast.model import placement
from kedit_fast.model.host import Host
from kedit_fast.model.placement import Placement, host_memory, place
from kedit_fast.model.shape import OnPaper, shape_of
from tests.conftest import least_memory, on_disk, refused, save_tiny
from tests.tiny import tiny_model

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("placed"), tiny_model("llama", layers=8))


@pytest.fixture(scope="module")
def shape():
    return shape_of(tiny_model("llama", layers=8).config)


def test_three_quarters_may_be_weights(folder, shape):
    whole = -(-shape.n_bytes * 4 // 3)
    for memory, source in ((whole, "resident"), (whole - 2, "disk"), (None, "resident")):
        lm = kf.open_model(folder, memory=memory)
        assert lm.source.name == lm.placement.source == source
        assert lm.memory == lm.placement.work == (4 << 30 if memory is None else memory - lm.placement.weights)
    assert kf.open_model(folder, memory="1GB").memory == 10**9 - shape.n_bytes


def test_what_is_held_is_what_was_planned(folder, shape):
    lm = on_disk(folder)
    assert lm.placement.weights == shape.around + 2 * shape.layers[0]
    assert lm.placement.pass_bytes == sum(shape.layers)
    held = sum(p.nbytes for p in lm.model.parameters() if not p.is_meta)
    gaps = 2 * 256 * len(list(lm.source.layers[0].parameters()))  # for the alignment of each tensor
    assert held + lm.source.ring_bytes <= lm.placement.weights + gaps


def test_too_little_is_refused_with_what_is_needed(folder):
    least = least_memory(folder)
    kf.open_model(folder, memory=least)
    says = r"memory = \d+: layer by layer this model needs .* kB at least: .* around its layers, .* for 2 layers, and a"
    refused(says, kf.open_model, folder, memory=least - 2)


def test_for_a_gpu_layers_lie_in_host_memory_where_that_holds_them_all(shape):
    one, memory = shape.layers[0], int(2 * (shape.around + 3.5 * shape.layers[0]))
    found = place(shape, memory, GPU, host=10 * shape.n_bytes)
    assert (found.source, found.keep) == ("host", 1)  # half the memory holds what is around, the ring and one more
    assert found.weights == shape.around + 3 * one and found.work == memory - found.weights
    assert found.pass_bytes == 7 * one and found.beside == int(0.15 * 10 * shape.n_bytes)
    assert found.on_paper().source == OnPaper(False, 7 * one, found.beside)
    assert place(shape, memory, GPU, host=sum(shape.layers)).source == "disk"
    assert place(shape, memory, CPU, host=10 * shape.n_bytes).source == "disk"


def test_layers_that_stay_are_the_highest(folder):
    disk = on_disk(folder)
    source = Host(disk.source, keep=place(disk.placement.shape, 10**6, GPU, host=10**9).keep)
    assert source.kept and sorted(source.kept) == list(range(8 - len(source.kept), 8))


def test_a_container_s_limit_is_host_memory(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(placement, "CONTAINER_LIMITS", (tmp_path / "none", tmp_path / "gone"))
    assert host_memory() > 10**8
    monkeypatch.setattr(placement, "CONTAINER_LIMITS", (tmp_path / "none", tmp_path / "limit"))
    assert host_memory() == 123456


def test_it_says_what_goes_where(shape):
    text = str(place(shape, 4 * shape.n_bytes // 3 + 2, CPU))
    assert text.splitlines()[0].startswith("weights") and "all weights" in text
    text = str(Placement(shape, "host", 10**6, 1, 2, keep=2))
    assert "8 layers of" in text and "for the 2 highest, which stay" in text and "from host memory" in text
