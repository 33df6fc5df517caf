"""A headless Chromium, and what a page must do in it.

Debian's `chromium` is found by name; `CACTUS_EDGE_CHROMIUM` names another one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1100, "height": 900}


def missing() -> str:
    """What a browser test lacks here; empty if nothing."""
    for package in ("playwright", "axe_playwright_python"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    return "" if _executable() else f"none of {', '.join(NAMES)} is installed"


def _executable() -> str | None:
    given = os.environ.get("CACTUS_EDGE_CHROMIUM")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Generator[Any]:
    """A browser, for many pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=_executable(), headless=True, args=list(FLAGS)
        )
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Log:
    """What a page said on its console, and what it asked for."""

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def visit(browser: Any, path: Path, **options: Any) -> Generator[tuple[Any, Log]]:
    """A page in a context of its own; nothing but the file may have been asked for."""
    context = browser.new_context(**options)
    try:
        page, log = context.new_page(), Log()
        page.on("console", lambda message: log.messages.append(message.text))
        page.on("pageerror", lambda error: log.messages.append(str(error)))
        page.on("request", lambda request: log.requests.append(request.url))
        page.goto(path.as_uri())
        yield page, log
    finally:
        context.close()
    assert log.messages == []
    assert log.requests == [path.as_uri()]


def violations(page: Any, *rules: str) -> list[str]:
    """What axe-core finds; all of its rules, or these."""
    page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text())
    options: dict[str, object] = {"resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = list(rules)
    found = page.evaluate("(options) => axe.run(options)", options)
    assert len(found["passes"]) > 0
    return [
        f"{violation['id']}: {node['html'][:200]}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


def fits(page: Any) -> bool:
    """Whether nothing has to be scrolled sideways, but tables within themselves."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def visible_rows(page: Any) -> list[list[str]]:
    return page.evaluate(
        "[...document.querySelectorAll('#samples tbody tr')].filter((row) => !row.hidden)"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )


def pixels(page: Any, canvas: str) -> list[int]:
    """The red channel of a canvas, read from a copy that is meant to be read."""
    return page.evaluate(
        """(id) => {
            const shown = document.getElementById(id);
            const copy = document.createElement("canvas");
            [copy.width, copy.height] = [shown.width, shown.height];
            const context = copy.getContext("2d", { willReadFrequently: true });
            context.drawImage(shown, 0, 0);
            const data = context.getImageData(0, 0, copy.width, copy.height).data;
            return [...data].filter((_, at) => at % 4 === 0);
        }""",
        canvas,
    )
