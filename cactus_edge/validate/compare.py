"""Compare runtimes bit for bit, and name the first layer and element in which one differs.

Stock runtimes only show a model's output, so a layer is looked at through the *prefix*: the model
cut behind that layer. Our own show all layers of one run. Every layer of every runtime is compared
on a few samples and the logits on all of them; where logits differ all the same, the layers are
searched on the sample that differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from cactus_edge import profiles, universal
from cactus_edge.errors import CactusEdgeError, UsageError
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.validate import onnx_runtime
from cactus_edge.validate.child import Part
from cactus_edge.validate.runtimes import Peer, layers_at_once, peers, runner

LAYER_SAMPLES = 32
EMULATED_SAMPLES = 4
"""The same for an emulated processor, which takes seconds for a large model."""
Progress = Callable[[int, int], None]


class Difference(msgspec.Struct, frozen=True):
    """The first differing element: ``position`` are its coordinates in the layer's output."""

    layer: int
    name: str
    kind: str
    sample: int
    position: tuple[int, ...]
    expected: int
    found: int


class PeerResult(msgspec.Struct, frozen=True):
    """One runtime. ``status``: equal, different, absent, uncovered or error.

    ``uncovered``: the model rescales in a way that the runtime's profile does not describe.

    ``elements`` counts logits and ``layer_elements`` the elements of all layers that were compared;
    ``mismatches`` of both kinds are against the reference under the runtime's own profile.
    ``output`` is the SHA-256 of all logits.
    """

    name: str
    version: str
    profile: str
    status: str
    message: str = ""
    elements: int = 0
    mismatches: int = 0
    layer_elements: int = 0
    layer_mismatches: int = 0
    output: str = ""
    first: Difference | None = None


class Validation(msgspec.Struct, frozen=True):
    """A model on all runtimes.

    ``runtimes_differ`` counts logits on which at least two runtimes differ, ``decisions_differ``
    samples that two runtimes classify differently. Both are 0 for a universal model.
    ``model_sha256`` is that of the file, empty where a graph without one was given.
    """

    universal: bool
    samples: int
    peers: tuple[PeerResult, ...]
    outputs: int
    runtimes_differ: int
    decisions_differ: int
    model_sha256: str = ""

    @property
    def agrees(self) -> bool:
        """Every installed runtime equals its profile, and universal models have one output."""
        run = [peer for peer in self.peers if peer.status not in ("absent", "uncovered")]
        equal = all(peer.status == "equal" for peer in run)
        return bool(run) and equal and (self.outputs == 1 or not self.universal)


def validate_model(
    graph: Graph,
    inputs: Int64Array,
    *,
    data: bytes | None = None,
    candidates: Sequence[Peer] | None = None,
    layer_samples: int = LAYER_SAMPLES,
    progress: Progress | None = None,
) -> Validation:
    """Run a model on every runtime.

    Args:
        graph: as read from the file.
        inputs: stored integers [n, ...].
        data: the bytes that ``graph`` was read from; stock runtimes then run these very bytes,
            unless a QUANTIZE, SOFTMAX or DEQUANTIZE hides the stored logits.
        candidates: runtimes; all known ones without it.
        layer_samples: on how many samples every layer is compared, at least 1; an emulated
            processor takes ``EMULATED_SAMPLES`` at most.
        progress: called with (runtimes done, runtimes in all).
    """
    if layer_samples < 1:
        raise UsageError(f"{layer_samples} layer samples: at least one is needed")
    chosen = peers() if candidates is None else tuple(candidates)
    results: list[PeerResult] = []
    logits: list[Int64Array] = []
    reference = _Reference(graph, inputs, inputs[:layer_samples])
    for index, peer in enumerate(chosen):
        result, found = _validate_peer(reference, peer, data)
        results.append(result)
        if found is not None:
            logits.append(found.reshape(len(inputs), -1))
        if progress:
            progress(index + 1, len(chosen))
    stacked = np.stack(logits) if logits else np.zeros((1, len(inputs), 1), np.int64)
    decisions = stacked.argmax(axis=2)
    return Validation(
        universal=universal.is_universal(graph),
        samples=len(inputs),
        peers=tuple(results),
        outputs=len({result.output for result in results if result.output}),
        runtimes_differ=int((stacked != stacked[0]).any(axis=0).sum()),
        decisions_differ=int((decisions != decisions[0]).any(axis=0).sum()),
        model_sha256="" if data is None else hashlib.sha256(data).hexdigest(),
    )


