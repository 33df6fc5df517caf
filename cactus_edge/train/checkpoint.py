"""Files of a training run: safetensors for tensors, JSON for the rest, never pickle.

    recipe.toml            the resolved recipe
    model.safetensors      parameters, activation ranges, kept masks; metadata: architecture,
                           shapes, recipe
    checkpoint.safetensors parameters, optimizer state, masks, ranges; metadata: position, history
    history.csv            one row per epoch
    costs.csv              time and memory per epoch
    metrics.json           the summary, written last

Each file is written to a temporary name and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cactus_edge import files
from cactus_edge.errors import CactusEdgeError, DataError, shortened
from cactus_edge.train.compress import Masks
from cactus_edge.train.recipe import Positive, PositiveCount, Recipe, format_recipe, parse_recipe
from cactus_edge.train.zoo import Network, build

MODEL_FILE = "model.safetensors"
STATE_FILE = "checkpoint.safetensors"
RECIPE_FILE = "recipe.toml"
HISTORY_FILE = "history.csv"
COSTS_FILE = "costs.csv"
METRICS_FILE = "metrics.json"
FILES = (MODEL_FILE, STATE_FILE, RECIPE_FILE, HISTORY_FILE, COSTS_FILE, METRICS_FILE)

_MODEL_FORMAT = "cactus_edge model 1"
_STATE_FORMAT = "cactus_edge training state 1"
_TYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_RANGE = "range/"
_MASK = "mask/"


class ModelMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``model.safetensors`` says about itself.

    Attributes:
        architecture: key of ``zoo.NETWORKS``.
        width: factor of the hidden layers' widths.
        input_shape: (C, H, W) or (F,).
        classes: number of logits.
        data_sha256: of the training split.
    """

    architecture: str
    width: Positive
    input_shape: Annotated[tuple[PositiveCount, ...], msgspec.Meta(min_length=1)]
    classes: PositiveCount
    data_sha256: str


@dataclass(frozen=True)
class Model:
    """A trained network as stored.

    Attributes:
        network: on the CPU, with its running batch statistics.
        recipe: of the run that made it.
        ranges: ReLU name -> largest activation that training observed; empty without quantized
            members.
        metadata: see ``ModelMetadata``.
        masks: key of a pattern -> masks that do not follow from the weights; empty where they do.
    """

    network: Network
    recipe: Recipe
    ranges: Mapping[str, float]
    metadata: ModelMetadata
    masks: Mapping[str, Masks] = field(default_factory=dict[str, Masks])


def save_model(
    directory: Path,
    network: Network,
    recipe: Recipe,
    ranges: Mapping[str, Tensor],
    data_sha256: str,
    masks: Mapping[str, Masks] | None = None,
) -> None:
    """Write ``model.safetensors``; for ``masks`` see ``Model``."""
    described = ModelMetadata(
        network.architecture, network.width, network.input_shape, network.classes, data_sha256
    )
    tensors = {name: value.detach() for name, value in network.state_dict().items()}
    tensors |= {_RANGE + name: value.detach() for name, value in ranges.items()}
    tensors |= named_masks(masks or {})
    metadata = {
        "format": _MODEL_FORMAT,
        "model": msgspec.json.encode(described).decode(),
        "recipe": format_recipe(recipe),
    }
    write_tensors(directory / MODEL_FILE, tensors, metadata)


