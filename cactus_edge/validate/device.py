"""A board on a serial line against the reference executor, bit for bit, and against ``certify``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from cactus_edge import decision, inputs, profiles
from cactus_edge.certify import Certifier
from cactus_edge.csource.console import Feature
from cactus_edge.errors import CactusEdgeError, ToolError, UsageError, counted
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.validate.compare import LAYER_SAMPLES, Difference
from cactus_edge.validate.console import Console, Hello, Verdict, equal

_LARGEST_LEVELS = 255
Progress = Callable[[int, int], None]


class VerdictDifference(msgspec.Struct, frozen=True):
    """The first field of a verdict that is not the host's, as text."""

    sample: int
    field: str
    expected: str
    found: str


class DeviceReport(msgspec.Struct, frozen=True):
    """What a board computed; see ``PeerResult`` for the counts.

    ``verdicts`` are samples on which the board's proof within ``levels`` was compared, field by
    field, ``certified`` how many it proved; all 0 for firmware without. ``ticks_median`` is of one
    inference, by a counter of the board of ``tick_rate`` Hz; 0 without one. ``stack_bytes`` is the
    deepest stack below the console's start, of ``stack_available``; both 0 where the board does not
    know. ``repeated`` counts requests that were sent again.
    """

    device: str
    profile: str
    fingerprint: str
    crc32: str
    table_bytes: int
    arena_bytes: int
    arena_lower_bound: int
    samples: int
    elements: int
    mismatches: int
    layer_elements: int
    layer_mismatches: int
    levels: int
    verdicts: int
    verdict_mismatches: int
    certified: int
    tick_rate: int
    ticks_median: int
    stack_bytes: int
    stack_available: int
    repeated: int
    first: Difference | None = None
    first_verdict: VerdictDifference | None = None

    @property
    def agrees(self) -> bool:
        """Everything that was compared is equal."""
        return not (self.mismatches or self.layer_mismatches or self.verdict_mismatches)


def validate_device(
    graph: Graph,
    stored: Int64Array,
    console: Console,
    name: str,
    *,
    levels: int = 1,
    layer_samples: int = LAYER_SAMPLES,
    progress: Progress | None = None,
) -> DeviceReport:
    """Run the samples on a board, and its proofs where its firmware has them.

    Args:
        graph: as read from the file; it has to be the one that the firmware was made of.
        stored: integers [n, ...], at least one sample.
        console: the board.
        name: of the port, for messages.
        levels: radius of the proofs, 0 to 255 stored steps.
        layer_samples: on how many samples every layer is compared, where the firmware tells them.
        progress: called with (samples done, samples in all).

    Raises:
        UsageError: the board runs another model, or a radius that it does not take.
        ToolError: no answer, damaged flash, or an error of the model.
    """
    if not 0 <= levels <= _LARGEST_LEVELS:
        raise UsageError(f"--levels {levels}: give 0 to {_LARGEST_LEVELS}")
    hello = console.hello()
    resolved = _same_model(graph, hello, name)
    if not console.verify():
        raise ToolError(
            f"{name}: the CRC of weights and tables in flash is wrong; write the firmware again"
        )
    data = (stored & 0xFF).astype(np.uint8).reshape(len(stored), -1)
    comparison = _Comparison(resolved, stored)
    verdicts: list[Verdict] = []
    by_layer = layer_samples if Feature.LAYERS in hello.features else 0
    ticks: list[int] = []
    for index, sample in enumerate(data):
        if index < by_layer:
            logits, parts = console.layers(sample.tobytes(), comparison.sizes)
            comparison.layers(index, parts)
        else:
            taken, logits = console.run(sample.tobytes(), hello.output_bytes)
            ticks.append(taken)
        if not comparison.logits(index, logits) and by_layer and comparison.first is None:
            comparison.layers(index, console.layers(sample.tobytes(), comparison.sizes)[1])
        if Feature.CERTIFY in hello.features:
            verdicts.append(console.certify(sample.tobytes(), levels, hello.output_bytes))
        if progress:
            progress(index + 1, len(data))
    used, available = console.memory()
    wrong, first = _compare_verdicts(graph, hello.profile, stored, levels, verdicts)
    return DeviceReport(
        device=name,
        profile=hello.profile,
        fingerprint=hello.fingerprint,
        crc32=f"{hello.crc32:08x}",
        table_bytes=hello.table_bytes,
        arena_bytes=hello.arena_bytes,
        arena_lower_bound=hello.arena_lower_bound,
        samples=len(data),
        elements=comparison.elements,
        mismatches=comparison.mismatches,
        layer_elements=comparison.layer_elements,
        layer_mismatches=comparison.layer_mismatches,
        levels=levels,
        verdicts=len(verdicts),
        verdict_mismatches=wrong,
        certified=sum(verdict.certified for verdict in verdicts),
        tick_rate=hello.tick_rate,
        ticks_median=statistics.median_low(ticks) if ticks and hello.tick_rate else 0,
        stack_bytes=used,
        stack_available=available,
        repeated=console.repeated,
        first=comparison.first or comparison.first_logit,
        first_verdict=first,
    )


