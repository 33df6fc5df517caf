"""A run that goes on from a trained network: ``[start]`` in the recipe.

Contract: parameters, batch statistics, activation ranges and kept masks are taken over; optimizer,
schedules and history begin anew. The SHA-256 of the file belongs to the run, so that an interrupted
one cannot go on from another start.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cactus_edge.errors import DataError, UsageError
from cactus_edge.train import checkpoint
from cactus_edge.train.compress import Masks, masks_to
from cactus_edge.train.recipe import Recipe
from cactus_edge.train.zoo import Network

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beginning:
    """What a run takes over besides the network.

    Attributes:
        sha256: of the file it starts from; empty if the network is initialised.
        ranges: ReLU name -> largest activation [].
        masks: key of a pattern -> masks.
    """

    sha256: str = ""
    ranges: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    masks: Mapping[str, Masks] = field(default_factory=dict[str, Masks])


def refuse_itself(recipe: Recipe, output: Path) -> None:
    """Raise UsageError where the run would replace what it starts from."""
    if recipe.start is None:
        return
    if _file(recipe.start.source).resolve() == (output / checkpoint.MODEL_FILE).resolve():
        raise UsageError(
            f"[start] from: '{recipe.start.source}' is the output directory {output}; write the "
            "run to another one"
        )


def load(recipe: Recipe, network: Network, data_sha256: str, device: torch.device) -> Beginning:
    """Put the parameters of the start into ``network``; return what else it brings.

    Args:
        recipe: the run's recipe; without ``[start]`` nothing happens.
        network: as the recipe builds it.
        data_sha256: of the run's training split.
        device: for ranges and masks.

    Raises:
        DataError: no such file, no model, another network, or masks of another kind.
    """
    if recipe.start is None:
        return Beginning()
    file = _file(recipe.start.source)
    try:
        model = checkpoint.load_model(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except (DataError, OSError) as error:
        raise DataError(f"[start] from: {error}") from error
    held, wanted = _described(model.network), _described(network)
    if held != wanted:
        raise DataError(
            f"[start] from: {file} holds {held}, this recipe trains {wanted}; start from a run of "
            "the same network on data of the same shape, or change [network] and [data]"
        )
    theirs, ours = model.recipe.compression.pruning, recipe.compression.pruning
    kept = {member.pattern().key() for member in recipe.compression.members} & set(model.masks)
    if kept and theirs != ours:
        raise DataError(
            f"[start] from: the masks of {file} were made with scope = '{theirs.scope}' and "
            f"prune_last = {str(theirs.prune_last).lower()}; write the same in [compression]"
        )
    if model.metadata.data_sha256 != data_sha256:
        logger.warning(
            "[start] from: %s was trained on other data or another split; if it saw samples that "
            "are now held out, accuracies on validation data are too high",
            file,
        )
    network.load_state_dict(model.network.state_dict())
    ranges = {name: torch.tensor(value, device=device) for name, value in model.ranges.items()}
    return Beginning(digest, ranges, masks_to(model.masks, device))


def _file(source: str) -> Path:
    """The model's file, of a run's directory or as it is."""
    path = Path(source)
    return path / checkpoint.MODEL_FILE if path.is_dir() else path


def _described(network: Network) -> str:
    """Architecture, width and shapes in words."""
    return (
        f"'{network.architecture}' of width {network.width:g} for samples of shape "
        f"{list(network.input_shape)} and {network.classes} classes"
    )