def prefix(graph: Graph, index: int) -> Graph:
    """The core up to operator ``index``, with that operator's output as the model's output."""
    operators = graph.core[: index + 1]
    return Graph(graph.tensors, operators, graph.core_input, operators[-1].output)


@dataclass(frozen=True, eq=False)
class _Reference:
    """What the reference executor computes, once for each profile; layers of ``few`` samples."""

    graph: Graph
    inputs: Int64Array
    few: Int64Array
    logits: dict[str, Int64Array] = field(default_factory=dict)
    layers: dict[str, dict[int, Int64Array]] = field(default_factory=dict)

    def logits_under(self, profile: str) -> Int64Array:
        if len(self.few) == len(self.inputs):
            return self.layers_under(profile)[self.graph.logits]
        if profile not in self.logits:
            self.logits[profile] = execute(self.graph, self.inputs, profile)
        return self.logits[profile]

    def layers_under(self, profile: str) -> dict[int, Int64Array]:
        if profile not in self.layers:
            self.layers[profile] = execute_all(self.graph, self.few, profile)
        return self.layers[profile]


def _validate_peer(
    reference: _Reference, peer: Peer, data: bytes | None
) -> tuple[PeerResult, Int64Array | None]:
    graph, inputs = reference.graph, reference.inputs
    few = reference.few[:EMULATED_SAMPLES] if peer.is_emulated else reference.few
    head = (peer.name, peer.version, peer.profile)
    if peer.absence:
        return PeerResult(*head, "absent", peer.absence), None
    outside = profiles.uncovered(graph)
    if peer.profile in outside:
        return PeerResult(*head, "uncovered", outside[peer.profile]), None
    if peer.mode == onnx_runtime.MODE and (reason := onnx_runtime.outside(graph)):
        return PeerResult(*head, "uncovered", reason), None
    run = runner(peer, None if data is None else (graph, data))
    at_once = layers_at_once(peer)
    prefixes = [] if at_once else [prefix(graph, index) for index in range(len(graph.core))]

    def values(batch: Int64Array, *parts: Part) -> list[Int64Array]:
        """Outputs of the parts, then all layers of the batch."""
        if at_once:
            return [*run(parts), *at_once(graph, batch)]
        return run([*parts, *((part, batch) for part in prefixes)])

    try:
        expected = reference.logits_under(peer.profile)
        found, *layers = values(few, (graph, inputs))
        found = found.reshape(expected.shape)
        of_few = {i: x[: len(few)] for i, x in reference.layers_under(peer.profile).items()}
        first, elements, mismatches = _compare(graph, of_few, layers)
        wrong = np.argwhere(found != expected)
        if len(wrong) and first is None:
            sample = int(wrong[0][0])
            one = inputs[sample : sample + 1]
            again = execute_all(graph, one, peer.profile)
            first, _, _ = _compare(graph, again, values(one), sample)
    except (CactusEdgeError, OSError, ValueError) as error:
        return PeerResult(*head, "error", " ".join(str(error).split())), None
    result = PeerResult(
        *head,
        "different" if len(wrong) or mismatches else "equal",
        elements=expected.size,
        mismatches=len(wrong),
        layer_elements=elements,
        layer_mismatches=mismatches,
        output=hashlib.sha256(found.astype("<i2").tobytes()).hexdigest(),
        first=first,
    )
    return result, found


def _compare(
    graph: Graph,
    values: Mapping[int, Int64Array],
    layers: Sequence[Int64Array],
    offset: int = 0,
) -> tuple[Difference | None, int, int]:
    """The first difference, elements compared, mismatches; ``values`` are the reference's."""
    first: Difference | None = None
    elements = mismatches = 0
    for index, (op, found) in enumerate(zip(graph.core, layers, strict=True)):
        expected = values[op.output]
        different = np.argwhere(found.reshape(expected.shape) != expected)
        elements += expected.size
        mismatches += len(different)
        if len(different) and first is None:
            where = tuple(different[0].tolist())
            first = Difference(
                layer=index,
                name=op.name,
                kind=op.kind,
                sample=offset + where[0],
                position=where[1:],
                expected=int(expected[where]),
                found=int(found.reshape(expected.shape)[where]),
            )
    return first, elements, mismatches
