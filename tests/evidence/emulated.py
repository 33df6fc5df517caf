"""What the emulated Python runs: random cases against ``execute``, and the tiles' assembly.

    python -m tests.evidence.emulated cases TIER FIRST COUNT
    python -m tests.evidence.emulated loops TIER

Each prints one line of JSON; see ``test_aarch64``.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numba
import numpy as np

from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.place import core_tensors
from cactus_edge.kernels.program import build
from cactus_edge.kernels.simd import depthwise, layers
from cactus_edge.kernels.simd.tags import Tag
from cactus_edge.kernels.simd.tiers import Tier, choose
from cactus_edge.kernels.threads import ParallelWorker
from cactus_edge.semantics import Rounding
from tests.kernels.cases import PROFILES, Case, assert_equal, extreme_case, random_case

_DOTS = {Tier.DOTPROD: r"sdot\b", Tier.NEON: r"(sadalp|saddlp)\b"}
_PRODUCTS = 16
"""Products of a DOTPROD dot instruction; NEON's has half as many."""


@dataclass
class Tally:
    """How much was compared."""

    graphs: int = 0
    runs: int = 0
    images: int = 0
    elements: int = 0
    threaded: int = 0


def compare(tier: Tier, first: int, count: int) -> Tally:
    """Cases from a first seed on; every eighth one has the largest accumulators."""
    tally = Tally()
    for seed in range(first, first + count):
        images = (1, 2, 9)[seed % 3]
        if seed % 8 == 0:
            roundings = list(Rounding)
            rounding = roundings[seed // 8 % len(roundings)]
            case = extreme_case(np.random.default_rng(seed), rounding, 1)
        else:
            case = random_case(seed, images, PROFILES[seed % len(PROFILES)])
        expected = case.expected()
        for layout in Layout:
            tally.elements += assert_equal(case, tier, layout, 1, expected)
            tally.runs += 1
        if seed % 4 == 1:
            _compare_threads(case, tier)
            tally.threaded += 1
        tally.graphs += 1
        tally.images += len(case.inputs) * len(Layout)
    return tally


def _compare_threads(case: Case, tier: Tier) -> None:
    """Two threads against one, on bytes."""
    program = build(case.graph, core_tensors(case.graph), 1, Layout.DENSE, tier)
    rng = np.random.default_rng(0)
    workers = [ParallelWorker(program, threads, grain=0) for threads in (1, 2)]
    for _ in range(4):
        image = rng.integers(0, 256, workers[0].images.shape, dtype=np.uint8)
        for worker in workers:
            worker.images[:] = image
            worker.run_staged(1)
        np.testing.assert_array_equal(workers[1].results, workers[0].results)
    for worker in workers:
        worker.close()


@dataclass
class Loop:
    """The innermost loop of a tile that computes dot products."""

    tile: str
    instructions: int
    dots: int
    products: int
    body: str


def loops(tier: Tier) -> Iterator[Loop]:
    """Of every tile, as LLVM compiles it for this CPU."""
    tiles = {**vars(layers), **{f"depthwise{k}": v for k, v in vars(depthwise).items()}}
    for name, tile in tiles.items():
        definition = getattr(tile, "_defn", None)
        if definition is None:
            continue
        count = len(inspect.signature(definition).parameters) - 2
        body = _innermost(_assembly(tile, tier, count), _DOTS[tier])
        dots = sum(bool(re.match(_DOTS[tier], line)) for line in body)
        products = dots * (_PRODUCTS if tier is Tier.DOTPROD else _PRODUCTS // 2)
        yield Loop(name.strip("_"), len(body), dots, products, "\n".join(body))


def _assembly(tile: Callable[..., None], tier: Tier, arguments: int) -> str:
    @numba.njit
    def call(tag: Tag, addresses: tuple[int, ...]) -> None:
        tile(tag, *addresses)

    signature = (numba.typeof(Tag(tier)), numba.types.UniTuple(numba.int64, arguments))
    call.compile(signature)  # type: ignore[attr-defined]
    (assembly,) = call.inspect_asm().values()  # type: ignore[attr-defined]
    return assembly


def _innermost(assembly: str, dot: str) -> list[str]:
    """Instructions of the loop with the most dot products, its branches left out."""
    lines = [line.split("//")[0].strip() for line in assembly.splitlines()]
    places = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    found: list[list[str]] = []
    for end, line in enumerate(lines):
        branch = re.match(r"(?:b|cbn?z|tbn?z)\b.*?(\S+)$", line)
        begin = places.get(branch[1], end) if branch else end
        inside = lines[begin + 1 : end]
        if begin < end and not any(text.endswith(":") for text in inside):
            found.append([text for text in inside if text and not text.startswith(".")])
    counted = [(sum(bool(re.match(dot, text)) for text in body), body) for body in found]
    return max(counted, key=lambda pair: pair[0], default=(0, []))[1]


def main(task: str, tier: str, *numbers: str) -> None:
    """Print the answer as JSON."""
    chosen = choose(tier)
    if task == "loops":
        print(json.dumps([asdict(loop) for loop in loops(chosen)]))
    else:
        first, count = map(int, numbers)
        print(json.dumps(asdict(compare(chosen, first, count))))


if __name__ == "__main__":
    main(*sys.argv[1:])
