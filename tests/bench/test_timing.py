"""The protocol: who takes turns, and how samples become figures."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from cactus_edge.bench import timing
from cactus_edge.bench.timing import CALLS, Contender, Samples


def contenders(seen: list[tuple[str, int]]) -> list[Contender]:
    """Two that note what they are called with."""

    def make(name: str) -> Contender:
        images = [np.array([number]) for number in range(4)]
        return Contender(
            lambda image: seen.append((name, int(image[0]))),
            images,
            lambda batch: seen.append((name, len(batch))),
            np.zeros((6, 1)),
        )

    return [make("a"), make("b")]


def test_turns_are_short_and_begin_with_calls_that_do_not_count() -> None:
    seen: list[tuple[str, int]] = []
    samples = timing.warm(contenders(seen), 3)
    assert [sample.values.shape for sample in samples] == [(3, CALLS)] * 2
    turn = len(seen) // 6
    assert turn > CALLS
    names = [name for name, _ in seen]
    assert names == (["a"] * turn + ["b"] * turn) * 3
    assert {number for _, number in seen} == {0, 1, 2, 3}
    assert seen[:turn] == [("a", number) for _, number in seen[turn : 2 * turn]]
    assert min(sample.values.min() for sample in samples) > 0


def test_cold_calls_alternate() -> None:
    seen: list[tuple[str, int]] = []
    samples = timing.cold(contenders(seen), 2, 1 << 16)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [sample.values.shape for sample in samples] == [(2, 1)] * 2


def test_throughput_is_time_for_an_image() -> None:
    seen: list[tuple[str, int]] = []

    def slow(batch: np.ndarray) -> None:
        seen.append(("slow", len(batch)))
        timing.time.sleep(0.006)

    quick, other = contenders(seen)
    samples = timing.throughput([quick, Contender(other.call, other.images, slow, other.batch)], 2)
    assert seen == [("a", 6), ("slow", 6)] * 3  # the first turn warms up
    assert 1000 <= samples[1].median < 5000  # 6 ms for 6 images
    assert samples[0].median < samples[1].median


def test_pauses_come_before_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(timing.time, "sleep", pauses.append)
    timing.warm(contenders([]), 2, 0.25)
    timing.cold(contenders([]), 2, 8, 0.5)
    timing.throughput(contenders([]), 2, 0.75)
    assert pauses == [0.25] * 4 + [0.5] * 4 + [0.75] * 6


def test_figures_of_samples() -> None:
    own = Samples(np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 9.0]]))
    peer = Samples(np.array([[6.0, 8.0, 1.0], [4.0, 4.0, 4.0]]))
    assert own.median == 2.5
    assert own.quartiles == (2.0, 3.75)
    np.testing.assert_array_equal(peer.ratios(own), [3.0, 1.0])


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_not_searched_while_measuring(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with timing.undisturbed():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
