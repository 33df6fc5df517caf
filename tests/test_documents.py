"""No code block of the documentation is unchecked: what can run runs, and all of it is parsed.

What does not run, and why, stands in ``stand_ins.NOT_RUN``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import documents
import pytest
import stand_ins
import typer
from documents import ROOT, Block, Command

from cactus_edge.cli import app, verbs
from cactus_edge.cli.ignored import refuse_ignored
from cactus_edge.csource import generate
from cactus_edge.errors import DataError
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.train.recipe import parse_recipe

PAGES = documents.pages()
BLOCKS = [block for page in PAGES for block in documents.blocks(page)]
RUN = [page for page in PAGES if any(block.runs for block in documents.blocks(page))]
VERBS = typer.main.get_command(app)
assert isinstance(VERBS, typer.core.TyperGroup)
PROGRAMS = {"cat", "cd", "cp", "dask", "ls", "mkdir", "scp", "sha256sum", "source", "ssh"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def parse(words: list[str]) -> None:
    """Parse a command line of ours without running it; every option and type has to be right.

    And heeded.
    """
    context = VERBS.make_context("cactus-edge", words[1:2])
    verb = VERBS.get_command(context, words[1])
    assert verb is not None, f"there is no verb {words[1]}"
    found = verb.make_context(words[1], words[2:], parent=context)
    refuse_ignored(words[1], verbs._given(found), found.params)


def check_command(text: str) -> None:
    """A command of a shell that need not run here: that it could."""
    inner = (
        text.split("; do\n")[1].removesuffix("done")
        if text.startswith("for ")
        else text.split("<<")[0]
    )
    for command in documents.joined(inner):
        program, *rest = documents.words(command.partition(" > ")[0])
        program = program.rpartition("/")[2].removesuffix("3")
        if program == "cactus-edge":
            parse([program, *rest])
        elif program == "make":
            targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(rest) <= set(targets) or rest[0] == "-C", command
        elif program == "pip":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = set(re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", command))))
            assert rest[0] == "install" and extras <= set(project["optional-dependencies"]), command
        elif program in ("python", "pytest"):
            files = [word for word in rest if word.endswith(".py")]
            assert all((ROOT / file).exists() for file in files), command
        else:
            assert program in PROGRAMS, f"{command}: nothing here knows how to check {program}"


def check_imports(block: Block) -> None:
    """Everything that a block imports exists."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name) is not None, f"{block}: {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            missing = [n.name for n in node.names if not hasattr(module, n.name)]
            assert not missing, f"{block}: {node.module} has no {missing}"


def merged(base: dict[str, object], more: dict[str, object]) -> dict[str, object]:
    result = dict(base)
    for key, value in more.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_known_language_and_mark(page: Path) -> None:
    for block in documents.blocks(page):
        assert not block.indented, f"{block}: put code between ``` lines, with its language"
        assert block.language in documents.LANGUAGES, f"{block}: language '{block.language}'"
        assert block.mark in ("", *documents.MARKS), f"{block}: mark '{block.mark}'"
    for code in documents.inline_code(page):
        if match := re.match(r"cactus-edge ([a-z-]+)", code):
            assert isinstance(VERBS, typer.core.TyperGroup)
            verb = VERBS.commands.get(match[1])
            assert verb is not None, f"{name_of(page)}: `{code}`: no such verb"
            known = {name for parameter in verb.params for name in parameter.opts} | {"--help"}
            assert set(re.findall(r"--[a-z-]+", code)) <= known, f"{name_of(page)}: `{code}`"


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_page_does_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for difference in documents.run(page, documents.Runner(page)):
        pytest.fail(f"{difference.block}: {difference.what}")


@pytest.mark.parametrize("block", [*of("bash"), *of("console")], ids=str)
def test_commands_parse(block: Block) -> None:
    subprocess.run(
        ["bash", "-n"],
        input="\n".join(command.text for command in documents.commands(block)),
        text=True,
        check=True,
    )
    for command in documents.commands(block):
        if block.stands_in or not block.runs:
            check_command(command.text)


def test_what_does_not_run_has_a_reason() -> None:
    """And no reason is left over."""
    used: set[tuple[str, str]] = set()
    for block in BLOCKS:
        if block.language not in ("bash", "console", "python"):
            continue
        texts = [block.text]
        if block.language != "python":
            texts = [command.text for command in documents.commands(block)]
        for text in texts:
            why = stand_ins.why_not(block.page, text)
            assert block.runs or why, f"{block}: does not run, for no reason: {text}"
            used |= {(name_of(block.page), why)} if why else set()
    reasons = {(page, why) for page, listed in stand_ins.NOT_RUN.items() for why in listed.values()}
    assert used == reasons


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_compiles_and_its_imports_exist(block: Block) -> None:
    compile(block.text, str(block), "exec")
    check_imports(block)


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_recipes_load(block: Block) -> None:
    import tomli_w

    base = tomllib.loads((ROOT / "recipes" / "digits.toml").read_text())
    parse_recipe(tomli_w.dumps(merged(base, tomllib.loads(block.text))), str(block))


@pytest.mark.parametrize("block", of("text"), ids=str)
def test_text_is_no_code(block: Block) -> None:
    assert not re.search(r"^\s*(\$|>>>|cactus-edge|make|pip|import|from) ", block.text, re.M), block


def test_c_compiles(tmp_path: Path) -> None:
    """The pieces of C that a page shows, behind each other in one function."""
    model = ROOT / "models" / "digits-0.05" / "model.tflite"
    generate(read_tflite(model.read_bytes()), certified=True).write(tmp_path / "library")
    for page in {block.page for block in of("c")}:
        text = "".join(block.text for block in of("c") if block.page == page)
        lines = text.splitlines()
        includes = [line for line in lines if line.startswith("#")]
        body = [line for line in lines if not line.startswith("#")]
        yours = ["void refuse(void);", "void act_on(int label);", "void page(void);"]
        source = tmp_path / "page.c"
        source.write_text("\n".join([*includes, *yours, "void page(void) {", *body, "}", ""]))
        compiler = [sys.executable, "-m", "ziglang", "cc", "-std=c99", "-Wall", "-Werror"]
        compiler += ["-I", str(tmp_path / "library"), "-c", "-o", str(tmp_path / "o"), str(source)]
        result = subprocess.run(compiler, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{name_of(page)}: {result.stderr}"


@pytest.mark.parametrize(
    ("shown", "printed", "figures", "expected"),
    [
        ("a  b", " a b\n\n", True, True),
        ("a b", "a c", True, False),
        ("a ... d", "a b c d", True, True),
        ("a\n...\nd", "a\nb\nc\nd", True, True),
        ("a\n...\nd", "a\nb\nc", True, False),
        ("took 3.5 s", "took 12 s", True, False),
        ("took 3.5 s", "took 12 s", False, True),
        ("┃ 1 ┃\n━━━", "┃ 20 ┃\n━━━━", False, True),
    ],
)
def test_comparison(shown: str, printed: str, figures: bool, expected: bool) -> None:
    assert documents.agrees(shown, printed, figures=figures) is expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cactus-edge certfy model.tflite", "no verb certfy"),
        ("cactus-edge certify model.tflite --data digits --epsilon 1 -o c", "--epsilon"),
        ("cactus-edge certify model.tflite --data digits --levels x -o c", "integer"),
        ("make everything", "make everything"),
        ("pip install 'cactus-edge[nothing]'", "nothing"),
        ("python tools/nothing.py", "nothing"),
        ("frobnicate", "frobnicate"),
    ],
)
def test_a_wrong_command_is_found(command: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        check_command(command)


def test_a_page_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tutorials"
    folder.mkdir()
    page = folder / "page.md"
    fence = "```"
    page.write_text(
        f"{fence}python\nprint(6 * 7)\n{fence}\n\n{fence}text\n41\n{fence}\n\n"
        f"<!-- figures vary -->\n{fence}console\n$ echo 5 \\\n  six\n4 six\n$ echo a\nb\n{fence}\n"
        f"- item\n\n  {fence}bash\n"
        f"  cat > out <<'EOF'\n  cactus-edge\n  EOF\n  false\n  {fence}\n\n"
        f"end\n\n    indented\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    monkeypatch.chdir(folder)
    python, text, console, bash, indented = documents.blocks(page)
    assert [block.indented for block in documents.blocks(page)] == [False] * 4 + [True]
    assert (python.line, text.line, console.mark, bash.language) == (2, 6, "figures vary", "bash")
    assert documents.commands(console) == [
        Command("echo 5 \\\n  six", "4 six"),
        Command("echo a", "b"),
    ]
    assert [c.text for c in documents.commands(bash)] == [
        "cat > out <<'EOF'\ncactus-edge\nEOF",
        "false",
    ]
    first, second, third = documents.run(page, documents.Runner())
    assert first.block == text and first.printed == "42\n"
    assert second.printed == "$ echo 5 \\\n  six\n4 six\n$ echo a\na\n"
    assert "false\nexits with 1" in third.what
    assert (folder / "out").read_text() == "cactus-edge\n"


def test_recipes_that_do_not_load_are_found() -> None:
    with pytest.raises(DataError, match="epsilonn"):
        parse_recipe('[data]\nname = "digits"\n[objective]\nepsilonn = 1\n')
