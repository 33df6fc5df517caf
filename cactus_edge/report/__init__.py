"""``report``: results of the other verbs as one self-contained page, a card, a bill of materials.

sources   files told apart, and checked to be about one model
explorer  bounds, verdicts and counterexamples of samples at a grid of radii
layers    interval widths, and where margin is lost
sizes     bytes of what ships, beside other forms of the same layers
charts    curves as coordinates
page      all of it in one HTML file: template.html, style.css and page.js stand beside it
"""

from cactus_edge.report.bom import bill_of_materials
from cactus_edge.report.card import card
from cactus_edge.report.explorer import Explorer, explore, opened
from cactus_edge.report.layers import Widths, widths
from cactus_edge.report.page import Page, render
from cactus_edge.report.sources import Sources, read

__all__ = [
    "Explorer",
    "Page",
    "Sources",
    "Widths",
    "bill_of_materials",
    "card",
    "explore",
    "opened",
    "read",
    "render",
    "widths",
]
