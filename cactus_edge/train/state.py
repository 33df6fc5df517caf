"""The state of a run, and how it is stored and restored to the bit.

Nothing random is part of it: see ``data.generator``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning_fabric
import msgspec
import torch
from torch import Tensor

from cactus_edge import files
from cactus_edge.errors import DataError
from cactus_edge.train import checkpoint, compress, importance, views
from cactus_edge.train.data import Samples
from cactus_edge.train.execution import FULL_PRECISION, Execution
from cactus_edge.train.recipe import Recipe, format_recipe, parse_recipe
from cactus_edge.train.reports import EpochRow, Progress
from cactus_edge.train.share import Share
from cactus_edge.train.start import Beginning
from cactus_edge.train.zoo import Network

logger = logging.getLogger(__name__)

_RANGE = "range/"
_SCORE = "score/"
_MOMENT = "optimizer/"
_PARAMETER = "network/"


class Position(msgspec.Struct, forbid_unknown_fields=True):
    """The part of the state that is no tensor; stored as JSON."""

    recipe: str
    data_sha256: str
    start_sha256: str = ""
    step: int = 0
    loss_sum: float = 0.0
    history: list[EpochRow] = []
    precision: str = FULL_PRECISION


@dataclass
class State:
    """Everything that changes while training, besides network and optimizer."""

    position: Position
    ranges: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    masks: Mapping[str, compress.Masks] = field(default_factory=dict[str, compress.Masks])


@dataclass(frozen=True)
class Run:
    """What stays the same while training."""

    recipe: Recipe
    output: Path
    fabric: lightning_fabric.Fabric
    network: Network
    optimizer: torch.optim.Adam
    training: Samples
    validation: Samples
    test: Samples
    progress: Progress | None
    execution: Execution
    share: Share
    start: Beginning = field(default_factory=Beginning)
    scores: Network | None = None  # with ``importance = "scores"``

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """What the optimizer moves, by name."""
        return importance.trained(self.network, self.scores)

    @property
    def steps_per_epoch(self) -> int:
        """Complete batches in the training split."""
        return len(self.training) // self.recipe.optimizer.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.recipe.optimizer.epochs


def fresh_state(run: Run, data_sha256: str) -> State:
    """The state at step 0."""
    choice, start = run.recipe.compression, run.start
    position = Position(
        format_recipe(run.recipe),
        data_sha256,
        start.sha256,
        precision=run.execution.precision,
    )
    masks: dict[str, compress.Masks] = {}
    if choice.mask_refresh == "once":
        masks |= views.masks_of(run.network, choice.members, choice)
        masks |= {key: start.masks[key] for key in masks if key in start.masks}
    return State(position, start.ranges, masks)


def kept_masks(run: Run, state: State) -> Mapping[str, compress.Masks]:
    """The masks that do not follow from the weights, by key of the pattern."""
    choice = run.recipe.compression
    if run.scores is not None:
        return views.masks_of(run.scores, choice.members, choice)
    return state.masks if choice.mask_refresh == "once" else {}


def save_run(run: Run, state: State) -> None:
    """Write the checkpoint: network, scores, optimizer, masks, ranges and position."""
    if not run.share.first:
        return
    tensors = {_PARAMETER + name: value for name, value in run.network.state_dict().items()}
    if run.scores is not None:
        tensors |= {_SCORE + name: value for name, value in run.trained.items()}
    for name, parameter in run.trained.items():
        for key, value in run.optimizer.state[parameter].items():
            tensors[f"{_MOMENT}{name}/{key}"] = value
    tensors |= {_RANGE + name: value for name, value in state.ranges.items()}
    if run.recipe.compression.mask_refresh != "step":
        tensors |= checkpoint.named_masks(state.masks)
    progress = msgspec.json.encode(state.position).decode()
    checkpoint.save_state(run.output, tensors, progress)


def restored(run: Run, data_sha256: str) -> State:
    """The stored state, checked against recipe and data; the fresh one if there is none."""
    file = run.output / checkpoint.STATE_FILE
    fresh = fresh_state(run, data_sha256)
    if not file.exists():
        logger.info("%s: no checkpoint; starting from the beginning", run.output)
        return fresh
    tensors, text = checkpoint.load_state(run.output)
    try:
        position = msgspec.json.decode(text, type=Position)
    except msgspec.DecodeError as error:
        raise DataError(f"{file}: damaged position: {error}; use --force") from error
    for what, old, new in (  # recipes as they are read: an older text lacks newer keys
        ("recipe", parse_recipe(position.recipe, f"{file}: recipe"), run.recipe),
        ("training data", position.data_sha256, data_sha256),
        ("[start]", position.start_sha256, run.start.sha256),
        ("--precision", position.precision, fresh.position.precision),
    ):
        if old != new:
            raise DataError(
                f"{file}: made with another {what}; use the original one, or --force to start again"
            )
    try:
        masks = _load_tensors(run, tensors)
    except (KeyError, RuntimeError) as error:
        raise DataError(f"{file}: damaged: {error}; use --force to start again") from error
    device = run.fabric.device
    ranges = {
        name.removeprefix(_RANGE): value.to(device)
        for name, value in tensors.items()
        if name.startswith(_RANGE)
    }
    return State(position, ranges, masks)


def _load_tensors(run: Run, tensors: Mapping[str, Tensor]) -> Mapping[str, compress.Masks]:
    """Put stored parameters, scores and optimizer state into place; return the stored masks."""
    device = run.fabric.device
    run.network.load_state_dict(
        {
            name.removeprefix(_PARAMETER): value
            for name, value in tensors.items()
            if name.startswith(_PARAMETER)
        }
    )
    for name, parameter in run.trained.items():
        if run.scores is not None:
            parameter.data.copy_(tensors[_SCORE + name])
        prefix = f"{_MOMENT}{name}/"
        if run.scores is not None and prefix + "step" not in tensors:
            continue  # no pattern prunes this layer, so its scores never had a gradient
        run.optimizer.state[parameter] = {
            "step": tensors[prefix + "step"],
            "exp_avg": tensors[prefix + "exp_avg"].to(device),
            "exp_avg_sq": tensors[prefix + "exp_avg_sq"].to(device),
        }
    return compress.masks_to(checkpoint.stored_masks(tensors), device)


def write_history(output: Path, history: Sequence[EpochRow]) -> None:
    """Write ``history.csv``."""
    names = EpochRow.__struct_fields__
    lines = [",".join(names)]
    lines += [",".join(repr(getattr(row, name)) for name in names) for row in history]
    text = "\n".join(lines) + "\n"
    files.write(output / checkpoint.HISTORY_FILE, text.encode("ascii"), force=True)
