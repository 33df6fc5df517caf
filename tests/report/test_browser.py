"""The page in a headless Chromium: it sorts, filters, moves the slider, and can be read by all."""

from __future__ import annotations

import base64
from collections.abc import Generator
from typing import Any

import pytest
from report import browsing
from report.conftest import Made
from report.html import embedded, parse

WORDS = {"c": "certified", "r": "refuted", "u": "unknown"}


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    if reason := browsing.missing():
        pytest.skip(f"no browser: {reason}")
    with browsing.chromium() as found:
        yield found


def test_sorts_filters_and_finds(browser: Any, made: Made) -> None:
    data = embedded(parse(made.page.read_bytes()))
    samples = data["samples"]
    with browsing.visit(browser, made.page, viewport=browsing.DESK) as (page, _):
        rows = browsing.visible_rows(page)
        assert [int(row[0]) for row in rows] == [sample["index"] for sample in samples]
        radius = page.get_by_role("button", name="certified radius")
        for key, descending in (("Enter", False), ("Space", True)):
            radius.press(key)
            shown = [
                -1.0 if row[4] == "none" else float(row[4]) for row in browsing.visible_rows(page)
            ]
            assert shown == sorted(shown, reverse=descending) and len(set(shown)) > 2
        direction = page.locator("#samples th[aria-sort]").get_attribute("aria-sort")
        assert direction == "descending"
        page.select_option("#filter-verdict", "refuted")
        refuted = [sample for sample in samples if sample["verdict"] == "refuted"]
        rows = browsing.visible_rows(page)
        assert {int(row[0]) for row in rows} == {sample["index"] for sample in refuted}
        assert page.inner_text("#count") == f"{len(refuted)} of {len(samples)} samples shown"
        label = str(refuted[0]["label"])
        page.select_option("#filter-class", label)
        assert {row[1] for row in browsing.visible_rows(page)} == {label}
        page.select_option("#filter-verdict", "")
        page.select_option("#filter-class", "")
        last = samples[-1]
        page.fill("#filter-index", str(last["index"]))
        assert page.inner_text("#shown") == f"Sample {last['index']}, label {last['label']}"
        assert [row[0] for row in browsing.visible_rows(page)] == [str(last["index"])]
        page.fill("#filter-index", "100000")
        assert browsing.visible_rows(page) == []


def test_slider_shows_what_was_computed(browser: Any, made: Made) -> None:
    data = embedded(parse(made.page.read_bytes()))
    broken = [sample for sample in data["samples"] if sample["counterexample"]][0]
    whole = [sample for sample in data["samples"] if sample["verdict"] == "certified"][0]
    with browsing.visit(browser, made.page, viewport=browsing.DESK) as (page, _):
        for sample in (broken, whole):
            page.get_by_role("button", name=f"Show sample {sample['index']}", exact=True).press(
                "Enter"
            )
            assert browsing.pixels(page, "image") == list(base64.b64decode(sample["image"]))
            assert page.is_visible("#counterexample") == (sample is broken)
            slider = page.get_by_role("slider", name="Radius")
            slider.press("Home")
            for number, step in enumerate(data["radii"]):
                text = page.inner_text("#radius-text")
                assert text.startswith(step["exact"])
                assert text.endswith(f": {WORDS[sample['verdicts'][number]]}")
                assert ("the certificate's" in text) == (number == data["own"])
                cells = page.locator("#bounds tbody tr").evaluate_all(
                    "(rows) => rows.map((row) => [...row.cells].slice(2).map("
                    "(cell) => Number(cell.textContent)))"
                )
                columns = [sample["lower"][number], sample["upper"][number], sample["logits"]]
                assert cells == [list(row) for row in zip(*columns, strict=True)]
                slider.press("ArrowRight")
            if sample is broken:
                point = list(base64.b64decode(sample["counterexample"]))
                assert browsing.pixels(page, "counterexample") == point
                before = base64.b64decode(sample["image"])
                moved = [a - b for a, b in zip(point, before, strict=True)]
                difference = browsing.pixels(page, "difference")
                for grey, change in zip(difference, moved, strict=True):
                    assert abs(grey - 127.5 * (1 + change / sample["distance"])) <= 1
                winner = sample["wrong"].index(max(sample["wrong"]))
                assert f"class {winner} under {sample['profile']}" in page.inner_text(
                    "#broken-text"
                )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everyone_can_read_it(browser: Any, made: Made, scheme: str) -> None:
    with browsing.visit(browser, made.page, viewport=browsing.PHONE, color_scheme=scheme) as (
        page,
        _,
    ):
        assert browsing.fits(page)
        red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        assert (int(red) < 64) == (scheme == "dark")
        assert browsing.violations(page, *([] if scheme == "light" else ["color-contrast"])) == []


def test_a_page_that_is_wrong_is_noticed(browser: Any, tmp_path: Any) -> None:
    """The checks themselves: contrast, labels, width, console and requests."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><title>x</title><p style='color:#bbb;background:#fff'>faint</p><img "
        "src='missing.png'><div style='width:2000px'>wide</div><script>throw Error('x')</script>"
    )
    with (
        pytest.raises(AssertionError),
        browsing.visit(browser, page, viewport=browsing.PHONE) as (shown, log),
    ):
        found = " ".join(browsing.violations(shown))
        assert "color-contrast" in found and "image-alt" in found
        assert not browsing.fits(shown)
        assert log.messages and len(log.requests) == 2
        found = "as expected"
    assert found == "as expected"
