"""The code blocks of the documentation: found, parsed, run, and what they show compared.

A tutorial runs from top to bottom in one directory, as a reader would type it. So do pages for
which ``stand_ins`` has the reader's files; blocks of the others are parsed: commands against the
command line, Python by compiling and by its imports, TOML as a recipe. A comment above a block says
otherwise:

    <!-- run -->             run it, with the blocks of this page that ran before it
    <!-- parse -->           only parse it, in a tutorial
    <!-- figures vary -->    run it; numbers of what it shows differ between machines

``console`` holds commands behind ``$`` and what they print; ``text`` behind a Python block that ran
is what that prints, and elsewhere it is a drawing or a formula. ``...`` stands for anything.

``python tests/documents.py PAGE...`` runs pages and writes what was printed into them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import stand_ins
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("run", "parse", "figures vary")
LANGUAGES = ("bash", "c", "console", "python", "text", "toml")
SHIPPED = ("docs", "models", "recipes")  # what a reader has who cloned the repository
_WIDTH = 160
_MARKDOWN = MarkdownIt()


@dataclass(frozen=True)
class Block:
    """A code block: ``line`` is the first one of its text, counted from 1."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    indented: bool

    @property
    def runs(self) -> bool:
        """Whether it is run, and not only parsed."""
        if self.language not in ("bash", "console", "python"):
            return False
        if self.mark in MARKS:
            return self.mark != "parse"
        if self.page.parent.name == "tutorials":
            return True
        return self.stands_in and not (
            self.language == "python" and stand_ins.why_not(self.page, self.text)
        )

    @property
    def stands_in(self) -> bool:
        """Whether it runs with files, and perhaps words, that stand for those of the page."""
        plain = self.mark == "" and self.language in ("bash", "python")
        return plain and stand_ins.of(self.page) is not None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a shell, and in a console block the lines that it shows."""

    text: str
    shown: str = ""


def pages() -> list[Path]:
    """Every page of the repository that a reader meets."""
    below = (page for folder in ("docs", "models") for page in (ROOT / folder).rglob("*.md"))
    return sorted([*ROOT.glob("*.md"), *below])


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    found: list[Block] = []
    mark = ""
    for token in _MARKDOWN.parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            comment = re.fullmatch(r"<!-- (.+) -->\s*", token.content)
            mark = comment[1] if comment else ""
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            indented = token.type == "code_block"
            line = token.map[0] + (1 if indented else 2)
            found.append(Block(page, line, token.info.strip(), token.content, mark, indented))
            mark = ""
        elif token.block and token.nesting <= 0:
            mark = ""
    return found


def inline_code(page: Path) -> list[str]:
    """What stands between backticks in the text of a page."""
    tokens = _MARKDOWN.parse(page.read_text(encoding="utf-8"))
    children = (child for token in tokens for child in token.children or ())
    return [child.content for child in children if child.type == "code_inline"]


def commands(block: Block) -> list[Command]:
    """The commands of a ``bash`` or ``console`` block, each with what it shows."""
    if block.language == "bash":
        return [Command(text) for text in joined(block.text)]
    found: list[Command] = []
    pending: list[str] = []
    shown: list[str] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            if pending:
                found.append(Command("\n".join(pending), "\n".join(shown)))
            pending, shown = [line.removeprefix("$ ")], []
        elif pending and not shown and pending[-1].endswith("\\"):
            pending.append(line)
        else:
            assert pending, f"{block}: a console block begins with `$ `"
            shown.append(line)
    return [*found, Command("\n".join(pending), "\n".join(shown))]


def joined(text: str) -> Iterator[str]:
    """The commands of a script, each with its continued lines, loop or here-document."""
    lines = iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        whole = [line]
        if (here := re.search(r"<<\s*'?(\w+)'?", line)) is not None:
            ends = here[1]
        elif line.startswith("for "):
            ends = "done"
        else:
            while whole[-1].endswith("\\"):
                whole.append(next(lines))
            ends = ""
        while ends and whole[-1] != ends:
            whole.append(next(lines))
        yield "\n".join(whole)


def words(command: str) -> list[str]:
    """The words of one simple command; a comment behind it is left out."""
    return shlex.split(command.replace("\\\n", " "), comments=True)


def agrees(shown: str, printed: str, *, figures: bool = True) -> bool:
    """Whether what is shown is what was printed, up to space, rulers and ``...``."""
    wanted, found = _plain(shown, figures), _plain(printed, figures)
    return re.fullmatch(re.escape(wanted).replace(re.escape("..."), ".*"), found) is not None


def _plain(text: str, figures: bool) -> str:
    # How wide a column is, and where a title breaks, follows from the figures in it.
    plain = " ".join(re.sub("[━─]+", "─", text).split())
    return plain if figures else re.sub(r"\d[\d,]*(\.\d+)?", "0", plain)


class Runner:
    """Runs the blocks of ``page`` in the current directory, which has to be an empty one."""

    def __init__(self, page: Path | None = None) -> None:
        self.module = types.ModuleType("page")
        sys.modules[self.module.__name__] = self.module
        for name in SHIPPED:
            Path(name).symlink_to(ROOT / name)
        here = None if page is None else stand_ins.of(page)
        if here is not None:
            here.prepare()

    def python(self, block: Block) -> str:
        """Run a block of Python; what it prints."""
        text = stand_ins.replaced(block.page, block.text) if block.stands_in else block.text
        code = compile("\n" * (block.line - 1) + text, str(block.page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, vars(self.module))
        return printed.getvalue()

    def command(self, text: str) -> tuple[int, str]:
        """Run a command; exit code and what it prints. Our own runs in this process."""
        simple = text.startswith("cactus-edge ") and not re.search(r"[|<>;&$]", text)
        return self._own(words(text)[1:]) if simple else self._shell(text)

    @staticmethod
    def _own(arguments: list[str]) -> tuple[int, str]:
        from cactus_edge.cli import output, run

        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            output.stdout.width = output.console.width = _WIDTH
            code = run(arguments)
        return code, printed.getvalue()

    @staticmethod
    def _shell(text: str) -> tuple[int, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-euc", text],
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return result.returncode, result.stdout


@dataclass(frozen=True)
class Difference:
    """A block that did not do what the page says; ``printed`` is the text that it should show."""

    block: Block
    what: str
    printed: str = ""


def run(page: Path, runner: Runner, *, exact: bool = False) -> Iterator[Difference]:
    """Run the blocks of a page that run, in order, in the current directory.

    What a block prints is compared where the page shows it, with ``exact`` also the figures that
    vary; a failure ends the page.
    """
    printed: str | None = None
    for block in blocks(page):
        figures = exact or block.mark != "figures vary"
        if block.language == "text" and printed is not None:
            if not agrees(block.text, printed, figures=figures):
                yield Difference(block, f"prints\n{printed}", printed)
            printed = None
        elif not block.runs:
            printed = None
        elif block.language == "python":
            printed = runner.python(block)
        else:
            printed = None
            now: list[str] = []
            for command in commands(block):
                if block.stands_in and stand_ins.why_not(page, command.text):
                    continue
                text = stand_ins.replaced(page, command.text) if block.stands_in else command.text
                code, output = runner.command(text)
                if code and not re.search("^error:", command.shown, re.MULTILINE):
                    yield Difference(block, f"{command.text}\nexits with {code}:\n{output}")
                    return
                equal = agrees(command.shown, output, figures=figures)
                now.append(f"$ {command.text}\n{command.shown if equal else _tidy(output)}".strip())
            text = "\n".join(now) + "\n"
            if block.language == "console" and text != block.text:
                yield Difference(block, f"prints\n{text}", text)


def _tidy(output: str) -> str:
    lines = (line.rstrip() for line in output.splitlines())
    return "\n".join(line for line in lines if line)


def main() -> None:
    """Write into pages what their blocks print."""
    import tempfile

    home = Path.cwd()
    for name in sys.argv[1:]:
        page = (home / name).resolve()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            found = list(run(page, Runner(page), exact=True))
            os.chdir(home)
        lines = page.read_text(encoding="utf-8").splitlines()
        for difference in reversed(found):  # from the end, so that line numbers stay true
            sys.stderr.write(f"{difference.block}: {difference.what}\n")
            first, count = difference.block.line - 1, len(difference.block.text.splitlines())
            if difference.printed:
                lines[first : first + count] = _tidy(difference.printed).splitlines()
        page.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
