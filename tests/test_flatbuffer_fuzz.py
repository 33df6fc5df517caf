"""Damaged files: errors of this package and nothing else, and what is accepted is consistent."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from graphs import EDGES, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.flatbuffer import read_tflite, write_tflite
from tests.foreign import FAMILY, made

CASES_PER_FILE = 350


@dataclass(frozen=True)
class Outcome:
    """What came of one damaged file."""

    accepted: bool
    error: str = ""


def examine(data: bytes) -> Outcome:
    """Read; an accepted graph has to survive being written and read again."""
    try:
        graph = read_tflite(data, "fuzzed")
    except UnsupportedModelError as error:
        message = str(error)
        assert message.startswith("fuzzed: "), message
        assert "\n" not in message, message
        assert len(message) < 700, message
        return Outcome(False, type(error).__name__)
    again = write_tflite(graph)
    read = read_tflite(again)
    assert read.fingerprint() == graph.fingerprint()
    assert write_tflite(read) == again
    return Outcome(True)


def sample(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    edges = EDGES if seed % 2 else ()
    return write_tflite(random_graph(rng, depth=4, bits=(8, 4, 3), channels=5, edges=edges))


FILES = [sample(seed) for seed in range(4)]


def test_every_truncation_is_refused() -> None:
    """Each prefix but the last few, whose bytes are padding."""
    for data in FILES[:2]:
        outcomes = [examine(data[:length]) for length in range(0, len(data) - 16)]
        assert not any(outcome.accepted for outcome in outcomes)


def test_appended_bytes_change_nothing() -> None:
    for data in FILES:
        graph = read_tflite(data + bytes(100))
        assert graph.fingerprint() == read_tflite(data).fingerprint()


@pytest.mark.parametrize("index", range(len(FILES)))
def test_flipped_bits(index: int) -> None:
    data = FILES[index]
    rng = np.random.default_rng(index)
    tally: Counter[bool] = Counter()
    for bit in rng.choice(8 * len(data), CASES_PER_FILE, replace=False).tolist():
        damaged = bytearray(data)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        tally[examine(bytes(damaged)).accepted] += 1
    # Weights, biases and names may take any value; offsets and sizes may not.
    assert min(tally[True], tally[False]) > CASES_PER_FILE // 20


@pytest.mark.parametrize("index", range(len(FILES)))
def test_replaced_bytes(index: int) -> None:
    data = FILES[index]
    rng = np.random.default_rng(100 + index)
    for _ in range(CASES_PER_FILE // 2):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), int(rng.integers(1, 5))).tolist():
            damaged[position] = int(rng.integers(0, 256))
        examine(bytes(damaged))


@pytest.mark.parametrize("index", range(len(FILES)))
def test_corrupted_offsets(index: int) -> None:
    """Each aligned word in turn becomes an extreme or a small random number."""
    data = FILES[index]
    rng = np.random.default_rng(200 + index)
    extremes = (0, 1, 4, len(data), len(data) - 4, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
    tally: Counter[bool] = Counter()
    for position in rng.choice(len(data) // 4, min(len(data) // 4, CASES_PER_FILE), replace=False):
        value = int(rng.choice(extremes)) if rng.random() < 0.6 else int(rng.integers(0, 4096))
        damaged = bytearray(data)
        struct.pack_into("<I", damaged, 4 * int(position), value)
        tally[examine(bytes(damaged)).accepted] += 1
    assert tally[False] > tally[True] // 4


def test_replaced_bytes_of_other_converters() -> None:
    rng = np.random.default_rng(400)
    files = [made(name, 0) for name in FAMILY]
    tally: Counter[bool] = Counter()
    for case in range(5 * len(files)):
        damaged = bytearray(files[case % len(files)])
        for position in rng.integers(0, len(damaged), int(rng.integers(1, 4))).tolist():
            damaged[position] = int(rng.integers(0, 256))
        tally[examine(bytes(damaged)).accepted] += 1
    assert min(tally[True], tally[False]) > len(files) // 2


def test_swapped_blocks() -> None:
    rng = np.random.default_rng(300)
    for _ in range(CASES_PER_FILE // 2):
        data = bytearray(FILES[int(rng.integers(len(FILES)))])
        size = 4 * int(rng.integers(1, 16))
        a, b = (4 * int(v) for v in rng.integers(0, (len(data) - size) // 4, 2))
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
        examine(bytes(data))


@settings(max_examples=120)
@given(st.binary(max_size=300))
def test_random_bytes_behind_the_identifier(tail: bytes) -> None:
    assert not examine(struct.pack("<I", 8) + b"TFL3" + tail).accepted
