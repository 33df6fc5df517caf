"""A float ONNX file to integers: post-training quantization with calibration samples.

The float network is evaluated by ``lowering.stages`` in float64 NumPy, not by ONNX Runtime, because
what is calibrated is not the file: it is the network with folded normalization, equalized channels
and rounded weights, and its interval bounds where a radius is given. ONNX Runtime says whether the
translation is right, on some of the samples, at every import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from cactus_edge import files, flatbuffer, inputs, universal
from cactus_edge.constraints import validate
from cactus_edge.errors import UsageError
from cactus_edge.execute import execute
from cactus_edge.graph import Graph
from cactus_edge.lowering.assembly import Assembly
from cactus_edge.lowering.calibration import Calibration, calibrate
from cactus_edge.lowering.metadata import metadata_of
from cactus_edge.lowering.refine import clipped, corrected, equalized
from cactus_edge.lowering.shadow import LayerDifference, shadow_check
from cactus_edge.lowering.stages import FloatArray, Layer, Stage, run
from cactus_edge.lowering.weighted import LayerReport
from cactus_edge.onnx_io.building import Translation
from cactus_edge.onnx_io.reading import read
from cactus_edge.onnx_io.reference import difference
from cactus_edge.onnx_io.samples import Samples, load, real
from cactus_edge.onnx_io.translate import translate

_COMPARED = 16
_DECIDED = 64


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    Attributes:
        bits: width of the weights: 8, 4, 3 or 2.
        calibration: how activation ranges follow from samples.
        samples: how many are used, at least 1.
        universal: whether to move scales to where every runtime agrees.
        per_tensor: one scale for all channels of a layer.
        equalize: cross-layer equalization; of use with ``per_tensor``.
        correct_bias: take the mean error of rounded weights away.
        clip_weights: limit each channel's weights at the least squared error; None: below 8 bits.
    """

    bits: int = 8
    calibration: Calibration = field(default_factory=Calibration)
    samples: int = 512
    universal: bool = True
    per_tensor: bool = False
    equalize: bool = False
    correct_bias: bool = True
    clip_weights: bool | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a width or a number of samples that cannot be.
        """
        if self.bits not in (2, 3, 4, 8):
            raise UsageError(f"--bits {self.bits}: weights are deployed at 8, 4, 3 or 2 bits")
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples}: at least one is needed")


class ImportReport(msgspec.Struct, frozen=True):
    """What was done.

    Attributes:
        bits: width of the weights.
        samples: how many calibrated.
        universal: whether every runtime computes the same.
        float_difference: between the translation and ONNX Runtime, of the largest output.
        same_decisions: share of calibration samples on which integers decide as floats do.
        notes: what was left out or rewritten, by node.
        layers: see ``LayerReport``.
        shadow: see ``shadow_check``.
        bytes: of the file.
        sha256: of the file.
    """

    bits: int
    samples: int
    universal: bool
    float_difference: float
    same_decisions: float
    notes: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    shadow: tuple[LayerDifference, ...]
    bytes: int = 0
    sha256: str = ""


def import_onnx(content: bytes, samples: Samples, settings: Settings) -> tuple[Graph, ImportReport]:
    """A float ONNX model as an integer graph.

    Args:
        content: of the file.
        samples: for calibration; never of the test split.
        settings: see ``Settings``.

    Raises:
        UnsupportedModelError: something has no integer form; node, operator and remedy are named.
        DataError: the samples are not what the network takes.
        ToolError: the translation differs from ONNX Runtime, or the integers from the translation.
    """
    file = read(content)
    translation = translate(file)
    values = real(samples, translation.shape)
    compared = difference(file, translation, values[:_COMPARED])
    stages = equalized(translation.stages) if settings.equalize else translation.stages
    graph, assembly, reports = _quantized(stages, translation, values, settings)
    graph = replace(graph, metadata=_metadata(graph, content, samples, settings))
    validate(graph)
    shadow = shadow_check(graph, assembly.shadows, values[:_COMPARED])
    report = ImportReport(
        bits=settings.bits,
        samples=len(values),
        universal=universal.is_universal(graph),
        float_difference=compared,
        same_decisions=_same_decisions(graph, translation.stages, samples, values),
        notes=tuple(translation.notes),
        layers=tuple(reports),
        shadow=tuple(shadow),
    )
    return graph, report


def convert(
    source: Path, output: Path, calibration: str, settings: Settings, *, force: bool = False
) -> ImportReport:
    """Convert a float ``.onnx`` file to a ``.tflite`` file.

    Args:
        source: the ONNX file.
        output: the file to write.
        calibration: a data set's name or an ``.npz`` file.
        settings: see ``Settings``.
        force: replace ``output``.

    Raises:
        UsageError: a file that cannot be read, or an output that exists.
        UnsupportedModelError: see ``import_onnx``; nothing is written.
    """
    files.refuse_existing(output, force)
    content = files.read(source, "ONNX file")
    graph, report = import_onnx(content, load(calibration, settings.samples), settings)
    written = flatbuffer.save(graph, output, force)
    return msgspec.structs.replace(
        report, bytes=len(written), sha256=hashlib.sha256(written).hexdigest()
    )


def _quantized(
    stages: Sequence[Stage], translation: Translation, values: FloatArray, settings: Settings
) -> tuple[Graph, Assembly, list[LayerReport]]:
    clips = settings.bits < 8 if settings.clip_weights is None else settings.clip_weights
    shared = settings.per_tensor
    limited = clipped(stages, settings.bits, per_tensor=shared) if clips else list(stages)
    widths = {stage.name: settings.bits for stage in stages if isinstance(stage, Layer)}
    ranges = calibrate(stages, values, settings.calibration)

    def build(
        network: Sequence[Stage], like: Assembly | None = None
    ) -> tuple[Graph, Assembly, list[LayerReport]]:
        assembly = Assembly(
            network, ranges, translation.shape, widths, per_tensor=shared, like=like
        )
        graph, reports = assembly.build(settings.universal)
        return graph, assembly, reports

    built = build(limited)
    if not settings.correct_bias:
        return built
    shipped = {shadow.layer.name: shadow.layer.weight for shadow in built[1].shadows}
    biases = {s.name: s.bias for s in corrected(stages, shipped, values) if isinstance(s, Layer)}
    moved = [replace(s, bias=biases[s.name]) if isinstance(s, Layer) else s for s in limited]
    return build(moved, built[1])


def _same_decisions(
    graph: Graph, stages: Sequence[Stage], samples: Samples, values: FloatArray
) -> float:
    *_, (_, _, floats) = run(stages, values[:_DECIDED])
    integers = execute(graph, inputs.stored(graph, samples.images[:_DECIDED]))
    decisions = [x.reshape(len(x), -1).argmax(axis=1) for x in (floats, integers)]
    return float((decisions[0] == decisions[1]).mean())


def _metadata(
    graph: Graph, content: bytes, samples: Samples, settings: Settings
) -> tuple[tuple[str, bytes], ...]:
    provenance = {
        "onnx_sha256": hashlib.sha256(content).hexdigest(),
        "calibration": samples.name,
        "calibration_sha256": samples.sha256,
        "settings": msgspec.to_builtins(settings),
    }
    return metadata_of(graph, provenance, pixels=samples.pixels)
