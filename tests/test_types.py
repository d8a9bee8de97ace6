"""What a type checker sees of the public names: all of them, and all of their parameters and results."""

import ast
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import pytest

import kedit_fast as kf

PACKAGE = Path(kf.__file__).parent


def homes() -> dict[str, str]:
    """{public name: its module} as ``__init__.py`` loads them."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "_HOME")
    return {name: f"kedit_fast.{module}" for name, module in ast.literal_eval(table).items()}


def test_a_checker_sees_the_public_names_where_they_are():
    nodes = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8")).body
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: (alias.name, node.module) for node in imports for alias in node.names}
    assert seen == {name: (name, module) for name, module in homes().items()}
    others = [ast.unparse(node) for node in nodes[1:] if node not in imports]  # the first is the docstring
    assert others == ["__version__: str"] and set(kf.__all__) == {"__version__", *seen}


def functions_of(kind: type) -> Iterator[tuple[str, Callable, bool]]:
    """(name, function, whether it takes an object or a class first) of the public methods and properties of a class
    and of those that it builds on."""
    for owner in (each for each in kind.__mro__ if each.__module__.startswith("kedit_fast")):
        generated = {"__init__"} if hasattr(owner, "__dataclass_fields__") else set()
        for name, value in vars(owner).items():
            if name in generated or (name.startswith("_") and name not in ("__init__", "__call__", "__add__")):
                continue
            where = f"{owner.__qualname__}.{name}"
            if isinstance(value, property):
                yield where, value.fget, True
            elif isinstance(value, cached_property):
                yield where, value.func, True
            elif isinstance(value, (staticmethod, classmethod)):
                yield where, value.__func__, isinstance(value, classmethod)
            elif inspect.isfunction(value):
                yield where, value, True


def bare(function: Callable, bound: bool) -> list[str]:
    """What of a function has no annotation: its parameters by name, "return"."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[bound:]
    found = [p.name for p in parameters if p.annotation is p.empty]
    return found + ["return"] * (signature.return_annotation is signature.empty)


@pytest.mark.parametrize("name", sorted(homes()))
def test_every_public_signature_is_annotated(name):
    value = getattr(kf, name)
    if isinstance(value, dict):  # of classes or objects that have tests of their own here, or fields
        functions = [each for one in value.values() if isinstance(one, type) for each in functions_of(one)]
    else:
        functions = functions_of(value) if isinstance(value, type) else [(name, value, False)]
    missing = {where: found for where, function, bound in functions if (found := bare(function, bound))}
    assert not missing, f"{name}: no annotation of {missing}"


def test_a_missing_annotation_would_be_seen():
    class Kind:
        __module__ = "kedit_fast.some"

        def __init__(self, a, b: int) -> None: ...

        @classmethod
        def of(cls, c): ...

        @property
        def size(self): ...

        @cached_property
        def large(self) -> bool: ...

        @staticmethod
        def plain(d) -> None: ...

        def _own(self, e): ...

    found = {where.split(".")[-1]: bare(function, bound) for where, function, bound in functions_of(Kind)}
    assert found == {"__init__": ["a"], "of": ["c", "return"], "size": ["return"], "large": [], "plain": ["d"]}