def _same_model(graph: Graph, hello: Hello, name: str) -> Graph:
    """The graph under the board's profile.

    Raises:
        UsageError: it is not the board's.
    """
    try:
        resolved = profiles.resolve(graph, hello.profile)
    except CactusEdgeError as error:
        raise UsageError(f"{name}: the board rounds as '{hello.profile}': {error}") from None
    ours = (
        resolved.fingerprint(),
        resolved.tensors[resolved.core_input].size,
        resolved.tensors[resolved.logits].size,
        len(resolved.core),
    )
    theirs = (hello.fingerprint, hello.input_bytes, hello.output_bytes, hello.layers)
    if ours != theirs:
        raise UsageError(
            f"{name}: the board runs another model: graph {theirs[0][:12]} with "
            f"{counted(theirs[1], 'input')} and {counted(theirs[2], 'output')}, the file is "
            f"{ours[0][:12]} with {ours[1]} and {ours[2]} under profile {hello.profile}; write "
            "this model's firmware to the board, or give its file"
        )
    return resolved


class _Comparison:
    """Logits of all samples and layers of some against the reference executor."""

    def __init__(self, graph: Graph, stored: Int64Array) -> None:
        self._graph, self._stored = graph, stored
        self.expected = execute(graph, stored).astype(np.int64)
        self.sizes = [graph.tensors[op.output].size for op in graph.core]
        self.elements = self.mismatches = self.layer_elements = self.layer_mismatches = 0
        self.first: Difference | None = None
        self.first_logit: Difference | None = None

    def logits(self, sample: int, found: bytes) -> bool:
        """Count one sample; whether it is equal."""
        expected = self.expected[sample]
        self.elements += expected.size
        wrong = np.argwhere(~equal(found, expected))
        self.mismatches += len(wrong)
        if len(wrong) and self.first_logit is None:
            place = len(self._graph.core) - 1
            self.first_logit = self._difference(place, sample, wrong[0], expected, found)
        return not len(wrong)

    def layers(self, sample: int, parts: list[bytes]) -> None:
        """The same for the output of every operator."""
        values = execute_all(self._graph, self._stored[sample : sample + 1])
        for index, (op, found) in enumerate(zip(self._graph.core, parts, strict=True)):
            expected = values[op.output][0].astype(np.int64)
            self.layer_elements += expected.size
            wrong = np.argwhere(~equal(found, expected))
            self.layer_mismatches += len(wrong)
            if len(wrong) and self.first is None:
                self.first = self._difference(index, sample, wrong[0], expected, found)

    def _difference(
        self, layer: int, sample: int, where: Int64Array, expected: Int64Array, found: bytes
    ) -> Difference:
        op = self._graph.core[layer]
        position = tuple(int(n) for n in where)
        kind = self._graph.tensors[op.output].dtype.value
        value = expected[position]
        flat = int(np.ravel_multi_index(position, expected.shape))
        stored = np.frombuffer(found, kind)
        return Difference(
            layer=layer,
            name=op.name,
            kind=op.kind,
            sample=sample,
            position=position,
            expected=int(value),
            found=int(stored[flat]) if flat < stored.size else -1,
        )


def _compare_verdicts(
    graph: Graph, profile: str, stored: Int64Array, levels: int, verdicts: Sequence[Verdict]
) -> tuple[int, VerdictDifference | None]:
    """How many are not ``Certifier``'s under the profile of the board, and the first of them."""
    if not verdicts:
        return 0, None
    resolved = profiles.resolve(graph, profile)
    logits = execute(resolved, stored).astype(np.int64).reshape(len(stored), -1)
    labels = decision.predict(logits)
    lower, upper = inputs.around(graph, stored, np.array(levels))
    certifier = Certifier(graph, [profile])
    lines = certifier.verdicts(0, stored, lower, upper, labels)
    ((low, high),) = certifier.bounds(lower, upper)
    kind = graph.tensors[graph.logits].dtype.value
    mismatches = 0
    first: VerdictDifference | None = None
    for sample, (line, verdict) in enumerate(zip(lines, verdicts, strict=True)):
        proved = line.verdict == "certified"
        method = "interval" if (verdict.leads >= 0).all() else "elided-margin"
        fields: list[tuple[str, object, object]] = [
            ("label", int(labels[sample]), verdict.label),
            ("certified", proved, verdict.certified),
            *(
                (name, ours[sample].tolist(), np.frombuffer(theirs, kind).tolist())
                for name, ours, theirs in (
                    ("logits", logits, verdict.logits),
                    ("lower", low, verdict.lower),
                    ("upper", high, verdict.upper),
                )
            ),
            ("method", line.method, method if proved else line.method),
        ]
        wrong = [field for field in fields if field[1] != field[2]]
        mismatches += bool(wrong)
        if wrong and first is None:
            name, ours, theirs = wrong[0]
            first = VerdictDifference(sample, name, str(ours), str(theirs))
    return mismatches, first
