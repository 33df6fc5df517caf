"""The site: every page in its navigation, links and lists as on GitHub, a complete reference.

``make check`` builds it; what is tested here needs no build.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import markdown
import pytest
import typer
import yaml
from documents import ROOT, pages
from markdown_it import MarkdownIt

from cactus_edge.cli import app

_found = importlib.util.spec_from_file_location("site_hook", ROOT / "tools" / "site.py")
assert _found and _found.loader
site = importlib.util.module_from_spec(_found)
_found.loader.exec_module(site)

CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
STRUCTURE = ("blockquote", "h1", "h2", "h3", "img", "li", "ol", "pre", "table", "td", "ul")


def leaves(nav: list[Any]) -> list[str]:
    found: list[str] = []
    for entry in nav:
        (value,) = entry.values() if isinstance(entry, dict) else (entry,)
        found += leaves(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    shown = Counter(leaves(site.opened(CONFIG["nav"])))
    assert set(shown) == {*site.pages(), *site.written()}, "add new pages to mkdocs.yml"
    assert set(shown.values()) == {1}
    assert {ROOT / page for page in site.pages()} == set(pages())


def test_nothing_is_fetched_from_elsewhere() -> None:
    """Fonts, and the plugin whose script is on a server of others."""
    assert CONFIG["theme"]["font"] is False and CONFIG["strict"] is True
    assert "offline" not in CONFIG["plugins"]
    assert not {"extra_css", "extra_javascript"} & set(CONFIG)
    for page in pages():
        assert not re.search(r"!\[[^]]*\]\(https?:", page.read_text(encoding="utf-8")), page


def structure(html: str) -> Counter[str]:
    """How often each element occurs that gives a page its shape."""
    return Counter(tag for tag in re.findall(r"<([a-z]+\d?)[ >]", html) if tag in STRUCTURE)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_has_the_same_shape_on_github(page: Path) -> None:
    """Python-Markdown wants four spaces below a list's item where GitHub is content with two."""
    text = page.read_text(encoding="utf-8")
    extensions = [entry for entry in CONFIG["markdown_extensions"] if isinstance(entry, str)]
    there = markdown.markdown(text, extensions=extensions)
    here = MarkdownIt("commonmark").enable("table").render(text)
    assert structure(there) == structure(here)


@pytest.mark.parametrize(("module", "public"), site.modules().items(), ids=lambda v: str(v)[:40])
def test_the_reference_finds_what_python_finds(module: str, public: dict[str, str]) -> None:
    """Names are resolved from the sources; every one has to be the object that is imported."""
    imported = importlib.import_module(module)
    assert set(public) == set(imported.__all__) - {"__version__"}
    for name, path in public.items():
        where, _, defined = path.rpartition(".")
        assert getattr(importlib.import_module(where), defined) is getattr(imported, name)


def test_everything_public_is_described_once() -> None:
    made = site.module_pages()
    described = Counter(re.findall(r"^::: (\S+)$", "\n".join(made.values()), re.MULTILINE))
    wanted = {path for public in site.modules().values() for path in public.values()}
    assert described == Counter({*wanted, *site.modules()})
    linked = set(re.findall(r"\[`\w+`\]\[(\S+?)\]", "\n".join(made.values())))
    assert linked <= set(described) and "cactus_edge.runtime.Session" in linked


def test_the_command_line_is_complete() -> None:
    text = site.command_line()
    sections = dict(
        part.split("`", 1) for part in re.split(r"^## `cactus-edge ", text, flags=re.MULTILINE)[1:]
    )
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    assert set(sections) == set(group.commands)
    for name, verb in group.commands.items():
        options = {
            option for parameter in verb.params for option in parameter.opts if "-" in option
        }
        assert {o for o in options if not re.search(rf"(^|[ `]){o}\b", sections[name])} == set()
        assert "```console\n$ cactus-edge " + name in sections[name]
        assert f"(#cactus-edge-{name})" in text
    assert "Example:" not in text
