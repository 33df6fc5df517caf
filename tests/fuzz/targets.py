"""What reads files of strangers, one function of bytes each.

A target says whether it accepted a file. It may refuse one with the errors that its docstring
names in the package, of one short line; whatever else leaves it is a finding.
"""

from __future__ import annotations

import functools
import gzip
import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cactus_edge import datasets, fault_report, flatbuffer, radii, signing, vnnlib
from cactus_edge.certificate import Head, Sample
from cactus_edge.certificate_stream import Reader
from cactus_edge.check import check
from cactus_edge.errors import CactusEdgeError, DataError, UnsupportedModelError, UsageError
from cactus_edge.graph import Graph
from tests.certificates import encoded
from tests.fuzz import seeds

LONGEST_MESSAGE = 1000
Errors = tuple[type[CactusEdgeError], ...]


@dataclass(frozen=True)
class Target:
    """``read`` takes a file's bytes; ``seeds`` are files that it accepts.

    ``longest``: bytes of a made-up file. ``also``: what has to hold of what was read, where it
    takes long; a search asks for it once in a while.
    """

    name: str
    read: Callable[[bytes], object]
    errors: Errors
    seeds: Callable[[], list[bytes]]
    longest: int = 4096
    also: Callable[[Any], None] | None = None

    def accepts(self, data: bytes, *, thorough: bool = True) -> bool:
        """Whether the file is read; every error but the named ones is raised."""
        try:
            found = self.read(data)
            if thorough and self.also is not None:
                self.also(found)
        except self.errors as error:
            message = str(error)
            assert message, type(error)
            assert len(message) <= LONGEST_MESSAGE, message
            return False
        return True


@functools.cache
def _folder() -> Path:
    """A folder in memory, where there is one, that this process alone uses."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=parent))


def _file(data: bytes, name: str) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def _tflite(data: bytes) -> Graph:
    return flatbuffer.read_tflite(data, "fuzzed")


def _written(graph: Graph) -> None:
    """What is accepted can be written, and is then read as the same."""
    again = flatbuffer.write_tflite(graph)
    read = flatbuffer.read_tflite(again)
    assert read.fingerprint() == graph.fingerprint()
    assert flatbuffer.write_tflite(read) == again


def _onnx(data: bytes) -> None:
    from cactus_edge.onnx_io import quantized, reading, translate

    file = reading.read(data)
    if quantized.is_quantized(file):
        quantized.translate(file)
    else:
        translate.translate(file)


def _checkpoint(data: bytes) -> None:
    from cactus_edge.train import checkpoint

    checkpoint.load_model(_file(data, "model.safetensors"))


def _recipe(data: bytes) -> None:
    from cactus_edge.train.recipe import format_recipe, load_recipe, parse_recipe

    recipe = load_recipe(_file(data, "recipe.toml"))
    assert parse_recipe(format_recipe(recipe)) == recipe


def _certificate(data: bytes) -> None:
    model, images = seeds.certified()
    reader = Reader(io.BytesIO(data), "fuzzed")
    for _ in reader.samples():
        pass
    reader.problems()
    check(Reader(io.BytesIO(data), "fuzzed"), [model], images)


def _query(data: bytes) -> None:
    graph = seeds.queried()
    query = vnnlib.parse(data, "fuzzed")
    vnnlib.bind(query, graph, "stored" if query.input.stored else "real")


def _arrays(data: bytes) -> None:
    path = _file(data, "data.npz")
    datasets.load(path, "test")


def _radii(data: bytes) -> None:
    suffix = {b"\x93": ".npy", b"P": ".npz", b"[": ".json"}.get(data[:1], ".csv")
    radii.read_radii(seeds.queried(), _file(data, f"radii{suffix}"), "levels")


@contextmanager
def _published(name: str, files: dict[str, bytes]) -> Iterator[None]:
    """Files of a public data set where they are looked up."""
    folder = _folder() / name
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    before = os.environ.get(datasets.DATA_VARIABLE)
    os.environ[datasets.DATA_VARIABLE] = str(_folder())
    try:
        yield
    finally:
        if before is None:
            del os.environ[datasets.DATA_VARIABLE]
        else:
            os.environ[datasets.DATA_VARIABLE] = before


def _images(data: bytes) -> None:
    labels = gzip.compress(seeds.idx(np.zeros(2, np.uint8)), 1)
    files = {"t10k-images-idx3-ubyte.gz": data, "t10k-labels-idx1-ubyte.gz": labels}
    with _published("mnist", files):
        datasets.load("mnist", "test")


def _archive(data: bytes) -> None:
    with _published("cifar10", {"cifar-10-binary.tar.gz": data}):
        datasets.load("cifar10", "test")


def _flights(data: bytes) -> None:
    files = {"train_FD001.txt": data, "test_FD001.txt": data, "RUL_FD001.txt": b"3\n"}
    with _published("turbofan", files):
        datasets.load("turbofan", "train")


def _faults(data: bytes) -> None:
    fault_report.load(_file(data, "faults.json"))


@functools.cache
def _key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(32))


def _signature(data: bytes) -> None:
    """The bytes as a signature, and as what somebody with the key has signed."""
    key = _key()
    signed = signing.Signed(
        signing.key_id(key.public_key()),
        key.sign(b"DSSEv1 %d %s %d %s" % (28, signing.PAYLOAD_TYPE.encode(), len(data), data)),
    )
    envelope = signing.Envelope(data, signing.PAYLOAD_TYPE, (signed,))
    signing.opened(msgspec.json.encode(envelope) + b"\n", key.public_key(), "fuzzed")


# Checksums and lengths refuse nearly every changed file; these targets have them set right, so that
# what lies behind is reached.
def _resealed(data: bytes) -> None:
    """A certificate whose lines, digest and summary are in order, as a forger would see to it."""
    head, *samples = data.splitlines() or [b""]
    try:
        lines = [msgspec.json.decode(line, type=Sample) for line in samples[:-1]]
        content = encoded(msgspec.json.decode(head, type=Head), lines)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise DataError("no lines of a certificate") from None
    _certificate(content)


def _tensors(data: bytes) -> None:
    """The JSON of a checkpoint's header up to a zero byte, then tensors."""
    header, _, values = data.partition(b"\0")
    _checkpoint(len(header).to_bytes(8, "little") + header + values)


