"""The pages of docs/: every block runs on a tiny model, every public name is in the API, the site builds without a
warning."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import kedit_fast as kf
from bench.__main__ import BENCHES
from kedit_fast.commands import cli
from tests.conftest import save_tiny, tiny_lm
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.S)
PARSED = ("torchrun", "srun", "export")  # lines that start other processes, or work for minutes
ELSEWHERE = ("vllm serve ", "python convert_hf_to_gguf.py ", "hf upload ")  # programs that are not here, or reach out
LESS = {
    "edit --facts": ["--corpus", "self", "--tokens", "200"],  # a tiny model's d_ff is 80; a real one refuses so few
    "gate": ["--no-builtin", "--generate", "2", "--context", "30"],
    "summary": ["--generate", "2"],
}


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with its own cache and a tiny model in ./llama, which "smollm2" opens too."""
    monkeypatch.setenv("KEDIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tiny_model("llama"))
    real = kf.open_model
    opened = {"smollm2": tiny_lm("llama")}
    monkeypatch.setattr(kf, "open_model", lambda name, **how: opened[name] if name in opened else real(name, **how))
    monkeypatch.setattr(kf, "BENCHMARKS", dict(kf.BENCHMARKS))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # a tiny model is warned of often
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, work, capsys):
    names: dict = {}
    for language, text in blocks(page):
        match language:
            case "python" if page.stem == "distributed":
                compile(text, page.name, "exec")  # several processes: tests/basics/test_ranks.py
            case "python":
                exec(compile(text, page.name, "exec"), names)
            case "json":
                (work / "facts.json").write_text(text, encoding="utf-8")
                assert kf.load_facts(work / "facts.json")
            case "bash":
                run_lines(text, capsys)
            case "console":
                look_at_lines(text, work)
            case _:
                raise AssertionError(f"{page.name}: a block of {language}, which nothing runs")


def look_at_lines(text: str, work: Path) -> None:
    """Lines that are shown and not run: of a benchmark, or of another program, on folders that the page has made."""
    if asked := re.findall(r"python -m bench ([a-z]+)", text):
        assert set(asked) <= {*BENCHES, "gpu", "report"}
        return
    for line in text.splitlines():
        if line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
            continue  # its first command
        assert line.startswith(ELSEWHERE), line
        made = re.findall(r"(?:^|[ =])\./(\S+)", line)
        assert made and all((work / folder).is_dir() for folder in made), f"{line}: names what the page has not made"


def run_lines(text: str, capsys) -> None:
    """Runs the commands of a block; a comment says an exit status other than 0."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    for line in lines:
        if line.startswith(PARSED):
            told = re.findall(r"(?:-m kedit_fast|kedit-fast) ([^'\n]*)", line)
            assert all(cli.build_parser().parse_args(shlex.split(each)).command for each in told)
            continue
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "kedit-fast", line
        wanted = re.search(r"# exit status: (\d)", line)
        less = (more for begin, more in LESS.items() if line.startswith(f"kedit-fast {begin} "))
        more = [] if "--init" in words else next(less, [])
        status = cli.main([*words[1:], *more])
        assert status == (int(wanted[1]) if wanted else 0), (line, capsys.readouterr().err)


def test_every_version_of_a_format_is_told():
    """A new one changes this page, which says what else is read; a reader of the old one comes with it."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "kedit_fast").rglob("*.py")))
    written = re.findall(r'^FORMAT, VERSION = "([\w.]+)", (\d+)', code, re.M)
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `([\w.]+)` \| (\d+) \|", page, re.M)) == sorted(written)
    without = re.findall(r'^FORMAT = "(kedit_fast\.[a-z_]+)"', code, re.M)
    assert without and all(f"`{name}`" in page for name in without)


def test_every_public_name_is_in_the_api_once():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    told = re.findall(r"(?:auto\w+:: |^`)kedit_fast\.(\w+)", text, re.M)
    assert sorted(told) == sorted(set(kf.__all__) - {"__version__"})


def test_the_site_builds_without_a_warning(tmp_path):
    run = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path / "site"]
    made = subprocess.run([*map(str, run), "-d", str(tmp_path / "trees")], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    page = (tmp_path / "site" / "api" / "editing.html").read_text(encoding="utf-8")
    assert "null space" in page and "kedit_fast.AlphaEdit" in page
