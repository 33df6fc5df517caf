"""A hook of MkDocs: all pages of the repository at their own places, and the reference.

Links between pages are relative and have to work on GitHub too. So the site has the layout of the
repository: README.md is its front page and docs/ a folder below it. Files that pages link to are
copied as they are. The reference is written from the command line and from the docstrings of what
docs/python.md lists; a folder in the navigation stands for its pages.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")
REFERENCE = "docs/reference"
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_LISTED = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)

Nav = list[Any]


def pages() -> list[str]:
    """Every page of the repository, as a path from its root."""
    below = (page for folder in ("docs", "models") for page in (ROOT / folder).rglob("*.md"))
    found = [*(ROOT / f"{name}.md" for name in PAGES), *below]
    return sorted(page.relative_to(ROOT).as_posix() for page in found)


def linked() -> set[str]:
    """Other files of the repository that a page links to or shows."""
    found: set[str] = set()
    for page in pages():
        for link in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            target = ((ROOT / page).parent / link).resolve()
            if "://" not in link and target.is_file() and target.is_relative_to(ROOT):
                found.add(target.relative_to(ROOT).as_posix())
    return found - set(pages())


def modules() -> dict[str, dict[str, str]]:
    """The modules of docs/python.md: public names, and where each is defined.

    They are read without being imported, so that no extra is needed.
    """
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    return {name: _public(name) for name in _LISTED.findall(text)}


@cache
def _tree(name: str) -> ast.Module:
    """The source of a module, parsed."""
    path = ROOT.joinpath(*name.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(source.read_text(encoding="utf-8"))


def _public(name: str) -> dict[str, str]:
    """``__all__`` of a module."""
    for node in _tree(name).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="_PUBLIC")], value=value):  # imported on first use
                lazy = ast.literal_eval(value)
                return {public: _defined(f"{name}.{lazy[public]}", public) for public in lazy}
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return {public: _defined(name, public) for public in ast.literal_eval(value)}
            case _:
                pass
    raise ValueError(f"{name} has no public names")


def _defined(module: str, public: str) -> str:
    """The path of an object, behind what only passes it on."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if public == (alias.asname or alias.name):
                    return _defined(node.module, alias.name)
    return f"{module}.{public}"


def module_pages() -> dict[str, str]:
    """A page for each module: its docstring, and every public name, described once on the site."""
    listed = modules()
    home: dict[str, str] = {}  # the module closest to the definition
    for name in sorted(listed, key=len):
        home.update(dict.fromkeys(listed[name].values(), name))
    found: dict[str, str] = {}
    for name, public in listed.items():
        about = f"::: {name}\n    options:\n      members: false\n      show_root_heading: false\n"
        about += "      show_root_toc_entry: false\n"
        lines = [f"# {name}", "", about]
        lines += [f"::: {path}\n" for path in public.values() if home[path] == name]
        others = [f"[`{n}`][{path}]" for n, path in public.items() if home[path] != name]
        if others:
            lines += ["Also here, from other modules: " + ", ".join(others) + ".", ""]
        found[f"{REFERENCE}/{name}.md"] = "\n".join(lines)
    return found


def command_line() -> str:
    """The page of the verbs, from the application."""
    import typer
    from typer.cli import get_docs_for_click

    sys.path.insert(0, str(ROOT))
    from cactus_edge.cli import app

    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="cactus-edge")
    text = get_docs_for_click(obj=command, ctx=context, name="cactus-edge", title="Command line")
    text = re.sub(
        r"^\* `([a-z][a-z-]*)`: .*$", r"* [`\1`](#cactus-edge-\1)", text, flags=re.MULTILINE
    )
    return re.sub(r"^Example: (.*)$", r"```console\n$ \1\n```", text, flags=re.MULTILINE)


def written() -> dict[str, str]:
    """The pages that no file of the repository holds."""
    return {f"{REFERENCE}/cli.md": command_line(), **module_pages()}


def opened(nav: Nav) -> Nav:
    """The navigation with folders replaced by their pages, its README first."""
    made = [f"{REFERENCE}/{name}.md" for name in modules()]
    result: Nav = []
    for entry in nav:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            value = opened(value)
        elif value.endswith("/"):
            below = [page for page in pages() if page.startswith(value)]
            front = [page for page in below if page == f"{value}README.md"]
            value = [*front, *(page for page in below if page not in front)] or made
        result.append({title: value})
    return result


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Open the folders of the navigation."""
    config.nav = opened(config.nav or [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put every page and every file that one links to at its place in the repository."""
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for name in [*pages(), *sorted(linked())]:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for name, text in written().items():
        files.append(File.generated(config, name, content=text))
    return files
