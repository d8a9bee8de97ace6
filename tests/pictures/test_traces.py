"""Pictures of traces: the published conventions, hostile tokens, files, and maps that fit a terminal."""

import base64
import io
import re
import struct
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Console

from kedit_fast.facts.fact import Fact
from kedit_fast.pictures import figure as drawing
from kedit_fast.pictures import traces as plots
from kedit_fast.pictures.labels import ROLES, model_label, within
from kedit_fast.pictures.terminal import TerminalHeatMap
from kedit_fast.tracing.results import AverageTrace, TraceResult, average
from tests.compare import refused

TOKENS = ("The", " Eiffel", " Tower", " is", " in")


def make(kind="state", layers=12, tokens=TOKENS, span=(0, 3), **changes) -> TraceResult:
    """A trace of random numbers with its highest cell at the last subject token, layer 4."""
    values = np.random.RandomState(len(tokens)).uniform(0.1, 0.5, (len(tokens), layers)).astype(np.float32)
    values[span[1] - 1, min(4, layers - 1)] = 0.6
    fields = {
        "fact": Fact("{} is in", "The Eiffel Tower"), "tokens": tokens, "subject_span": span, "answer_id": 7,
        "answer": " Paris", "kind": kind, "window": 1 if kind == "state" else 10, "noise": 0.1, "metric": "prob",
        "sever": None, "p_clean": 0.7, "p_corrupted": 0.2, "p_restored": values,
    }  # fmt: skip
    return TraceResult(**fields | changes)


def map_of(figure, panel=0):
    return figure.axes[panel].collections[0]


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def png_size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize(
    "model, shown",
    [
        ("smollm2", "smollm2"), ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"), ("/llms/llama-8b/", "llama-8b"),
        ("./llama", "llama"), ("~/models/llama", "llama"), ("a/b/llama", "llama"), ("C:\\models\\llama", "llama"),
        ("/", "/"), ("", ""),
    ],
)  # fmt: skip
def test_a_folder_is_shown_without_its_path(model, shown):
    assert model_label(model) == shown
    assert within("layer", model) == (f"layer within {shown}" if model else "layer")


# ---- figures


@pytest.mark.parametrize(
    "kind, colors, title, label",
    [
        ("state", "Purples", "state", "single restored layer within SmolLM2"),
        ("mlp", "Greens", "MLP", "center of interval of 10 restored MLP layers within SmolLM2"),
        ("attn", "Reds", "attention", "center of interval of 10 restored attention layers within SmolLM2"),
    ],
)
def test_a_trace_is_drawn_in_the_published_conventions(kind, colors, title, label):
    result = make(kind)
    figure = plots.plot_trace(result, model="SmolLM2")
    axes, bar = figure.axes
    assert map_of(figure).get_cmap().name == colors
    assert map_of(figure).get_clim() == (result.p_corrupted, pytest.approx(0.6))
    np.testing.assert_array_equal(np.reshape(map_of(figure).get_array(), (5, 12)), result.p_restored)
    assert axes.get_ylim() == (5, 0)
    assert axes.get_xlim() == (0, 12)
    assert texts(axes.get_yticklabels()) == ["The*", "·Eiffel*", "·Tower*", "·is", "·in"]
    assert texts(axes.get_xticklabels()) == ["0", "5", "10"]
    assert list(axes.get_xticks()) == [0.5, 5.5, 10.5]
    assert axes.get_title("left") == f"Impact of restoring {title} after corrupted input"
    assert axes.get_xlabel() == label
    assert bar.get_title() == "p(Paris)"


@pytest.mark.parametrize("layers", [12, 30])
def test_what_a_strided_trace_says_of_itself_stays_inside_the_picture(layers):
    figure = plots.plot_trace(make("attn", layers=layers, exact=np.ones((5, layers), dtype=bool), stride=5))
    title = figure.axes[0].get_title("left")
    assert " ".join(title.split()).endswith("(each noise draw at one layer in 5, interpolated between)")
    figure.canvas.draw()
    (shown,) = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() == title]
    box = shown.get_window_extent()
    assert box.x0 > 0 and box.x1 < figure.bbox.x1 and box.y1 < figure.bbox.y1


