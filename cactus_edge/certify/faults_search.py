"""Decide one layer for many samples: hulls of whole channels first, then ever fewer flips.

What bounds leave open is tried on the sample itself and, where a strength is given, attacked. A
refutation counts only after the reference executor has reproduced it on the faulty graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cactus_edge import decision
from cactus_edge.certify import margin
from cactus_edge.certify.attack import Settings, search
from cactus_edge.certify.faults_layer import Base, Layer, Planes, Reads
from cactus_edge.certify.faults_sites import Channel, Site
from cactus_edge.certify.faults_suffix import Box
from cactus_edge.execute import execute
from cactus_edge.graph import BoolArray, Int64Array

_BLOCK_BYTES = 1 << 27


@dataclass(frozen=True)
class Effort:
    """``rows``: bounds propagated for one sample and layer before it is left ``unknown``.

    ``attack``: strength of the attack on what stays open, None for none; ``tries``: how many open
    flips are attacked. ``counted``: decide every site instead of stopping at a refutation.
    """

    rows: int = 1 << 16
    attack: Settings | None = None
    tries: int = 4
    counted: bool = False


@dataclass(frozen=True, eq=False)
class Refutation:
    """A verified fault: the site, the stored integer before and after, the misclassified input."""

    site: Site
    value: int
    flipped: int
    point: Int64Array


@dataclass(frozen=True)
class Outcome:
    """``complete``: every covered site is safe; ``safe`` and ``critical`` count sites."""

    complete: bool
    safe: int
    critical: int
    refutation: Refutation | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples with their boxes, and the twin's activations on boxes and on the samples.

    ``stored``, ``lower`` and ``upper`` int64 [samples, ...]; ``proved`` bool [samples]: the label
    wins everywhere in the box when nothing is flipped.
    """

    stored: Int64Array
    lower: Int64Array
    upper: Int64Array
    labels: Int64Array
    base: Base
    points: Base
    proved: BoolArray


@dataclass(frozen=True, eq=False)
class _Node:
    """Rows ``start`` to ``stop - 1`` of some planes."""

    planes: Planes
    start: int
    stop: int


