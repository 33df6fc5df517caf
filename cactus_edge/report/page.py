"""The page: what is shown, in which order, and the template that shows it.

Equal inputs make equal bytes: nothing of the time, the machine or the folder goes in. Every number
is one of the files' or follows from them by counting.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources

import msgspec

import cactus_edge
from cactus_edge import shares
from cactus_edge.certificate import VERDICTS, Property
from cactus_edge.errors import MissingExtraError, counted
from cactus_edge.inputs import rational
from cactus_edge.report.charts import Chart, Series, chart
from cactus_edge.report.explorer import Explorer
from cactus_edge.report.layers import Widths
from cactus_edge.report.sizes import sizes
from cactus_edge.report.sources import Claim, Search, Sources

TEMPLATE, STYLE, SCRIPT = "template.html", "style.css", "page.js"


@dataclass(frozen=True, eq=False)
class Page:
    """What is shown; ``notes`` say what could not be."""

    title: str
    sources: Sources
    explorer: Explorer | None
    widths: Widths | None
    notes: tuple[str, ...] = ()


def render(page: Page) -> bytes:
    """The HTML file.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise MissingExtraError("jinja2", "report", "writing a page") from None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = _percent
    environment.filters["share"] = shares.percent
    environment.filters["radius"] = radius_text
    environment.filters["certified"] = certified_text
    text = environment.from_string(_resource(TEMPLATE)).render(
        page=page,
        counted=counted,
        claims=page.sources.claims,
        main=page.sources.main,
        verdicts=VERDICTS,
        sizes=sizes(page.sources),
        charts=_charts(page.sources),
        style=_resource(STYLE),
        script=_resource(SCRIPT),
        data=None if page.explorer is None else _embedded(page.explorer),
        tool=f"cactus-edge {cactus_edge.__version__}",
    )
    return text.encode()


def _resource(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else percent(fraction)


def percent(fraction: float) -> str:  # float: reported
    """With its sign; rounded down, see ``shares``."""
    return f"{shares.percent(fraction)} %"


def _embedded(explorer: Explorer) -> str:
    """JSON that no HTML parser ends early: ``<`` and ``&`` are escaped."""
    text = json.dumps(msgspec.to_builtins(explorer), separators=(",", ":"))
    return text.replace("<", r"\u003c").replace("&", r"\u0026").replace(">", r"\u003e")


def radius_text(what: Property) -> str:
    """The set around each sample, in words."""
    if what.kind == "vnnlib":
        return "the query's sets"
    radius = "one radius for each element" if what.radii else f"radius {_readable(what.radius)}"
    if what.kind == "radius":
        radius = f"largest radius, up to {what.radius}"
    unit = " levels" if what.kind in ("levels", "radius") else ""
    patch = ", in a window of {} x {}, stride {}".format(*what.patch) if what.patch else ""
    top = f", label among the {what.top} greatest" if what.top > 1 else ""
    return f"{radius}{unit}{patch}{top}"


def certified_text(what: Property) -> str:
    """What the share of certified samples is a share of: those with the largest radius, or all."""
    if what.kind != "radius":
        return "certified accuracy"
    return f"certified up to {what.radius} {'level' if what.radius == '1' else 'levels'}"


def _readable(exact: str) -> str:
    """A rational with its decimal where that is short, or nearly."""
    value = rational(exact)
    if value.denominator == 1:
        return exact
    decimal = f"{float(value):.6g}"
    return f"{decimal} ({exact})" if Fraction(decimal) == value else f"{exact} (about {decimal})"


def _charts(sources: Sources) -> list[Chart]:
    found = [
        *_over_radius(sources, "epsilon", "radius on inputs in [0, 1]"),
        *_over_radius(sources, "levels", "radius in stored levels"),
    ]
    for search in sources.searches:
        found += _over_sparsity(search)
    return found


def _over_radius(sources: Sources, kind: str, label: str) -> list[Chart]:
    """Certified accuracy over the radius, where more than one radius is known."""
    series: list[Series] = []
    for curve in sources.curves:
        points = [p for p in curve.points if p.kind == kind and _is_number(p.radius)]
        if not points:
            continue
        about = f"{curve.data}, {counted(curve.samples, 'sample')}"
        radii = [float(rational(point.radius)) for point in points]
        counts = {"certified": [point.certified for point in points]}
        if curve.attacked:
            counts["not refuted"] = [point.certified + point.unknown for point in points]
        for name, found in counts.items():
            shares = [100 * count / curve.samples for count in found]
            places = tuple(zip(radii, shares, strict=True))
            series.append(Series(f"{name} ({about})", places))
    series += [one for claim in sources.claims for one in _of_claim(sources, claim, kind)]
    if sum(len(one.points) for one in series) < 2:
        return []
    return [chart("Certified accuracy over the radius", label, "samples, %", series)]


def _of_claim(sources: Sources, claim: Claim, kind: str) -> list[Series]:
    """A certificate as a point, or one of radii as steps."""
    what = claim.head.property
    if claim.head.models != sources.main.head.models or what.radii or what.patch or what.top > 1:
        return []
    total = sum(claim.summary.verdicts.values())
    if what.kind == "radius" and kind == "levels":
        largest = int(what.radius)
        shares = [
            (float(level), 100 * sum(n for r, n in claim.radii.items() if r >= level) / total)
            for level in range(largest + 1)
        ]
        return [Series(f"certified radius ({claim.path.name})", tuple(shares), "steps")]
    if what.kind != kind:
        return []
    point = (float(rational(what.radius)), 100 * claim.summary.certified_accuracy)
    return [Series(f"certified ({claim.path.name}, {claim.head.method})", (point,), "points")]


def _over_sparsity(search: Search) -> list[Chart]:
    """Candidates of a search by their share of zero weights, a series for each width."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in search.rows:
        model = row.model
        zeros = 100 * (1 - model.nonzero / max(model.weights, 1))
        width = row.name.split(": ")[-1].split(",")[0]
        series.setdefault(width, []).append((zeros, 100 * model.certified / model.samples))
    if sum(len(points) for points in series.values()) < 2:
        return []
    title = (
        f"Certified accuracy over sparsity and width, {search.data.name} {search.data.split}, "
        f"radius {search.epsilon}"
    )
    lines = [Series(name, tuple(points), "points") for name, points in series.items()]
    return [
        chart(title, "zero weights, %", f"of {counted(search.data.samples, 'sample')}, %", lines)
    ]


def _is_number(text: str) -> bool:
    return text[:1].isdigit()