def test_the_scale_begins_at_zero_and_holds_the_whole_effect_when_normalized():
    figure = plots.plot_trace(make(), normalized=True)
    assert map_of(figure).get_clim() == (0, 1)
    assert np.max(map_of(figure).get_array()) == pytest.approx((0.6 - 0.2) / (0.7 - 0.2))
    over = plots.plot_trace(make(p_clean=0.4), normalized=True)
    assert map_of(over).get_clim() == (0, pytest.approx(2.0))
    refused("no effect to normalize", plots.plot_trace, make(p_clean=0.2), normalized=True)


@pytest.mark.parametrize("metric, name", [("logprob", "log p(Paris)"), ("logit_diff", "logit\ndifference\n(Paris)")])
def test_the_color_bar_names_the_metric_and_the_title_what_was_severed(metric, name):
    figure = plots.plot_trace(make(metric=metric, p_corrupted=-2.0, p_clean=1.0))
    assert figure.axes[1].get_title() == name
    assert map_of(figure).get_clim()[0] == -2.0
    severed = plots.plot_trace(make(sever="mlp"))
    assert severed.axes[0].get_title("left") == "Impact of restoring state with MLP severed"


@pytest.mark.parametrize("rounding", [0.0, 1e-8])
def test_a_trace_without_effect_is_all_of_the_lightest_color(rounding):
    flat = make(p_restored=np.full((5, 12), 0.2 + rounding))
    low, high = map_of(plots.plot_trace(flat)).get_clim()
    assert low == 0.2 and high == pytest.approx(0.21)
    assert png_size(drawing.figure_png(plots.plot_trace(flat)))


def test_hostile_tokens_are_readable_and_never_taken_for_mathematics():
    tokens = ("\n", " \t", " $x_1$", "$\\frac{$", "a\u200bb", "", "é", " " + "long" * 20)
    figure = plots.plot_trace(make(tokens=tokens, span=(2, 4), answer=" $a_b$"))
    labels = texts(figure.axes[0].get_yticklabels())
    assert labels == ["↵", "·⇥", "·$x_1$*", "$\\frac{$*", "a\\u200bb", "(empty)", "é", "·longlonglonglonglon.."]
    assert png_size(drawing.figure_png(figure))  # "$\frac{$" would not parse


def test_kinds_share_one_scale_and_name_the_tokens_once():
    results = [make("state"), make("mlp", p_restored=make().p_restored / 2), make("attn")]
    figure = plots.plot_kinds(results, model="SmolLM2")
    panels = figure.axes[:3]
    assert [axes.get_title("left") for axes in panels] == ["restoring state", "restoring MLP", "restoring attention"]
    assert [map_of(figure, i).get_clim() for i in range(3)] == [(0.2, pytest.approx(0.6))] * 3
    assert [map_of(figure, i).get_cmap().name for i in range(3)] == ["Purples", "Greens", "Reds"]
    assert "The Eiffel Tower is in" in figure.get_suptitle()
    assert [axes.yaxis.get_tick_params()["labelleft"] for axes in panels] == [True, False, False]


def test_kinds_of_several_facts_or_of_none_are_refused():
    refused("plot_kinds shows one fact", plots.plot_kinds, [make(), make(fact=Fact("{} is in", "Rome"))])
    refused("no trace results", plots.plot_kinds, [])


def averaged() -> AverageTrace:
    mean = np.random.RandomState(0).uniform(-0.05, 0.3, (6, 12)).astype(np.float32)
    stderr = np.full((6, 12), 0.01, dtype=np.float32)
    mean[0, 0], mean[1], stderr[1] = -0.04, np.nan, np.nan
    counts = np.array([40, 0, 40, 40, 1234, 40])
    return AverageTrace(mean, stderr, counts, n_facts=40, kind="mlp", metric="prob", total_effect=0.5)


