"""The checks of arguments: what they take, and in which words they refuse."""

from pathlib import Path

import numpy as np
import pytest

from kedit_fast.basics import checks
from kedit_fast.basics.checks import BadArgument


class Thing:
    pass


TAKEN = (
    (checks.whole, (3,), {}, 3),
    (checks.whole, (np.int32(3),), {"most": 3}, 3),
    (checks.seed, (2**32 - 1,), {}, 2**32 - 1),
    (checks.number, (np.float32(0.5),), {"above": 0}, 0.5),
    (checks.number, (2,), {}, 2),
    (checks.share, (1,), {}, 1.0),
    (checks.flag, (np.bool_(False),), {}, False),
    (checks.text, ("naïve",), {}, "naïve"),
    (checks.text, ("",), {"blank": True}, ""),
    (checks.choice, ("b",), {"known": ("a", "b")}, "b"),
    (checks.choices, ("b",), {"known": ("a", "b")}, ("b",)),
    (checks.choices, (["b", "a", "b"],), {"known": ("a", "b")}, ("b", "a")),
    (checks.path, ("x/y",), {}, Path("x/y")),
    (checks.path, (Path("x"),), {}, Path("x")),
    (checks.listed, ("x",), {"kinds": str, "wanted": "texts"}, ["x"]),
    (checks.listed, (("x", "y"),), {"kinds": str, "wanted": "texts"}, ["x", "y"]),
    (checks.listed, ((),), {"kinds": str, "wanted": "texts", "empty": True}, []),
    (checks.layers, (range(3, 6),), {"n_layers": 6}, (3, 4, 5)),
    (checks.layers, ((np.int64(7),),), {}, (7,)),
    (checks.size, ("8GB",), {}, 8 * 10**9),
    (checks.size, (" 1.5 gib ",), {}, 3 << 29),
    (checks.size, (2_000_000,), {}, 2_000_000),
    (checks.dtype, ("bf16",), {}, "bfloat16"),
    (checks.noise, ("u0.1",), {}, ("uniform", 0.1)),
    (checks.noise, (np.float32(0.5),), {}, ("gaussian", 0.5)),
)  # fmt: skip

