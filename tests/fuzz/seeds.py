"""Small valid files of every kind, from which made-up ones descend."""

from __future__ import annotations

import functools
import gzip
import io
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from cactus_edge import certificate as certificates
from cactus_edge import fault_report, flatbuffer, signing
from cactus_edge.certify import Request, Settings, certify
from cactus_edge.datasets import Dataset
from cactus_edge.datasets.turbofan import CYCLES
from cactus_edge.graph import FullyConnected, Graph, Quantization, Tensor, Weights
from cactus_edge.inputs import Perturbation
from tests.foreign import FAMILY, made
from tests.graphs import random_graph

ROOT = Path(__file__).resolve().parents[2]
STORED = Path(__file__).with_name("stored")


def linear(inputs: int = 4, classes: int = 3, bits: int = 8) -> Graph:
    """One layer: the smallest model there is."""
    rng = np.random.default_rng(bits)
    weights = Weights(
        rng.integers(-7, 8, (classes, inputs)), bits, np.full(1, 0.01, np.float32).view(np.uint32)
    )
    tensors = (
        Tensor("x", (1, inputs), quantization=Quantization.of(1 / 255, -128)),
        Tensor("y", (1, classes), quantization=Quantization.of(0.02, 3)),
    )
    layer = FullyConnected(
        name="layer", inputs=(0,), output=1, weights=weights, bias=np.arange(classes)
    )
    return Graph(tensors, (layer,), 0, 1)


def tflite() -> list[bytes]:
    """One layer, two graphs of our own with int4 weights, and every operator by itself."""
    own = [
        flatbuffer.write_tflite(
            random_graph(np.random.default_rng(seed), shape=(1, 3, 3, 2), depth=3, bits=(8, 4))
        )
        for seed in range(2)
    ]
    whole = [flatbuffer.write_tflite(linear()), *own, *(made(name, 0) for name in FAMILY)]
    return sorted(whole, key=len)


def onnx() -> list[bytes]:
    """Float networks with every operator, and two that ONNX Runtime's own tool has quantized."""
    from tests.onnx_io.models import RandomModel

    quantized = sorted(STORED.glob("quantized-*.onnx"))
    return [
        *(RandomModel(seed).content() for seed in range(1, 12)),
        *(path.read_bytes() for path in quantized),
    ]


def recipe() -> list[bytes]:
    """The repository's own."""
    return [path.read_bytes() for path in sorted((ROOT / "recipes").rglob("*.toml"))]


def checkpoint() -> list[bytes]:
    """A small network as a training run writes it, with ranges and masks."""
    import torch

    from cactus_edge.train import checkpoint as checkpoints
    from cactus_edge.train.recipe import parse_recipe
    from cactus_edge.train.zoo import build

    text = (ROOT / "recipes" / "digits.toml").read_text(encoding="utf-8")
    network = build("mlp", (3,), 2, 0.02)
    name = next(iter(network.state_dict()))
    mask = torch.ones_like(network.state_dict()[name], dtype=torch.bool)
    with tempfile.TemporaryDirectory() as folder:
        ranges = {"relu": torch.tensor(1.5)}
        checkpoints.save_model(
            Path(folder), network, parse_recipe(text), ranges, "0" * 64, {"p": {name: mask}}
        )
        return [(Path(folder) / checkpoints.MODEL_FILE).read_bytes()]


def tensors() -> list[bytes]:
    """The same, as header and values with a zero byte between."""
    (content,) = checkpoint()
    length = int.from_bytes(content[:8], "little")
    return [content[8 : 8 + length] + b"\0" + content[8 + length :]]


@functools.cache
def certified() -> tuple[bytes, Dataset]:
    """A model of one layer, and what it is certified on."""
    images = np.random.default_rng(0).random((3, 4), dtype=np.float32)
    data = Dataset("made-up", images, np.array([0, 1, 2]), 3, "test", "5e" * 32)
    return flatbuffer.write_tflite(linear()), data


def certificate() -> list[bytes]:
    """As ``made_certificates`` has written them, which takes a minute where nothing is compiled."""
    return [path.read_bytes() for path in sorted(STORED.glob("certificate-*.jsonl"))]


def made_certificates() -> list[bytes]:
    """Of each kind of property."""
    model, data = certified()
    found: list[bytes] = []
    for perturbation, method in (
        (Perturbation.levels(2), "interval"),
        (Perturbation("epsilon", Perturbation.levels(1).radius / 255), "linear"),
        (Perturbation.each("levels", (1, 0, 2, 3)), "complete"),
    ):
        stream = io.BytesIO()
        request = Request(
            data, perturbation, models=(("model.tflite", model),), method=method,
            attack=Settings(steps=2),
        )  # fmt: skip
        certify(request, stream)
        found.append(stream.getvalue())
    stream = io.BytesIO()
    certify(replace(request, perturbation=Perturbation.levels(4), each_radius=True), stream)
    return [*found, stream.getvalue()]