def test_an_average_has_six_rows_clipped_at_zero_and_blanks_a_role_nobody_has():
    given = averaged()
    figure = plots.plot_average(given)
    cells = np.ma.reshape(map_of(figure).get_array(), (6, 12))
    assert map_of(figure).get_clim()[0] == 0
    assert cells.mask.all(axis=1).tolist() == [False, True, False, False, False, False]
    np.testing.assert_array_equal(cells[0], np.clip(given.mean[0], 0, None))
    labels = texts(figure.axes[0].get_yticklabels())
    assert [label.split(" (")[0] for label in labels] == list(ROLES)
    assert labels[1] == "middle subject tokens (n = 0)" and labels[4] == "further tokens (n = 1,234)"


def test_the_band_of_the_last_subject_token_is_95_percent_wide():
    given = averaged()
    below = plots.plot_average(given).axes[1]
    np.testing.assert_array_equal(below.lines[0].get_ydata(), given.mean[2])
    assert texts(below.get_legend().get_texts()) == ["last subject token", "last token"]
    edge = below.collections[0].get_paths()[0].vertices
    at_layer_3 = edge[np.isclose(edge[:, 0], 3.5), 1]
    assert at_layer_3.min() == pytest.approx(given.mean[2, 3] - 1.96 * 0.01, abs=1e-6)
    assert at_layer_3.max() == pytest.approx(given.mean[2, 3] + 1.96 * 0.01, abs=1e-6)


def test_the_average_of_one_trace_is_drawn_without_bands():
    figure = plots.plot_average(average([make(span=(4, 5))])["state"])
    assert png_size(drawing.figure_png(figure))
    assert figure.axes[1].get_legend().get_title().get_text() == ""


# ---- files and pages


