"""The rules of the house that a machine can check, see CONTRIBUTING.md.

Files are found by pattern, so a new module is under the rules from its first line. The scanners
are tested on examples of their own at the end: a scanner that finds nothing proves nothing.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PACKAGE = ROOT / "cactus_edge"
MAX_LINES = 450

# What only steers a search: floats are its trade, and nothing it says is believed.
STEERING = {"ascent.py", "branching.py", "finder.py", "lp.py"}
CERTIFIED = sorted(
    path
    for pattern in (
        "semantics.py",
        "lookups.py",
        "operators.py",
        "tables.py",
        "profile_table.py",
        "profiles.py",
        "check*.py",
        "certify/**/*.py",
    )
    for path in PACKAGE.glob(pattern)
    if path.name not in STEERING and not path.name.startswith("attack_")
)
SHIPPED = sorted(
    path for folder in ("cactus_edge", "firmware_sim") for path in (ROOT / folder).rglob("*.py")
)
SOURCES = sorted([*SHIPPED, *(ROOT / "tools").rglob("*.py")])

# What the independent checker may load of this package: its trusted base.
CHECKER_MODULES = {
    "certificate",
    "certificate_stream",
    "check",
    "check_backward",
    "check_bounds",
    "check_head",
    "check_linear",
    "check_margin",
    "check_sample",
    "check_stairs",
    "constraints",
    "constraints_imported",
    "datasets",
    "decision",
    "errors",
    "exact",
    "files",
    "flatbuffer",
    "graph",
    "inputs",
    "lookups",
    "operators",
    "profile_table",
    "profiles",
    "proofs",
    "scales",
    "semantics",
    "specification",
    "tables",
    "universal",
    "vnnlib",
}
CHECKER_FORBIDDEN_LIBRARIES = {"llvmlite", "numba", "torch"}

FLOAT_NAMES = {
    "complex",
    "float",
    "float16",
    "float32",
    "float64",
    "floating",
    "longdouble",
    "true_divide",
}
# As a variable, `double` may well mean double rounding.
FLOAT_ATTRIBUTES = FLOAT_NAMES | {"double", "single"}
EXEMPTION = re.compile(r"#\s*(?:float|exact):\s*(\S.*)?$")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run(*command: str | Path) -> str:
    """What a command prints, run in the root of the repository; it has to succeed."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def float_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and description of everything that can make a floating-point number."""
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=float() | complex()):
                yield node.lineno, f"literal {node.value}"
            case ast.Constant(value=str(text)) if text in FLOAT_NAMES:
                yield node.lineno, f"dtype {text!r}"
            case ast.BinOp(op=ast.Div()) | ast.AugAssign(op=ast.Div()):
                yield node.lineno, "true division"
            case ast.Name(id=name) if name in FLOAT_NAMES:
                yield node.lineno, f"name {name}"
            case ast.Attribute(attr=name) if name in FLOAT_ATTRIBUTES:
                yield node.end_lineno or node.lineno, f"name {name}"
            case ast.ImportFrom(names=aliases):
                for alias in aliases:
                    if alias.name in FLOAT_NAMES:
                        yield alias.lineno, f"import of {alias.name}"


