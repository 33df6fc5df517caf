"""The report on a trained model, in a browser that has to be there; its pictures for the guide.

`make screenshots` runs this. The pictures go to `docs/images`, the page to `build/evidence/report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report import browsing
from report.html import embedded, parse

from cactus_edge.cli import run

ROOT = Path(__file__).resolve().parents[2]
BUILD, IMAGES = ROOT / "build" / "evidence" / "report", ROOT / "docs" / "images"
MODEL = ROOT / "models" / "mnist-0.1" / "model.tflite"
SAMPLES, MOST_BYTES = 300, 300_000
RADII = ("0", "0.025", "0.05", "0.075", "0.1", "0.125", "0.15")


def verb(*arguments: object) -> None:
    assert run([str(argument) for argument in arguments]) == 0


def pictures(page: Any, sample: int) -> None:
    """The top of the page, and the explorer on a sample with a counterexample."""
    page.screenshot(path=IMAGES / "report.png")
    page.get_by_role("button", name=f"Show sample {sample}", exact=True).click()
    page.select_option("#filter-verdict", "refuted")
    page.locator("#explorer").screenshot(path=IMAGES / "report-explorer.png")


@pytest.mark.evidence
def test_report_on_mnist(data_dir: Path) -> None:
    assert not browsing.missing(), browsing.missing()
    IMAGES.mkdir(parents=True, exist_ok=True)
    certificate, sweep, html = BUILD / "mnist.jsonl", BUILD / "sweep.json", BUILD / "report.html"
    about = (MODEL, "--data", "mnist", "-n", SAMPLES, "--force")
    verb("certify", *about, "--eps", "0.1", "--attack", "-o", certificate)
    radii = [word for radius in RADII for word in ("--eps", radius)]
    verb("sweep", *about, *radii, "--attack", "-o", sweep)
    verb("report", certificate, MODEL, sweep, "-o", html, "--force", "--title", "MNIST, radius 0.1")
    samples = embedded(parse(html.read_bytes()))["samples"]
    assert len(samples) == 100
    broken = next(sample["index"] for sample in samples if sample["counterexample"])
    with browsing.chromium() as browser:
        for scheme in ("light", "dark"):
            size = {"viewport": browsing.DESK, "color_scheme": scheme}
            with browsing.visit(browser, html, **size) as (page, _):
                assert browsing.violations(page) == []
                if scheme == "light":
                    pictures(page, broken)
            with browsing.visit(browser, html, **{**size, "viewport": browsing.PHONE}) as (page, _):
                assert browsing.fits(page)
                assert browsing.violations(page) == []
                if scheme == "dark":
                    page.locator("#explorer .detail").screenshot(path=IMAGES / "report-phone.png")
    assert sum(path.stat().st_size for path in IMAGES.glob("report*.png")) < MOST_BYTES
