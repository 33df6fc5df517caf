"""Line charts as numbers that a template turns into SVG: ticks, and points in its coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cactus_edge.shares import percent

WIDTH, HEIGHT = 640.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 12.0, 46.0
_TICKS = 6
_LEAST_EXTENT = 1e-9
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Series:
    """``points`` (x, y) in any order; ``style`` says how they are joined, if at all."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: Literal["line", "steps", "points"] = "line"


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in the drawing's coordinates, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A series in the drawing's coordinates; ``number`` chooses colour and marker."""

    name: str
    number: int
    path: str
    marks: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Chart:
    """A whole chart; ``frame`` is left, top, right and bottom of the plot."""

    title: str
    x_label: str
    y_label: str
    frame: tuple[float, float, float, float]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Drawn, ...]


def chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> Chart:
    """Lay out a chart whose y axis is in percent, from 0 to 100.

    Args:
        title: what a person who does not see it reads.
        x_label: with unit.
        y_label: with unit.
        series: at least one, with at least one point.
    """
    xs = [x for one in series for x, _ in one.points]
    least, most = min(0.0, *xs), max(xs)
    most = most if most - least > _LEAST_EXTENT else least + 1
    ticks = _ticks(least, most)
    most = max(most, ticks[-1])
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return round(_LEFT + (x - least) / (most - least) * (right - _LEFT), 2)

    def down(y: float) -> float:
        return round(bottom - y / 100 * (bottom - _TOP), 2)

    drawn: list[Drawn] = []
    for number, one in enumerate(series):
        points = sorted(one.points)
        places = [(across(x), down(y)) for x, y in points]
        # Nine digits hide what multiplying by 100 added, and nothing that was counted.
        texts = [f"{one.name}: {x:g}, {percent(float(f'{y / 100:.9g}'))} %" for x, y in points]
        marks = tuple((x, y, text) for (x, y), text in zip(places, texts, strict=True))
        drawn.append(Drawn(one.name, number % 4, _path(places, one.style), marks))
    return Chart(
        title,
        x_label,
        y_label,
        (_LEFT, _TOP, right, bottom),
        tuple(Tick(across(x), f"{x:g}") for x in ticks),
        tuple(Tick(down(y), f"{y:g}") for y in (0, 20, 40, 60, 80, 100)),
        tuple(drawn),
    )


def _path(places: Sequence[tuple[float, float]], style: str) -> str:
    """The line through the places; what holds at a radius holds below it: steps first go down."""
    if style == "points" or len(places) < 2:
        return ""
    parts = [f"M{places[0][0]:g} {places[0][1]:g}"]
    for x, y in places[1:]:
        parts.append(f"V{y:g}H{x:g}" if style == "steps" else f"L{x:g} {y:g}")
    return "".join(parts)


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers that cover the range."""
    rough = (most - least) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in _STEPS if factor * power >= rough * 0.999)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [float(f"{step * k:.10g}") for k in range(first, last + 1)]