def exempt_lines(source: str, tree: ast.AST) -> dict[int, set[int]]:
    """For each `# float: reason` or `# exact: reason` comment its line and the lines it covers.

    `exact` is for the quotients of Fractions, which only look like floats. The comment
    covers the line it ends; on the line of a `def` it covers the function.
    """
    functions = {
        node.lineno: set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    covered: dict[int, set[int]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (match := EXEMPTION.search(token.string)):
            line = token.start[0]
            assert match.group(1), f"line {line}: write the reason after the colon"
            covered[line] = functions.get(line, {line})
    return covered


def float_violations(source: str) -> list[str]:
    """Floating point without an exemption, and exemptions without floating point."""
    tree = ast.parse(source)
    exemptions = exempt_lines(source, tree)
    allowed = set().union(*exemptions.values())
    uses = sorted(set(float_uses(tree)))
    used = {line for line, _ in uses}
    stale = [line for line, covered in exemptions.items() if not covered & used]
    return [
        *(f"line {line}: {what}" for line, what in uses if line not in allowed),
        *(f"line {line}: exempt, but no float" for line in stale),
    ]


def banned_uses(source: str) -> list[str]:
    """Deserialisers that run code, and arithmetic that the compiler may rearrange."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                modules = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module)):
                modules = [module]
            case _:
                modules = []
        found += [f"import {m}" for m in modules if m.split(".")[0] in {"pickle", "cloudpickle"}]
        match node:
            case ast.keyword(arg="fastmath") | ast.Constant(value="fastmath"):
                found.append("fastmath")
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found.append("allow_pickle=True")
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save" as name):
                found.append(f"torch.{name}")
    return found


def test_imports_go_downwards() -> None:
    run(BIN / "lint-imports", "--no-cache")


def test_checker_loads_its_trusted_base_alone() -> None:
    program = "import sys, cactus_edge.check; print(*sorted(sys.modules))"
    loaded = run(sys.executable, "-c", program).split()
    own = {name.split(".")[1] for name in loaded if name.startswith("cactus_edge.")}
    assert own <= CHECKER_MODULES
    assert not {name.split(".")[0] for name in loaded} & CHECKER_FORBIDDEN_LIBRARIES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_can_be_read_in_one_sitting(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines; split it by responsibility"


@pytest.mark.parametrize("path", CERTIFIED, ids=name_of)
def test_certified_module_has_no_floating_point(path: Path) -> None:
    assert float_violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_uses_nothing_banned(path: Path) -> None:
    assert banned_uses(path.read_text(encoding="utf-8")) == []


def test_operator_manual_is_what_the_docstrings_say(tmp_path: Path) -> None:
    written = tmp_path / "operators.md"
    run(BIN / "cactus-edge", "supported-ops", "--write", written)
    manual = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    assert manual == written.read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = 3 // 2 + (7 >> 1)", []),
        ("a = 0.5", ["line 1: literal 0.5"]),
        ("a = 1e3", ["line 1: literal 1000.0"]),
        ("a = b / c", ["line 1: true division"]),
        ("a /= c", ["line 1: true division"]),
        ("a = np.float32(b)", ["line 1: name float32"]),
        ("a = x.astype('float64')", ["line 1: dtype 'float64'"]),
        ("def f(x: float): ...", ["line 1: name float"]),
        ("from numpy import float32", ["line 1: import of float32"]),
        ('"""The float in prose."""', []),
        ("double = 2 * single", []),
        ("a = np.double(b)", ["line 1: name double"]),
        ("a = b / c  # float: only a progress report", []),
        ("a = Fraction(b) / c  # exact: a Fraction", []),
        ("def f(b, c):  # float: a progress report\n    return b / c", []),
        ("a = b // c  # float: stale", ["line 1: exempt, but no float"]),
        ("a = b  # float: x\nc = d / e", ["line 2: true division", "line 1: exempt, but no float"]),
    ],
)
def test_float_scanner(source: str, expected: list[str]) -> None:
    assert float_violations(source) == expected


def test_float_scanner_asks_for_a_reason() -> None:
    with pytest.raises(AssertionError, match="write the reason"):
        float_violations("a = b / c  # float:")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import json, pickle", ["import pickle"]),
        ("from pickle import load", ["import pickle"]),
        ("njit(fastmath=True)", ["fastmath"]),
        ("options = {'fastmath': True}", ["fastmath"]),
        ("np.load(path, allow_pickle=True)", ["allow_pickle=True"]),
        ("np.load(path, allow_pickle=False)", []),
        ("state = torch.load(path)", ["torch.load"]),
        ("state = safetensors.torch.load_file(path)", []),
    ],
)
def test_banned_scanner(source: str, expected: list[str]) -> None:
    assert banned_uses(source) == expected


def test_patterns_find_the_certified_modules() -> None:
    names = {name_of(path) for path in CERTIFIED}
    assert {"cactus_edge/semantics.py", "cactus_edge/profiles.py", "cactus_edge/check.py"} <= names
    assert any(name.startswith("cactus_edge/certify/") for name in names)


def test_links_between_documents_lead_somewhere() -> None:
    pages = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "SECURITY", "CONTRIBUTING")]
    pages += [page for folder in ("docs", "models") for page in (ROOT / folder).rglob("*.md")]
    dead = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert len(pages) > 20 and not dead
