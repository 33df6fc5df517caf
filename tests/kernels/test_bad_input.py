"""What could make compiled code read past an array, run for another CPU, or end the process.

Each case runs in a process of its own, because what goes wrong here is not an exception: it is a
signal. All of them end either with the right result or with an error that says what is wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from copy import copy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD_CPU = {"NUMBA_CPU_NAME": "core2", "NUMBA_CPU_FEATURES": "+sse2,+ssse3"}

PRELUDE = """
import numpy as np
from tests.graphs import random_graph, random_inputs
from cactus_edge.errors import CactusEdgeError
from cactus_edge.execute import execute
from cactus_edge.kernels import walk
from cactus_edge.runtime import Session
graph = random_graph(np.random.default_rng(3), shape=(1, 6, 6, 4), channels=20)
x = random_inputs(np.random.default_rng(4), graph, 9)
expected = execute(graph, x)
"""


def run(text: str, *, prelude: str = PRELUDE, **environment: str) -> tuple[str, str]:
    """Run a program; gives what it prints and reports. It must not be ended by a signal."""
    result = subprocess.run(
        [sys.executable, "-c", prelude + text],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode >= 0, f"signal {-result.returncode}\n{result.stderr}"
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


# ---------------------------------------------------------------------- arrays
LAYOUTS = """
def misaligned(a):
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    view = buffer[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view

same = np.broadcast_to(x[0], x.shape)
padded = np.zeros((9, 7, 12, 4), np.int8)
padded[:, :6, ::2] = x
forms = [
    (misaligned(x), expected),
    (misaligned(x.astype(np.int16)), expected),
    (misaligned(x.astype(np.int8)), expected),
    (x.astype(np.int8)[::-1], expected[::-1]),
    (np.asfortranarray(x.astype(np.int8)), expected),
    (padded[:, :6, ::2], expected),
    (same, np.broadcast_to(expected[0], expected.shape)),
    (same.astype(np.int8)[:, :, :, :], np.broadcast_to(expected[0], expected.shape)),
    (x.astype(">i4"), expected),
    (x.astype(">i2")[::-1], expected[::-1]),
    (x.astype(object).astype(np.int64), expected),
]
session = Session(graph)
for number, (form, result) in enumerate(forms):
    for count in (1, 9):
        got = session.run(form[:count])
        assert (got == result[:count]).all(), (number, count)
"""

WRONG = """
wrong = [
    x.astype(float), x.astype(np.float16), x.astype(complex), x > 0, x.astype(str),
    x.astype(object), x.astype("timedelta64[s]"), x[..., :3], x[:, :5], x[0], x[None],
    x.reshape(9, -1), x.transpose(0, 2, 3, 1), None, "x", b"x", {}, 5, [[1, 2], [3, 4]],
    x + 300, x - 300, x.astype(np.uint8) | 128, np.full(x.shape, 2**63, np.uint64),
    np.full(x.shape, -2**63), np.zeros((1, 0, 6, 4), np.int8), np.zeros((2**40, 0), np.int8),
]
session = Session(graph)
for value in wrong:
    for part in (value, value[:1] if isinstance(value, np.ndarray) else value):
        try:
            session.run(part)
        except CactusEdgeError as error:
            assert str(error)
        else:
            raise AssertionError(f"accepted: {part!r}")
assert session.run(np.zeros((0, 6, 6, 4), np.int8)).shape == (0, *expected.shape[1:])
assert (session.run(x) == expected).all()
print("usable")
"""


def test_arrays_of_any_memory_layout_type_and_shape() -> None:
    """Misaligned, reversed, strided, broadcast, read-only, of foreign byte order; then wrong."""
    printed, _ = run(LAYOUTS + WRONG)
    assert printed == "usable"


# ---------------------------------------------------------------------- graphs
ONE_LAYER = """
import numpy as np
from dataclasses import replace
from cactus_edge.constraints import ACCUMULATOR_LIMIT
from cactus_edge.errors import InvalidGraphError
from cactus_edge.execute import execute
from cactus_edge.graph import *
from cactus_edge.runtime import Session
from cactus_edge.kernels.simd.tiers import available
from cactus_edge.semantics import Rounding

def layer(zero, sign, bias, depth=448):
    source = Tensor("x", (1, 4, 4, depth), quantization=Quantization.of(1.0, zero))
    target = Tensor("y", (1, 4, 4, 2))
    op = Conv2D(
        name="layer", inputs=(0,), output=1, padding=Padding.SAME,
        weights=Weights(np.full((2, 3, 3, depth), sign, np.int8)),
        bias=np.array([bias, -bias], np.int32),
        requantization=Requantization.uniform(Rounding.FLOAT32, (1 << 23) + 1, 43, 2),
    )
    return Graph((source, target), (op,), 0, 1)
"""

# The bias is as large as the proof of the limit permits; one more is refused.
LARGEST = """
for zero in (-128, 127):
    for sign in (-128, 127):
        room = ACCUMULATOR_LIMIT - 1 - 255 * abs(sign) * 9 * 448
        graph = layer(zero, sign, room)
        sessions = [Session(graph, tier=tier) for tier in available()]
        for x in (np.full((3, 4, 4, 448), v) for v in (-128, 127)):
            expected = execute(graph, x)
            for session in sessions:
                for count in (1, 3):
                    got = session.run(x[:count])
                    assert (got == expected[:count]).all(), (zero, sign, session.tier)
        try:
            Session(layer(zero, sign, room + 1))
        except InvalidGraphError as error:
            assert "2^27" in str(error)
        else:
            raise AssertionError("an accumulator may overflow")
"""

BROKEN = """
graph = layer(-128, 1, 0, depth=4)
op, (source, target) = graph.operators[0], graph.tensors
broken = [
    replace(graph, tensors=(source, replace(target, shape=(1, 4, 4, 3)))),
    replace(graph, tensors=(source, replace(target, shape=(1, 5, 4, 2)))),
    replace(graph, tensors=(replace(source, shape=(1, 4, 4, 5)), target)),
    replace(graph, operators=(replace(op, bias=np.zeros(3, np.int32)),)),
    replace(graph, operators=(replace(op, stride=(0, 1)),)),
    replace(graph, operators=(replace(op, inputs=(7,)),)),
    replace(graph, operators=(replace(op, output=-1),)),
    replace(graph, operators=(replace(op, requantization=Requantization.uniform(
        Rounding.FLOAT32, (1 << 23) + 1, 43, 1)),)),
    replace(graph, operators=()),
]
for number, bad in enumerate(broken):
    try:
        Session(bad)
    except InvalidGraphError as error:
        assert str(error)
    else:
        raise AssertionError(f"accepted: {number}")
print("refused")
"""


def test_graphs_that_fill_an_accumulator_or_break_a_constraint() -> None:
    """Borders hold the zero point: products of its byte cancel in the bias, and may wrap before.

    What would make a table point outside its arrays never reaches the kernels.
    """
    printed, _ = run(LARGEST + BROKEN, prelude=ONE_LAYER)
    assert printed == "refused"


# ---------------------------------------------------------------------- CPUs
COUNTS = """
for function in (walk._walk,):
    print(sum(function.stats.cache_hits.values()), sum(function.stats.cache_misses.values()))
"""


LACKING = """
from cactus_edge.kernels.simd.tiers import Tier, available, choose
print(choose())
for tier in Tier:
    if tier in available():
        continue
    try:
        Session(graph, tier=tier)
    except CactusEdgeError as error:
        assert f"this CPU cannot run tier '{tier}'; it can run plain" in str(error)
        print(tier)
try:
    Session(graph, tier="sse9")
except CactusEdgeError as error:
    assert "no tier 'sse9'; known: avx512" in str(error)
"""
ALL_LACKING = ["plain", "avx512", "avxvnni", "avx2", "neon-dotprod", "neon"]


def test_a_tier_that_the_cpu_lacks() -> None:
    """Its code would end the process."""
    printed, _ = run(LACKING, **OLD_CPU)
    assert printed.split() == ALL_LACKING


@pytest.mark.evidence
def test_a_cache_serves_the_kernels_of_several_cpus(tmp_path: Path) -> None:
    """This CPU, and one without any vector tier: each finds its own code and not the other's."""
    text = f"""
session = Session(graph)
assert (session.run(x) == expected).all()
print(session.tier){COUNTS}"""
    tiers: list[str] = []
    for environment in ({}, OLD_CPU):
        printed, _ = run(text, NUMBA_CACHE_DIR=str(tmp_path), **environment)
        tier, *counts = printed.split()
        assert counts == ["0", "1"]
        tiers.append(tier)
    assert tiers[1] == "plain"
    printed, _ = run(text, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed.split() == [tiers[0], "1", "0"]
    printed, _ = run(text + LACKING, NUMBA_CACHE_DIR=str(tmp_path), **OLD_CPU)
    assert printed.split() == ["plain", "1", "0", *ALL_LACKING]


def test_without_compilation() -> None:
    text = """
from cactus_edge.errors import UsageError
try:
    import cactus_edge.runtime
except UsageError as error:
    print(error)
"""
    printed, _ = run(text, prelude="", NUMBA_DISABLE_JIT="1")
    assert printed == "NUMBA_DISABLE_JIT is set, but the kernels exist as compiled code alone"


# ---------------------------------------------------------------------- damaged caches
SMALL = """
import logging
import os
import pathlib
import random
from cactus_edge.kernels.jit import entry
logging.basicConfig(format="%(message)s")
factor = {factor}

def made(factor: int):
    @entry
    def multiplied(x: int) -> int:
        return factor * x
    return multiplied

def called():
    function = made(factor)
    assert function(21) == factor * 21
    stats = function.stats
    return sum(stats.cache_hits.values()), sum(stats.cache_misses.values())

exec(os.environ["WHAT_TO_DO"])
"""
ONCE = "print(called())"


class Small:
    """A module with one cached function."""

    def __init__(self, folder: Path) -> None:
        self.module = folder / "small.py"
        self.cache = folder / "cache"
        self.module.write_text("")
        self.stamp = self.module.stat()

    def with_copied_cache(self, folder: Path) -> Small:
        """The same module with a cache of its own."""
        other = copy(self)
        other.cache = shutil.copytree(self.cache, folder / "cache")
        return other

    def run(self, text: str = ONCE, factor: int = 2, **environment: str) -> tuple[str, str]:
        """What a program prints that may call the function, and what it reports.

        The file keeps its age and size, by which Numba would tell that it is another.
        """
        self.module.write_text(SMALL.format(factor=factor))
        os.utime(self.module, ns=(self.stamp.st_atime_ns, self.stamp.st_mtime_ns))
        start = f"import runpy\nrunpy.run_path({str(self.module)!r}, run_name='__main__')"
        environment |= {"NUMBA_CACHE_DIR": str(self.cache), "WHAT_TO_DO": text}
        return run(start, prelude="", **environment)

    @property
    def file(self) -> Path:
        """Where the function is kept."""
        (file,) = self.cache.rglob("*.nbc")
        return file


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Small:
    made = Small(tmp_path_factory.mktemp("small"))
    assert made.run()[0] == "(0, 1)"
    return made


@pytest.fixture
def small(compiled: Small, tmp_path: Path) -> Small:
    """In the cache."""
    return compiled.with_copied_cache(tmp_path)


def test_a_cache_serves_several_cpus(small: Small) -> None:
    """Each finds its own code and not the other's, as kernels do."""
    assert small.run(**OLD_CPU)[0] == "(0, 1)"
    assert small.run()[0] == small.run(**OLD_CPU)[0] == "(1, 0)"


def test_damaged_files_are_compiled_again(small: Small) -> None:
    """In the machine code a wrong bit would change results, elsewhere end the process."""
    printed, report = small.run(
        f"""
file = pathlib.Path({str(small.file)!r})
whole = file.read_bytes()
noise = random.Random(0)
damages = [b"", whole[:len(whole) // 2], whole[:-1], whole + bytes(1), bytes(len(whole))]
damages.append(noise.randbytes(len(whole)))
for _ in range(6):
    damaged = bytearray(whole)
    damaged[noise.randrange(len(whole))] ^= 1 << noise.randrange(8)
    damages.append(bytes(damaged))
for number, content in enumerate(damages):
    file.write_bytes(content)
    assert called() == (0, 1), number
    assert called() == (1, 0), "and the file is whole again"
print(len(damages))
"""
    )
    assert printed == "12"
    assert report.count("is damaged, its kernels are compiled again") == 12


def test_other_sources_have_other_files(small: Small) -> None:
    """A captured value stands for sources that Numba does not look at, as the digest does."""
    assert small.run()[0] == "(1, 0)"
    assert small.run(factor=3)[0] == "(0, 1)"


def test_a_cache_that_cannot_be_written(small: Small) -> None:
    """A folder stands where the file should be; a full disk fails at the same place."""
    file = small.file
    file.unlink()
    file.mkdir()
    hits, report = small.run()
    assert hits == "(0, 1)"
    assert "not cached" in report
    assert [other.name for other in file.parent.iterdir()] == [file.name], "nothing is left behind"


def test_a_cache_that_is_deleted_meanwhile(small: Small) -> None:
    """Before a function is looked for, and while it is compiled."""
    printed, report = small.run(
        f"""
import shutil
for early in (True, False):
    shutil.rmtree({str(small.cache)!r})
    if early:
        assert called() == (0, 1)
    else:
        function = made(factor)
        shutil.rmtree({str(small.cache)!r}, ignore_errors=True)
        assert function(21) == factor * 21
    print(called())
"""
    )
    assert (printed, report) == ("(1, 0)\n(1, 0)", ""), "it is made again"