def test_png_has_the_size_of_the_figure_and_the_same_bytes_whatever_the_callers_style():
    figure = plots.plot_trace(make())
    png = drawing.figure_png(figure)
    assert png_size(png) == tuple(round(side * drawing.DPI) for side in figure.get_size_inches())
    with matplotlib.rc_context({"savefig.bbox": "tight", "text.color": "red", "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        assert drawing.figure_png(plots.plot_trace(make())) == png
        assert dict(matplotlib.rcParams) == before


def test_files_are_written_by_their_suffix(tmp_path):
    result = make()
    figure = plots.plot_trace(result, tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes() == drawing.figure_png(figure)
    for drawn in (plots.plot_kinds([result] * 3), plots.plot_average(averaged())):
        assert drawing.figure_png(drawn) == drawing.figure_png(drawn)
    plots.plot_kinds([result], tmp_path / "trace.pdf")
    assert (tmp_path / "trace.pdf").read_bytes().startswith(b"%PDF")
    plots.plot_average(averaged(), str(tmp_path / "average.svg"))
    assert "<svg" in (tmp_path / "average.svg").read_text()
    result.plot(tmp_path / "method.png")
    assert png_size((tmp_path / "method.png").read_bytes())


def test_html_is_one_image_that_holds_its_data_and_says_what_it_shows():
    result = make(fact=Fact('{} "is" in <a & b>', "The Eiffel Tower"))
    page = drawing.figure_html(plots.plot_trace(result))
    alt, data = re.fullmatch(r'<img alt="([^"<>]*)" .*src="data:image/png;base64,([^"]*)">', page).groups()
    assert "&lt;a &amp; b&gt;" in alt and "5 tokens by 12 layers" in alt
    assert "highest 0.600 at token &#x27; Tower&#x27;, layer 4" in alt
    width, height = png_size(base64.b64decode(data))
    assert f'width="{width // 2}" height="{height // 2}"' in page
    assert result._repr_html_().startswith("<img ") and averaged()._repr_html_().startswith("<img ")


def test_a_figure_from_elsewhere_is_described_by_its_titles():
    figure = Figure()
    assert drawing.figure_alt(figure) == "figure"
    figure.subplots().set_title("Loss by step")
    assert drawing.figure_alt(figure) == "Loss by step"
    refused("is no PNG", drawing.png_html, b"GIF89a", "alt")


def test_pyplot_is_never_imported():
    code = (
        "import sys, tests.pictures.test_traces as t; from kedit_fast.pictures import traces as plots; r = t.make();"
        " t.drawing.figure_html(plots.plot_trace(r)); plots.plot_kinds([r]); plots.plot_average(t.averaged());"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# ---- the terminal


def rows_of(text: str, n_tokens: int) -> list[str]:
    """The lines of the tokens: those between the layer axis and the scale."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("layer "))
    assert lines[start + 1 + n_tokens].lstrip().startswith("scale ")
    return lines[start + 1 : start + 1 + n_tokens]


def printed(renderable, **options) -> str:
    out = io.StringIO()
    Console(file=out, **{"width": 90, "force_terminal": True} | options).print(renderable)
    return out.getvalue()


@pytest.mark.parametrize("layers", [1, 5, 12, 30, 48, 80, 126])
@pytest.mark.parametrize("width", [40, 57, 80, 100])
def test_the_terminal_map_has_one_line_a_token_and_fits(width, layers):
    tokens = ("東京都庁舎は高い塔であるとされる", " Tower" * 9, "\n", "$x$", " of")
    said = {"metric": "logit_diff", "p_corrupted": -1234.5, "answer": " 東京都庁"}
    result = make(layers=layers, tokens=tokens, span=(0, 2), **said)
    for terminal in (False, True):
        text = printed(TerminalHeatMap(result), width=width, force_terminal=terminal)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert len(rows_of(plain, 5)) == 5
        assert max(map(cell_len, plain.splitlines())) <= width


def test_the_darkest_character_stands_at_the_highest_cell_under_its_layer():
    text = str(TerminalHeatMap(make(layers=30)))
    line = rows_of(text, 5)[2]
    axis = next(line for line in text.splitlines() if line.lstrip().startswith("layer "))
    assert line.startswith(" ·Tower* ") and line.endswith(" 0.600")
    assert line.index("@@") == axis.index(" 5 ") + 1 - 2  # layer 4: a cell of two columns before layer 5
    assert sum(row.count("@@") for row in rows_of(text, 5)) == 1
    assert "highest of" not in text and "scale 0.200" in text


def test_pooling_keeps_the_highest_layer_and_says_so():
    text = str(TerminalHeatMap(make(layers=80)))
    assert "a column: highest of 2 layers" in " ".join(text.split())
    start = rows_of(text, 5)[0].index("*") + 2
    assert rows_of(text, 5)[2][start:].index("@") == 2  # layer 4 of pairs


def test_values_below_the_corrupted_run_and_a_flat_trace_are_blank():
    flat = make(p_restored=np.full((5, 12), 0.2, dtype=np.float32))
    assert all(set(row[8:-6]) == {" "} for row in rows_of(str(TerminalHeatMap(flat)), 5))


def test_color_where_the_console_has_it_and_characters_where_not():
    result = make("mlp")
    colored = printed(TerminalHeatMap(result), color_system="truecolor")
    assert "\x1b[48;2;0;68;27m" in colored and "@" not in colored  # the darkest of the greens
    for options in ({"no_color": True}, {"force_terminal": False}):
        plain = printed(TerminalHeatMap(result), **options)
        assert "\x1b" not in plain and "@@" in plain


def test_a_console_without_unicode_gets_ascii():
    class Latin(io.StringIO):
        encoding = "ascii"

    out = Latin()
    Console(file=out, width=80).print(TerminalHeatMap(make(tokens=("é", " 東", "\n", " is", " in"))))
    text = out.getvalue()
    assert text.isascii()
    assert "_is" in text and "\\n" in text
