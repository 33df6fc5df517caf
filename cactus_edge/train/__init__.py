"""Certified training of networks that stay certified when compressed (CACTUS); needs torch.

The only part of the package that imports torch.
"""

from cactus_edge.train.checkpoint import Model, load_model, load_network
from cactus_edge.train.loop import EpochRow, Progress, StepReport, Summary, train
from cactus_edge.train.recipe import Recipe, format_recipe, load_recipe, parse_recipe
from cactus_edge.train.zoo import NETWORKS, Network

__all__ = [
    "NETWORKS",
    "EpochRow",
    "Model",
    "Network",
    "Progress",
    "Recipe",
    "StepReport",
    "Summary",
    "format_recipe",
    "load_model",
    "load_network",
    "load_recipe",
    "parse_recipe",
    "train",
]