def load_model(path: Path) -> Model:
    """Read a run directory or a ``model.safetensors``.

    Raises:
        DataError: no such file, not a model of this package, or its parts do not fit together.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.exists():
        raise DataError(
            f"{file}: no such file; give the output directory of a training run or its {MODEL_FILE}"
        )
    tensors, metadata = read_tensors(file, _MODEL_FORMAT)
    try:
        described = msgspec.json.decode(metadata["model"], type=ModelMetadata)
        recipe = parse_recipe(metadata["recipe"], f"{file}: recipe")
        network = _filled(described, tensors)
        ranges = {
            name.removeprefix(_RANGE): float(value)
            for name, value in tensors.items()
            if name.startswith(_RANGE)
        }
    except KeyError as error:
        raise DataError(f"{file}: the header lacks {error}; train the network again") from error
    except (
        msgspec.DecodeError,
        RuntimeError,  # RecursionError too
        TypeError,  # torch's, for sizes beyond 64 bits
        ValueError,
        CactusEdgeError,
    ) as error:
        text = shortened(error)
        raise DataError(f"{file}: damaged: {text}; train the network again") from error
    return Model(network, recipe, ranges, described, stored_masks(tensors))


def _filled(described: ModelMetadata, tensors: Mapping[str, Tensor]) -> Network:
    """The network with its stored state.

    Raises:
        DataError: the stored tensors are not those of such a network.
    """
    state = {name: value for name, value in tensors.items() if not name.startswith((_RANGE, _MASK))}
    make = partial(
        build, described.architecture, described.input_shape, described.classes, described.width
    )
    with torch.device("meta"):  # takes no memory, whatever sizes the header asks for
        wanted = {name: value.shape for name, value in make().state_dict().items()}
    for name in sorted(wanted.keys() | state.keys()):
        stored = state[name].shape if name in state else None
        if wanted.get(name) != stored:
            raise DataError(
                f"'{name}' is {_shown(stored)}, in the described network {_shown(wanted.get(name))}"
            )
    network = make()
    network.load_state_dict(state)
    return network


def _shown(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))


def named_masks(masks: Mapping[str, Masks]) -> dict[str, Tensor]:
    """Masks by their names in a file, ``mask/<key of the pattern>/<layer>``."""
    return {
        f"{_MASK}{key}/{layer}": mask
        for key, named in masks.items()
        for layer, mask in named.items()
    }


def stored_masks(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of ``named_masks``: key of a pattern -> layer -> mask."""
    masks: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(_MASK):
            key, _, layer = name.removeprefix(_MASK).partition("/")
            masks.setdefault(key, {})[layer] = value
    return masks


def load_network(path: Path) -> tuple[Network, Recipe]:
    """The network and the recipe of a run directory or a ``model.safetensors``."""
    model = load_model(path)
    return model.network, model.recipe


def save_state(directory: Path, tensors: Mapping[str, Tensor], progress: str) -> None:
    """Write ``checkpoint.safetensors``: tensors and the JSON text ``progress`` in one file."""
    write_tensors(directory / STATE_FILE, tensors, {"format": _STATE_FORMAT, "progress": progress})


def load_state(directory: Path) -> tuple[Mapping[str, Tensor], str]:
    """Read what ``save_state`` wrote."""
    tensors, metadata = read_tensors(directory / STATE_FILE, _STATE_FORMAT)
    if "progress" not in metadata:
        raise DataError(f"{directory / STATE_FILE}: the header lacks 'progress'; use --force")
    return tensors, metadata["progress"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file."""
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    files.write(path, _sorted_header(save(stored, metadata)), force=True)


def read_tensors(path: Path, expected: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file whose header says ``expected``: tensors and header."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        text = shortened(error)
        raise DataError(f"{path}: not a readable safetensors file: {text}") from error
    if metadata.get("format") != expected:
        raise DataError(
            f"{path}: expected a '{expected}' file, the header says "
            f"'{shortened(metadata.get('format', 'nothing'))}'"
        )
    for name, value in tensors.items():
        if value.dtype not in _TYPES:
            raise DataError(f"{path}: {shortened(name)!r} holds {value.dtype}; no run writes it")
    if any(not bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise DataError(f"{path}: holds values that are not finite; train the network again")
    return tensors, metadata


def _sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its metadata in order, so that equal runs write equal bytes.

    Layout: header length (8 bytes, little endian), JSON header padded with spaces, tensor data.
    """
    length = int.from_bytes(content[:8], "little")
    header: dict[str, dict[str, object]] = msgspec.json.decode(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
