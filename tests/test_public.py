"""What is public is listed, exists, is documented, and has the parameters that it documents."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cactus_edge

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for name in ("cactus_edge", "firmware_sim") for p in (ROOT / name).rglob("*.py"))
LISTED = re.findall(
    r"^\| `([\w.]+)` \|", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.MULTILINE
)
CLASSES = {
    found
    for path in SOURCES
    for found in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def section(text: str, title: str) -> list[str]:
    """The names that a section of a docstring in Google's style describes."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    return re.findall(r"^    (\*{0,2}[\w.]+)(?: \(.*?\))?:", found[1] if found else "", re.M)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    given = node.args
    stars = {argument.arg for argument in (given.vararg, given.kwarg) if argument is not None}
    plain = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
    return plain | stars


def attributes(node: ast.ClassDef) -> set[str]:
    """Fields, properties, and what methods set of themselves."""
    found: set[str] = set()
    for part in ast.walk(node):
        match part:
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.FunctionDef(name=name):
                found.add(name)
            case ast.Assign(targets=targets):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
            case _:
                pass
    return found


def undocumented(source: str) -> Iterator[str]:
    """What docstrings describe and the code does not have."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Definition):
            continue
        text = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            known = attributes(node).union(*map(parameters, init))
            bases = [base for base in node.bases if ast.unparse(base) not in ("Protocol", "Struct")]
            described = section(text, "Attributes") if not bases else []
            described += section(text, "Args")
        else:
            known, described = parameters(node), section(text, "Args")
        yield from (
            f"line {node.lineno}: {node.name} has no {name}"
            for name in described
            if name.lstrip("*") not in known
        )
        for name in section(text, "Raises"):
            if name not in CLASSES and not hasattr(builtins, name):
                yield f"line {node.lineno}: {node.name} raises an unknown {name}"


def test_the_page_lists_every_module_with_public_names() -> None:
    defining = {
        module_of(path)
        for path in SOURCES
        if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(LISTED) == len(set(LISTED))
    assert set(LISTED) == defining


@pytest.mark.parametrize("name", LISTED)
def test_public_names_exist_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ and len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        value = getattr(module, public)
        assert not public.startswith("_") or public == "__version__"
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"


@pytest.mark.parametrize("name", LISTED)
def test_public_functions_are_typed(name: str) -> None:
    module = importlib.import_module(name)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
            assert not untyped, f"{name}.{public}: {untyped}"
            assert signature.return_annotation is not signature.empty, f"{name}.{public}"


def test_what_docstrings_describe_exists() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in SOURCES
        for text in undocumented(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


def test_lazy_names_are_those_of_their_modules() -> None:
    for name in cactus_edge.__all__:
        assert getattr(cactus_edge, name) is not None
    assert set(dir(cactus_edge)) == set(cactus_edge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cactus_edge.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(a, *, b):\n    """F.\n\n    Args:\n        a: x\n        b: y\n    """', []),
        ('def f(a):\n    """F.\n\n    Args:\n        c: x\n    """', ["line 1: f has no c"]),
        ('def f(*a):\n    """F.\n\n    Args:\n        *a: x\n    """', []),
        (
            'class A:\n    """A.\n\n    Attributes:\n        b: x\n        c: y\n    """\n'
            "    b: int\n",
            ["line 1: A has no c"],
        ),
        (
            'def f():\n    """F.\n\n    Raises:\n        DataError: x\n        NoError: y\n    """',
            ["line 1: f raises an unknown NoError"],
        ),
    ],
)
def test_the_scanner_finds_what_is_not_there(source: str, expected: list[str]) -> None:
    assert list(undocumented(source)) == expected
