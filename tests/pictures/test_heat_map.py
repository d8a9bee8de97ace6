"""A page's heat map: a cell says what it is without a script, on every screen, whatever the prompt holds."""

import re

import numpy as np
import pytest

from kedit_fast.pictures.heat_map import SHADES, HeatMap, map_style
from kedit_fast.pictures.page import Section, render_report
from kedit_fast.pictures.terminal import STOPS
from tests.pictures.test_page import Page

EVIL = "<script>alert(\"1\")</script> & <b>'x'"


def heat_map(shares=((0.0, 0.5, 1.0), (float("nan"), -2.0, 9.0)), kind="mlp", name="m", **changes) -> HeatMap:
    shares = np.array(shares)
    says = [[f"row {r}, layer {c}" for c in range(shares.shape[1])] for r in range(len(shares))]
    fields = {"labels": [f"row {r}" for r in range(len(shares))], "says": says, "ends": ("0.1", "0.9"), "strong": [1]}
    return HeatMap(name, kind, shares=shares, **fields | changes)


def page_of(*blocks) -> tuple[Page, str]:
    text = render_report("t", "f", [Section("h", blocks)])
    return Page(text), text


def test_each_cell_says_what_it_is():
    page, _ = page_of(heat_map(alt="what it shows"))
    cells = page.all("input")
    assert [cell["aria-label"] for cell in cells] == [f"row {r}, layer {c}" for r in range(2) for c in range(3)]
    assert {cell["type"] for cell in cells} == {"radio"} and not page.all("script")
    assert [cell["name"] for cell in cells] == ["m-0"] * 3 + ["m-1"] * 3, "Tab steps from row to row"
    assert next(a for a in page.all("div") if a["class"] == "cells")["aria-label"] == "what it shows"
    assert page.inside("p")[-2:] == ["0.1", "0.9"]


def test_shares_become_shades_and_no_number_becomes_none():
    page, _ = page_of(heat_map())
    shades, sides = zip(*(f"{cell['class']} ".split(" ")[:2] for cell in page.all("input")), strict=True)
    middle, last = (f"s{round(share * (SHADES - 1))}" for share in (0.5, 1))
    assert shades == ("s0", middle, last, "sx", "s0", last) and sides == ("", "", "r") * 2
    assert [a["class"] for a in page.all("span") if "class" in a][:3] == ["label", "label strong", "axis corner"]


@pytest.mark.parametrize("kind", STOPS)
def test_light_and_dark_scales_begin_near_their_paper(kind):
    style = map_style(heat_map(kind=kind).markup())
    colors = re.findall(rf"\.{kind} \.s(\d+){{background:#(\w{{6}})}}", style)
    assert [int(shade) for shade, _ in colors] == [*range(SHADES)] * 3  # light, dark, and light again on paper
    brightness = [sum(bytes.fromhex(color)) for _, color in colors]
    light, dark = brightness[:SHADES], brightness[SHADES : 2 * SHADES]
    assert light == sorted(light, reverse=True) and dark == sorted(dark)
    assert light[0] > 700 and dark[0] < 150
    assert all(f".{other} .s0" not in style for other in STOPS if other != kind)


def test_a_page_without_a_map_carries_no_style_of_maps():
    _, text = page_of("words", '<figure class="map mlp">')
    assert ".cells" not in text
    _, text = page_of(heat_map())
    assert ".cells" in text and "url(" not in text and "@import" not in text


def test_all_text_is_escaped():
    page, _ = page_of(heat_map(
        ((0.5,),), labels=[EVIL], says=[[EVIL]], ends=(EVIL, EVIL), measure=EVIL, caption=EVIL, alt=EVIL
    ))  # fmt: skip
    assert not page.all("script") and not page.all("b")
    assert page.all("input")[0]["aria-label"] == EVIL
    assert "".join(page.inside("figure")).count(EVIL) == 5


def test_an_axis_has_every_layer_in_it():
    for n_layers in (1, 4, 5, 12, 80):
        page, _ = page_of(heat_map(np.zeros((1, n_layers))))
        spans = [int(s) for a in page.all("span") for s in re.findall(r"--span:(\d+)", a.get("style", ""))]
        assert sum(spans) == n_layers and max(spans) <= 5