class _Case:
    """One sample and one layer while it is being decided."""

    def __init__(self, layer: Layer, batch: Batch, sample: int, effort: Effort) -> None:
        self.layer, self.batch, self.sample, self.effort = layer, batch, sample, effort
        self.label = batch.labels[sample : sample + 1]
        self.is_point = bool((batch.lower[sample] == batch.upper[sample]).all())
        self.point_reads = layer.reads(batch.points, sample)
        self.point_base = layer.accumulators(self.point_reads)
        self.critical = 0
        self.refutation: Refutation | None = None
        self.spent = 0

    @property
    def done(self) -> bool:
        """Whether nothing more is to be found."""
        return self.refutation is not None and not self.effort.counted

    def probe(self, channels: Int64Array) -> None:
        """Try on the sample the two flips of each channel that change its sum the most."""
        rows: list[tuple[int, Channel]] = []
        for channel in channels.tolist():
            sites = self.layer.sites.channel(channel)
            if not sites.column.size:
                continue
            total = self.layer.read_of(self.point_reads.low, channel).sum(axis=0)
            total = total + self.layer.sites.offset * self.layer.positions
            read = np.where(sites.column >= 0, total[sites.column], self.layer.positions)
            effect = (sites.flipped - sites.value) * read
            rows.append((channel, sites.subset(np.unique([effect.argmin(), effect.argmax()]))))
        self.on_sample(rows, count=False)

    def on_sample(self, groups: list[tuple[int, Channel]], *, count: bool) -> None:
        """Evaluate flips on the sample itself; count those that misclassify, verify one."""
        if not groups:
            return
        layer, graph = self.layer, self.layer.whole.graph
        planes = [layer.planes(c, s, self.point_reads, self.point_base) for c, s in groups]
        rows = np.concatenate([p.low for p in planes])
        channels = np.repeat([p.channel for p in planes], [len(p.low) for p in planes])
        samples = np.full(len(rows), self.sample)
        logits = layer.logits(self.batch.points, samples, channels, rows)
        wrong = decision.surely_wrong(graph, logits, np.repeat(self.label, len(rows)))
        if count:
            self.critical += int(np.concatenate([p.count for p in planes])[wrong].sum())
        if not wrong.any() or self.refutation is not None:
            return
        chosen = int(wrong.argmax())
        for part in planes:
            if chosen < len(part.low):
                stored = self.batch.stored[self.sample]
                self.refutation = self.verified(
                    part.channel, part.sites, part.first[chosen], stored
                )
                assert self.refutation is not None, "bounds at a point differ from the executor"
                return
            chosen -= len(part.low)

    def verified(
        self, channel: int, sites: Channel, position: int, point: Int64Array
    ) -> Refutation | None:
        """The fault and the input, if the reference executor misclassifies it."""
        site = self.layer.sites.site(channel, int(sites.column[position]), int(sites.bit[position]))
        broken = self.layer.sites.faulty(self.layer.whole.graph, site)
        if not decision.surely_wrong(broken, execute(broken, point[None]), self.label)[0]:
            return None
        value, flipped = int(sites.value[position]), int(sites.flipped[position])
        return Refutation(site, value, flipped, point)

    def refine(self, channels: Int64Array, reads: Reads) -> tuple[int, bool]:
        """Divide the sites of channels until bounds decide them; (safe sites, all are safe)."""
        layer = self.layer
        base = layer.accumulators(reads)
        safe, complete = 0, True
        per_channel = 16 * layer.positions * max(1, layer.sites.weights.shape[1] * 8)
        step = max(1, _BLOCK_BYTES // per_channel)
        for start in range(0, len(channels), step):
            nodes: list[_Node] = []
            for channel in channels[start : start + step].tolist():
                planes = layer.planes(channel, layer.sites.channel(channel), reads, base)
                if len(planes.low):
                    nodes.append(_Node(planes, 0, len(planes.low)))
            found, whole = self._divide(nodes, reads)
            safe, complete = safe + found, complete and whole
            if self.done:
                return safe, False
        return safe, complete

    def _divide(self, nodes: list[_Node], reads: Reads) -> tuple[int, bool]:
        batch, safe, complete = self.batch, 0, True
        while nodes and not self.done:
            if self.spent + len(nodes) > self.effort.rows:
                return safe, False
            self.spent += len(nodes)
            low = np.stack([n.planes.low[n.start : n.stop].min(axis=0) for n in nodes])
            high = np.stack([n.planes.high[n.start : n.stop].max(axis=0) for n in nodes])
            channels = np.array([n.planes.channel for n in nodes])
            samples = np.full(len(nodes), self.sample)
            labels = np.repeat(self.label, len(nodes))
            _, proved = self.layer.prove(batch.base, samples, channels, (low, high), labels)
            left: list[_Node] = []
            single: list[tuple[int, Channel]] = []
            for node, good in zip(nodes, proved.tolist(), strict=True):
                if good:
                    safe += int(node.planes.count[node.start : node.stop].sum())
                elif node.stop - node.start > 1:
                    middle = (node.start + node.stop) >> 1
                    left.append(replace(node, stop=middle))
                    left.append(replace(node, start=middle))
                else:
                    single.append((node.planes.channel, node.planes.of_row(node.start)))
            by_margin, single = self._margins(single)
            safe += by_margin
            complete = complete and not single
            self.on_sample(single, count=True)
            self._attack(single)
            nodes = left
        return safe, complete and not nodes

    def _margins(self, single: list[tuple[int, Channel]]) -> tuple[int, list[tuple[int, Channel]]]:
        """Sites of the last layer that its margins decide: their number, and the others."""
        layer = self.layer.whole.layer
        if self.is_point or layer is None or not self.layer.is_last or not single:
            return 0, single
        hidden = self.layer.whole.box(self.batch.base, layer.source)
        low, high = (end[self.sample : self.sample + 1] for end in hidden)
        gaps = decision.gaps(self.layer.whole.graph, int(self.label[0]), len(layer.bias))[None]
        decided, rest = 0, list[tuple[int, Channel]]()
        for channel, sites in single:
            good = np.zeros(sites.column.size, bool)
            for i, column in enumerate(sites.column.tolist()):
                change = int(sites.flipped[i] - sites.value[i])
                weights, bias = layer.weights.copy(), layer.bias.copy()
                if column < 0:
                    bias[channel] += change
                else:
                    weights[channel, column] += change
                    bias[channel] += change * self.layer.sites.offset
                changed = replace(layer, weights=weights, bias=bias)
                good[i] = margin.wins(changed, low, high, self.label, gaps)[1].all()
            decided += int(good.sum())
            if not good.all():
                rest.append((channel, sites.subset(np.flatnonzero(~good))))
        return decided, rest

    def _attack(self, single: list[tuple[int, Channel]]) -> None:
        settings = self.effort.attack
        if settings is None or self.is_point or self.refutation is not None:
            return
        one = slice(self.sample, self.sample + 1)
        batch, graph = self.batch, self.layer.whole.graph
        for channel, sites in single[: self.effort.tries]:
            site = self.layer.sites.site(channel, int(sites.column[0]), int(sites.bit[0]))
            broken = self.layer.sites.faulty(graph, site)
            box = batch.stored[one], batch.lower[one], batch.upper[one], self.label
            point = search(broken, *box, settings)[0]
            if point is None:
                continue
            inside = (batch.lower[self.sample] <= point) & (point <= batch.upper[self.sample])
            if inside.all():
                self.refutation = self.verified(channel, sites, 0, point)
                if self.refutation is not None:
                    return


def decide(layer: Layer, batch: Batch, effort: Effort) -> list[Outcome]:
    """What single flips in ``layer`` can do to each sample.

    ``critical`` counts, in a counted effort, the sites that misclassify the sample itself.
    """
    count = len(batch.labels)
    reads = [layer.reads(batch.base, i) for i in range(count)]
    failing = _failing(layer, batch, reads)
    covered = layer.sites.count - layer.sites.uncovered
    outcomes: list[Outcome] = []
    every = np.arange(layer.op.channels)
    for i, channels in enumerate(failing):
        if not layer.suffix.reaches or (batch.proved[i] and not channels.size):
            proved = bool(batch.proved[i])
            outcomes.append(Outcome(proved, covered if proved else 0, 0, None))
            continue
        case = _Case(layer, batch, i, effort)
        case.probe(channels if batch.proved[i] else every)
        safe, complete = 0, False
        if batch.proved[i] and not case.done:
            safe, complete = case.refine(channels, reads[i])
            rest = np.setdiff1d(every, channels)
            safe += int(layer.sites.per_channel[rest].sum())
        outcomes.append(Outcome(complete, safe, case.critical, case.refutation))
    return outcomes


def _failing(layer: Layer, batch: Batch, reads: list[Reads]) -> list[Int64Array]:
    """For each sample the channels whose hull does not prove the label's win."""
    samples: list[int] = []
    channels: list[Int64Array] = []
    low: list[Int64Array] = []
    high: list[Int64Array] = []
    for i in np.flatnonzero(batch.proved).tolist():
        hull = layer.hulls(reads[i])
        plain: Box = tuple(layer.stored(end.T).T for end in layer.accumulators(reads[i]))  # pyright: ignore
        changed = ((hull[0] != plain[0]) | (hull[1] != plain[1])).any(axis=1)
        index = np.flatnonzero(changed)
        samples += [i] * index.size
        channels.append(index)
        low.append(hull[0][index])
        high.append(hull[1][index])
    failing = [np.zeros(0, np.int64)] * len(batch.labels)
    if not samples:
        return failing
    rows = np.array(samples)
    channel = np.concatenate(channels)
    box = np.concatenate(low), np.concatenate(high)
    lead, proved = layer.prove(batch.base, rows, channel, box, batch.labels[rows])
    for i in np.unique(rows[~proved]).tolist():
        chosen = np.flatnonzero((rows == i) & ~proved)
        failing[i] = channel[chosen[np.argsort(lead[chosen], kind="stable")]]
    return failing
