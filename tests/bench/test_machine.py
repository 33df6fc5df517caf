"""What the machine reports, what it can do at best, and the protocol for a Raspberry Pi."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cactus_edge.bench import ceilings, machine, pi
from cactus_edge.bench.ceilings import Ceilings
from cactus_edge.bench.machine import State
from cactus_edge.bench.roofline import roof
from cactus_edge.bench.run import Benchmark, Figures
from cactus_edge.bench.work import Work
from cactus_edge.cli.measuring import _table
from cactus_edge.errors import ToolError, UsageError
from cactus_edge.kernels.simd.tiers import Tier

ROOT = Path(__file__).resolve().parents[2]
GOOD = State(governor="performance", megahertz=2400, celsius=45.0, throttling=(), load=0.1)
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


# ---------------------------------------------------------------------- reports
def test_throttling_flags() -> None:
    assert machine.throttling_flags("0x0") == ()
    assert machine.throttling_flags("0x50005") == (
        "under-voltage",
        "throttled",
        "under-voltage has occurred",
        "throttling has occurred",
    )


def test_machine_has_a_name() -> None:
    assert machine.machine_name()


@LINUX
def test_memory_is_that_of_this_process() -> None:
    before = machine.resident_kib()
    assert before is not None
    assert before > 1000
    block = mmap.mmap(-1, 1 << 25)  # an array might be put where memory was freed
    block.write(bytes([1]) * len(block))
    grown = machine.resident_kib()
    peak = machine.peak_kib()
    assert grown is not None
    assert peak is not None
    assert grown - before > 30_000
    assert peak >= grown
    block.close()


def test_a_machine_that_reports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(machine, "_THROTTLING", tmp_path / "throttled")
    monkeypatch.setattr(machine, "_THERMAL", tmp_path)
    monkeypatch.setattr(machine, "_POWER", tmp_path)
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    state = machine.state()
    assert (state.governor, state.megahertz, state.celsius, state.throttling) == (None,) * 4
    assert machine.caches() == {}
    assert machine.energy_microjoules() is None


def test_files_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")

    for index, (level, kind, size) in enumerate(
        [("1", "Data", "64K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M")]
    ):
        put(f"cpu0/cache/index{index}/level", level)
        put(f"cpu0/cache/index{index}/type", kind)
        put(f"cpu0/cache/index{index}/size", size)
    put("cpu0/cpufreq/scaling_governor", "ondemand")
    put("cpu0/cpufreq/scaling_cur_freq", "1500000")
    put("throttled", "0x4")
    put("thermal_zone0/temp", "61500")
    put("thermal_zone1/temp", "48000")
    put("intel-rapl:0/energy_uj", "1000")
    put("intel-rapl:1/energy_uj", "24")
    put("intel-rapl:0:0/energy_uj", "7")
    for name in ("_CPUS", "_THERMAL", "_POWER"):
        monkeypatch.setattr(machine, name, tmp_path)
    monkeypatch.setattr(machine, "_THROTTLING", tmp_path / "throttled")
    assert machine.caches() == {"L1": 64 << 10, "L2": 2 << 20}
    state = machine.state()
    assert (state.governor, state.megahertz) == ("ondemand", 1500)
    assert state.celsius == 61.5
    assert state.throttling == ("throttled",)
    assert machine.energy_microjoules() == 1024


def test_bench_shows_clock_heat_and_complaints() -> None:
    quiet = result(1.0, 1.0)
    assert str(_table(Path("m.tflite"), quiet).title).endswith(
        "; governor performance; 45 to 45 degrees"
    )
    hot = replace(GOOD, celsius=81.6, throttling=("throttled",))
    title = str(_table(Path("m.tflite"), replace(quiet, after=hot)).title)
    assert title.endswith("; governor performance; 45 to 82 degrees; throttled")
    silent = State(governor=None, megahertz=None, celsius=None, throttling=None, load=None)
    title = str(_table(Path("m.tflite"), replace(quiet, before=silent, after=silent)).title)
    assert title.endswith("batches of 32")


# ---------------------------------------------------------------------- ceilings and roofs
def test_ceilings_are_measured() -> None:
    if ceilings.choose() is Tier.PLAIN:
        pytest.skip("no vector instructions here")
    best = ceilings.measure()
    assert best.products > 0.5
    assert best.bandwidth["L1"] > best.bandwidth["DRAM"] > 0.1
    assert list(best.bandwidth)[-1] == "DRAM"


def test_ceilings_need_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "choose", lambda: Tier.PLAIN)
    with pytest.raises(ToolError, match="none of the vector instructions"):
        ceilings.measure()


BEST = Ceilings(
    "avx512", 500.0, {"L1": 400.0, "L2": 200.0, "DRAM": 20.0}, {"L1": 32 << 10, "L2": 1 << 20}
)


def test_roof_of_a_layer_that_multiplies_much() -> None:
    task = Work(50_000_000, 5_000_000, 100_000, 10_000, 100_000, 8, 0.9)
    result = roof(task, 200.0, BEST)
    assert result.level == "L2"
    assert result.intensity == 500
    assert result.dense_us == 100.0
    assert result.useful_us == 10.0
    assert result.rate == 250.0
    assert result.useful_rate == 25.0
    assert result.dense_share == 0.5
    assert result.useful_share == 0.05


def test_roof_of_a_layer_that_reads_much() -> None:
    task = Work(8_000_000, 1_000_000, 8_000_000, 1_000_000, 4_000_000, 4, 0.875)
    result = roof(task, 100.0, BEST)
    assert result.level == "DRAM"
    assert result.dense_us == 200.0  # 4 MB at 20 GB/s
    assert result.useful_us == 2.5  # half a megabyte at 200 GB/s
    assert result.dense_share == 2.0


# ---------------------------------------------------------------------- Raspberry Pi
def test_nothing_is_missing_on_a_good_board() -> None:
    assert pi.missing(GOOD, board=True) == ()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (replace(GOOD, governor="ondemand"), "governor is 'ondemand'; run: echo performance"),
        (replace(GOOD, governor=None), "governor is not reported"),
        (replace(GOOD, celsius=71.2), "71 degrees; below 60"),
        (replace(GOOD, celsius=None), "no temperature"),
        (replace(GOOD, throttling=("under-voltage",)), "under-voltage; check supply"),
        (replace(GOOD, throttling=None), "vcgencmd"),
        (replace(GOOD, load=2.0), "load 2.0"),
    ],
)
def test_what_is_missing_is_named(state: State, text: str) -> None:
    (found,) = pi.missing(state, board=True)
    assert text in found


def test_spoilt_runs() -> None:
    assert pi.spoilt(GOOD, GOOD) == ()
    late = replace(GOOD, throttling=("throttled",), megahertz=1800)
    assert pi.spoilt(GOOD, late) == ("throttled", "the clock fell from 2400 to 1800 MHz")
    assert pi.spoilt(replace(GOOD, throttling=("throttled",)), replace(late, megahertz=2400)) == ()


def figures(median: float, ratio: float) -> Figures:
    return Figures("1", median, median, median, 1, ratio, (ratio, ratio), 1, 1, 1, 1, 0, 0, None)


def result(median: float, ratio: float) -> Benchmark:
    return Benchmark(
        machine="test",
        caches={},
        python="3",
        before=GOOD,
        after=GOOD,
        profile="p",
        layout="auto",
        threads=1,
        batch=32,
        work=Work(1, 1, 1, 1, 1, 8, 0.0),
        ours=figures(median, 1.0),
        peers={"peer": figures(median * ratio, ratio)},
        absent={},
        microjoules=None,
    )


def test_spoilt_runs_do_not_count() -> None:
    bad = replace(GOOD, throttling=("throttled",))
    states = iter([GOOD, GOOD, GOOD, GOOD, bad, GOOD, GOOD])  # before all; then pairs
    results = iter([result(10.0, 2.0), result(99.0, 9.0), result(14.0, 4.0)])
    waits: list[int] = []
    report = pi.protocol(
        lambda: next(results), runs=3, wait=lambda: waits.append(1), read=lambda: next(states)
    )
    assert len(waits) == 3
    assert [bool(run.spoilt) for run in report.runs] == [False, True, False]
    assert report.median_us == 12.0
    assert report.spread == 1.4
    assert report.ratios == {"peer": 3.0}
    assert report.board == machine.is_raspberry_pi()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_process_is_pinned_and_released() -> None:
    allowed = os.sched_getaffinity(0)
    with pi.pinned(1) as cpus:
        assert cpus == (max(allowed),)
        assert os.sched_getaffinity(0) == {max(allowed)}
    assert os.sched_getaffinity(0) == allowed
    with pytest.raises(UsageError, match="1000 threads"), pi.pinned(1000):
        pass


def test_cooling_waits_until_it_is_cool_and_not_for_ever() -> None:
    temperatures = iter([80.0, 70.0, 50.0])
    slept: list[float] = []
    pi.cool(lambda: next(temperatures), slept.append)
    assert len(slept) == 2
    slept.clear()
    pi.cool(lambda: 90.0, slept.append)
    assert 100 < sum(slept) < 1000
    slept.clear()
    pi.cool(lambda: None, slept.append)
    assert slept == []


def test_protocol_wants_a_run() -> None:
    with pytest.raises(UsageError, match="0 runs"):
        pi.protocol(lambda: result(1.0, 1.0), runs=0)


def test_tool_runs_the_protocol_anywhere(tmp_path: Path, small_model: Path) -> None:
    output = tmp_path / "report.json"
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "benchmark.py"), "--pi", str(small_model),
            "--runs", "2", "--rounds", "1", "-o", str(output),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert len(report["runs"]) == 2
    assert report["median_us"] > 0
    if not machine.is_raspberry_pi():
        assert "no Raspberry Pi" in done.stderr
        assert "no Raspberry Pi" in report["missing"][0]