REFUSED = (
    (checks.whole, (1.5,), {"least": 1, "like": 10}, "x = 1.5: expected a whole number of at least 1, e.g. 10"),
    (checks.whole, (True,), {}, "x = True: expected a whole number of at least 0, e.g. 0"),
    (checks.whole, (10**5000,), {"most": 4}, "x = a number of about 5001 digits: expected a whole number from 0 to 4"),
    (checks.whole, (np.zeros((2, 2)),), {}, "x = <ndarray>: expected a whole number"),
    (checks.whole, ("\x1b[31m",), {}, r"x = '\x1b[31m': expected"),
    (checks.seed, (-1,), {}, "x = -1: expected a whole number from 0 to 4294967295, e.g. 1"),
    (checks.seed, ("a",), {}, "x = 'a': expected a whole number"),
    (checks.number, (float("nan"),), {}, "x = nan: expected a finite number, e.g. 0.5"),
    (checks.number, (10**400,), {}, "expected a finite number"),
    (checks.number, (0,), {"above": 0}, "x = 0: expected a finite number above 0"),
    (checks.number, (3,), {"least": 0, "most": 1}, "x = 3: expected a finite number of at least 0 and of at most 1"),
    (checks.number, (True,), {}, "x = True: expected a finite number"),
    (checks.share, (90,), {}, "x = 90: expected a share from 0 to 1 (0.9, not 90)"),
    (checks.share, (1,), {"below_one": True}, "x = 1: expected a share from 0 to below 1"),
    (checks.flag, ("False",), {}, "x = 'False': expected True or False"),
    (checks.text, (None,), {"like": "Rome"}, "x = None: expected a text, e.g. 'Rome'"),
    (checks.text, (" ",), {}, "x is empty (' '); give it a text"),
    (checks.text, ("\ud800",), {}, "holds half a character"),
    (checks.choice, ("c",), {"known": ("a", "b")}, "x = 'c': expected one of a, b"),
    (checks.choices, (("a", "c"),), {"known": ("a", "b")}, "x = 'c': expected some of a, b"),
    (checks.choices, (5,), {"known": ("a", "b")}, "x = 5: expected some of a, b"),
    (checks.choices, ((),), {"known": ("a", "b")}, "x = (): expected some of a, b"),
    (checks.path, ("",), {}, "x = '': expected a path that names something"),
    (checks.path, ("a\0b",), {}, "expected a path that names something"),
    (checks.path, ("a text " * 40,), {}, "expected a path that names something, which is shorter"),
    (checks.path, ("x/" * 3000,), {}, "expected a path that names something, which is shorter"),
    (checks.path, (3,), {}, "x = 3: expected a path"),
    (checks.path, (b"x",), {}, "x = b'x': expected a path"),
    (checks.instance, (3,), {"kinds": Thing, "wanted": "a Thing; make one"}, "x = 3: expected a Thing; make one"),
    (checks.instance, (Thing,), {"kinds": Thing, "wanted": "a Thing"}, "expected a Thing"),
    (checks.listed, (3,), {"kinds": Thing, "wanted": "Things"}, "x = 3: expected Things"),
    (checks.listed, ([3],), {"kinds": Thing, "wanted": "Things"}, "x = 3: expected Things"),
    (checks.listed, ("xy",), {"kinds": str, "wanted": "texts", "alone": False}, "x = 'xy': expected texts"),
    (checks.listed, ((),), {"kinds": str, "wanted": "texts"}, "x is empty; expected texts"),
    (checks.layers, (range(4, 99),), {"n_layers": 30}, "x = 4-98: this model has layers 0 to 29"),
    (checks.layers, (range(10**12),), {}, "expected layers, whole numbers from 0 to 9999"),
    (checks.layers, ((1, -1),), {"n_layers": 30}, "x = (1, -1): this model has layers 0 to 29"),
    (checks.layers, ((0,),), {"n_layers": 0}, "this model has no layers"),
    (checks.layers, (3,), {}, "x = 3: expected layers"),
    (checks.layers, ("3-7",), {}, "x = '3-7': expected layers"),
    (checks.layers, ((),), {}, "x is empty; expected layers"),
    (checks.size, (8,), {"least": 10**6}, "x = 8: expected a size of at least 1MB: bytes, or a text"),
    (checks.size, (0,), {}, "x = 0: expected a size above 0"),
    (checks.dtype, ("int8",), {}, "x = 'int8': expected one of float32, bfloat16, float16, float64"),
    (checks.noise, ("t3",), {}, "x = 't3': expected a number from 0 on, \"s3\""),
    (checks.size, ("1e400",), {}, "x = '1e400': expected a size"),
    (checks.size, ("much",), {}, "x = 'much': expected a size"),
    (checks.size, (1e9,), {}, "expected a size"),
)  # fmt: skip


@pytest.mark.parametrize(("check", "given", "limits", "wanted"), TAKEN)
def test_what_is_taken_comes_back_as_the_package_works_with_it(check, given, limits, wanted):
    found = check("x", *given, **limits)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(("check", "given", "limits", "words"), REFUSED)
def test_what_is_refused_is_named_with_what_was_expected(check, given, limits, words):
    with pytest.raises(BadArgument) as refused:
        check("x", *given, **limits)
    assert words in str(refused.value) and len(str(refused.value)) < 250
    assert isinstance(refused.value, ValueError) and isinstance(refused.value, TypeError)


def test_none_is_taken_where_it_is_optional():
    assert checks.optional(checks.whole, "x", None, least=1) is None
    assert checks.optional(checks.whole, "x", 2, least=1) == 2
    with pytest.raises(BadArgument, match=r"x = 0: expected a whole number of at least 1, e\.g\. 1, or None"):
        checks.optional(checks.whole, "x", 0, least=1)


def test_values_are_short():
    assert len(checks.shown("x" * 10_000)) < 100 and len(checks.shown(list(range(10_000)))) < 100
    assert checks.shown(Thing()) == "<Thing>" and checks.shown(Path("x")) == repr(Path("x"))