def _member(data: bytes) -> None:
    """One array of an archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("x_train", "x_test"):
            archive.writestr(f"{name}.npy", data)
        for name in ("y_train", "y_test"):
            archive.writestr(f"{name}.npy", seeds.npy(np.arange(2)))
    _arrays(stream.getvalue())


def _unpacked_images(data: bytes) -> None:
    _images(gzip.compress(data, 1))


def _unpacked_archive(data: bytes) -> None:
    """A tape archive with the checksums of its headers set right."""
    blocks = bytearray(data)
    for start in range(0, len(blocks) - 511, 512):
        block = blocks[start : start + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            blocks[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    _archive(gzip.compress(bytes(blocks), 1))


_MODEL, _DATA = (UnsupportedModelError,), (DataError,)
TARGETS = {
    target.name: target
    for target in (
        Target("tflite", _tflite, _MODEL, seeds.tflite, 4096, _written),
        Target("onnx", _onnx, _MODEL, seeds.onnx),
        Target("checkpoint", _checkpoint, _DATA, seeds.checkpoint, 8192),
        Target("recipe", _recipe, _DATA, seeds.recipe),
        Target("certificate", _certificate, _DATA, seeds.certificate, 16384),
        Target("query", _query, _DATA, seeds.query, 2048),
        Target("arrays", _arrays, _DATA, seeds.arrays),
        Target("radii", _radii, (UsageError,), seeds.radii, 2048),
        Target("images", _images, _DATA, seeds.images, 1024),
        Target("archive", _archive, _DATA, seeds.archive),
        Target("flights", _flights, _DATA, seeds.flights, 8192),
        Target("faults", _faults, _DATA, seeds.faults, 8192),
        Target("signature", _signature, _DATA, seeds.signature),
        Target("certificate-resealed", _resealed, _DATA, seeds.certificate, 16384),
        Target("checkpoint-tensors", _tensors, _DATA, seeds.tensors, 8192),
        Target("arrays-member", _member, _DATA, seeds.member, 512),
        Target("images-unpacked", _unpacked_images, _DATA, seeds.unpacked_images, 512),
        Target("archive-unpacked", _unpacked_archive, _DATA, seeds.unpacked_archive, 16384),
    )
}