@functools.cache
def queried() -> Graph:
    """The model that queries and radii are about."""
    return linear(inputs=2, classes=2)


def query() -> list[bytes]:
    """Both versions of VNN-LIB, with disjunctions and arithmetic."""
    first = """; a comment
(declare-const X_0 Real)(declare-const X_1 Real)
(declare-const Y_0 Real)(declare-const Y_1 Real)
(assert (>= X_0 0.1))(assert (<= X_0 0.25))(assert (and (>= X_1 0)(< X_1 5e-1)))
(assert (or (and (>= Y_0 Y_1)(<= Y_0 2.5)) (and (> (+ Y_1 (* 2 Y_0)) 0.5))))
"""
    second = """(vnnlib-version <2.0>)
(declare-network net (declare-input X real [1,2]) (declare-output Y real [1,2] "name"))
(assert (and (<= 0 X[0,0] 1) (<= 0 X[0,1] (/ 1 2))))
(assert (not (!= (- Y[0,0]) (+ Y[0,1] 1 -0.5))))
"""
    stored = second.replace("real", "int8").replace("(/ 1 2)", "100")
    return [text.encode() for text in (first, second, stored)]


def _archived(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def arrays() -> list[bytes]:
    """Pixels, and numbers with their ranges; stored and compressed."""
    pixels = np.arange(16, dtype=np.uint8).reshape(2, 8)
    labels = np.arange(2)
    named = {"x_train": pixels, "y_train": labels, "x_test": pixels, "y_test": labels}
    scaled = named | {"lower": np.float64(-1), "upper": np.float32(20)}
    stream = io.BytesIO()
    np.savez_compressed(stream, **named)
    return [_archived(**named), _archived(**scaled), stream.getvalue()]


def npy(array: np.ndarray) -> bytes:
    """A file of one array."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def member() -> list[bytes]:
    """One array of an archive."""
    return [npy(np.ones((2, 3), np.uint8))]


def radii() -> list[bytes]:
    """Each form that is read."""
    return [npy(np.array([1.0, 2.0])), _archived(radii=np.array([1, 2])), b'["1", 2]', b"1,2\n"]


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    sizes = np.array([0x0800 + array.ndim, *array.shape], ">u4")
    return sizes.tobytes() + array.astype(np.uint8).tobytes()


def unpacked_images() -> list[bytes]:
    """Two images as MNIST stores them, not packed."""
    return [idx(np.ones((2, 3, 3)))]


def images() -> list[bytes]:
    """Two images as MNIST stores them."""
    return [gzip.compress(idx(np.ones((2, 3, 3))), 1, mtime=0)]


def unpacked_archive() -> list[bytes]:
    """Two images as CIFAR-10 stores them, not packed, without the zeros at the end."""
    content = bytes(3073) + b"\1" + bytes(3072)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return [stream.getvalue()[:8192]]


def archive() -> list[bytes]:
    """The same, packed."""
    return [gzip.compress(unpacked_archive()[0], mtime=0)]


def flights() -> list[bytes]:
    """Two engines with few flights more than a window has."""
    rows = [
        f"{engine} {cycle} 0 0 100 " + " ".join(str(cycle + s) for s in range(21))
        for engine in (1, 2)
        for cycle in range(1, CYCLES + 2)
    ]
    return ["\n".join(rows).encode()]


def faults() -> list[bytes]:
    """A report on one sample and one layer."""
    model = fault_report.Model("model.tflite", "0" * 64, "0" * 64, 100)
    fault = fault_report.Fault("weights", 1, 2, 3, 7, "tflite-reference", "0100")
    finding = fault_report.Finding("refuted", 1, 2, fault)
    report = fault_report.Report(
        fault_report.FORMAT, fault_report.VERSION, "cactus-edge 0", "claim", model,
        {"kind": "levels"}, "levels", "1", "argmax", fault_report.Data("d", "test", "0" * 64, 0, 1),
        fault_report.FaultModel((0,)), ("tflite-reference",), {},
        (fault_report.Layer(0, "l", "CONV_2D", 8, 0, "", (("a", "b"),), {"refuted": 1}),),
        {"refuted": 1}, (fault_report.Sample(0, 1, 1, "refuted", (finding,)),),
    )  # fmt: skip
    return [fault_report.encode(report)]


def signature() -> list[bytes]:
    """A statement to be signed."""
    data = certificates.Data("d", "test", "0" * 64, 0, 1)
    statement = signing.Statement(
        signing.STATEMENT_TYPE,
        (signing.Subject("model.tflite", signing.Digest("0" * 64)),),
        signing.PREDICATE_TYPE,
        signing.Predicate("cactus_edge 0", "c.json", ("model.tflite",), data, "", ""),
    )
    return [msgspec.json.encode(statement)]
