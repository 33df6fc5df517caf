"""What the operating system tells about the machine: name, caches, clock, heat, energy, memory.

Everything is read from files of Linux (and ``vcgencmd`` on a Raspberry Pi); what a platform does
not report is None or empty, never guessed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_THROTTLING = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
_THERMAL = Path("/sys/class/thermal")
_POWER = Path("/sys/class/powercap")
_FLAGS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
    16: "under-voltage has occurred",
    17: "frequency capping has occurred",
    18: "throttling has occurred",
    19: "soft temperature limit has occurred",
}
"""Bits of the firmware's answer to ``get_throttled``."""


@dataclass(frozen=True)
class State:
    """What may change between runs.

    Attributes:
        governor: of the first CPU's clock.
        megahertz: the first CPU's clock now.
        celsius: the hottest zone.
        throttling: what the firmware of a Raspberry Pi reports; None elsewhere.
        load: processes that want to run, averaged over a minute.
    """

    governor: str | None
    megahertz: int | None
    celsius: float | None
    throttling: tuple[str, ...] | None
    load: float | None


def state() -> State:
    """Read it all."""
    clock = _integer(_CPUS / "cpu0/cpufreq/scaling_cur_freq")
    return State(
        governor=_text(_CPUS / "cpu0/cpufreq/scaling_governor"),
        megahertz=None if clock is None else clock // 1000,
        celsius=temperature(),
        throttling=throttling(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def machine_name() -> str:
    """The board's and the CPU's name, or what Python knows of the machine."""
    board = (_text(Path("/proc/device-tree/model")) or "").strip("\0")
    text = _text(Path("/proc/cpuinfo")) or ""
    for key in ("model name", "Model", "Hardware"):
        for line in text.splitlines():
            name, separator, value = line.partition(":")
            if separator and name.strip() == key and value.strip():
                return value.strip()
    return board or platform.processor() or platform.machine()


def is_raspberry_pi() -> bool:
    """Whether the device tree names one."""
    return "Raspberry Pi" in (_text(Path("/proc/device-tree/model")) or "")


def caches() -> dict[str, int]:
    """Bytes of the first CPU's data caches: ``L1``, ``L2`` and so on."""
    found: dict[str, int] = {}
    for index in sorted((_CPUS / "cpu0/cache").glob("index*")):
        size, level = _text(index / "size"), _text(index / "level")
        if size and level and _text(index / "type") != "Instruction":
            factor = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            found[f"L{level}"] = int(size.rstrip("KM")) * factor
    return found


def temperature() -> float | None:
    """The hottest thermal zone in degrees Celsius."""
    zones = _THERMAL.glob("thermal_zone*/temp")
    values = [value for zone in zones if (value := _integer(zone)) is not None]
    return max(values) / 1000 if values else None


def throttling() -> tuple[str, ...] | None:
    """What a Raspberry Pi's firmware says went or goes wrong; None where nobody can say."""
    text = _text(_THROTTLING)
    if text is None and shutil.which("vcgencmd"):
        done = subprocess.run(
            ["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=10, check=False
        )
        text = done.stdout.strip().removeprefix("throttled=") if done.returncode == 0 else None
    return None if not text else throttling_flags(text)


def throttling_flags(text: str) -> tuple[str, ...]:
    """The names of the bits that are set in a hexadecimal number."""
    value = int(text, 16)
    return tuple(name for bit, name in _FLAGS.items() if value >> bit & 1)


def energy_microjoules() -> int | None:
    """Counters of all processor packages (Intel's and AMD's RAPL), if they may be read.

    They wrap around after some hours; a difference below 0 means that one did.
    """
    packages = [zone for zone in _POWER.glob("intel-rapl:*") if zone.name.count(":") == 1]
    values = [_integer(zone / "energy_uj") for zone in packages]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def resident_kib() -> int | None:
    """Memory of this process now."""
    return _status("VmRSS")


def peak_kib() -> int | None:
    """The most memory that this process ever had."""
    return _status("VmHWM")


def _status(key: str) -> int | None:
    for line in (_text(Path("/proc/self/status")) or "").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return None


def _integer(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.lstrip("-").isdigit() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
