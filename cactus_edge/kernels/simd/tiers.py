"""Which vector instructions kernels may use, found out *before* anything is compiled.

LLVM aborts the process when code names an instruction that the target lacks, so a tier is offered
only if the features that Numba compiles for include all that it needs. Under ``NUMBA_CPU_NAME`` or
``NUMBA_CPU_FEATURES`` these are the features of that setting and not those of the machine.
"""

from __future__ import annotations

import platform
from enum import StrEnum
from functools import lru_cache
from typing import Any

from numba.core.registry import cpu_target

from cactus_edge.errors import UsageError, meant


class Tier(StrEnum):
    """A set of instructions; the first that a CPU has is the fastest."""

    AVX512 = "avx512"
    """Byte dot products and byte permutes on 512 bits: Ice Lake, Zen 4 and later."""
    AVXVNNI = "avxvnni"
    """Byte dot products on 256 bits: Alder Lake and later, and every CPU of the tier above."""
    AVX2 = "avx2"
    """Products of int16 pairs; the byte products of AVX2 saturate and are never used."""
    DOTPROD = "neon-dotprod"
    """Armv8.2 with SDOT: Cortex-A76 (Raspberry Pi 5) and later."""
    NEON = "neon"
    """Armv8.0: Cortex-A72 (Raspberry Pi 4)."""
    PLAIN = "plain"
    """Loops without any named instruction: the reference, on every CPU."""


_NEEDS: dict[Tier, tuple[frozenset[str], ...]] = {
    Tier.AVX512: (frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi"}),),
    Tier.AVXVNNI: (frozenset({"avx2", "avxvnni"}), frozenset({"avx512vl", "avx512vnni"})),
    Tier.AVX2: (frozenset({"avx2"}),),
    Tier.DOTPROD: (frozenset({"neon", "dotprod"}),),
    Tier.NEON: (frozenset({"neon"}),),
    Tier.PLAIN: (frozenset(),),
}
"""Any of several sets of LLVM's feature names."""

_ARM_CPUS = {
    "cortex-a72": frozenset({"neon"}),
    "cortex-a76": frozenset({"neon", "dotprod"}),
}
"""What a CPU's name implies for Numba even where no feature is listed, as under an emulator."""


@lru_cache(maxsize=1)
def features() -> frozenset[str]:
    """LLVM's names of the features that Numba compiles for."""
    context: Any = cpu_target.target_context
    _, cpu, listed = context.codegen().magic_tuple()
    found = {name[1:] for name in listed.split(",") if name.startswith("+")}
    if platform.machine() in ("aarch64", "arm64"):
        found |= _ARM_CPUS.get(cpu, frozenset({"neon"}))
    return frozenset(found)


def available() -> tuple[Tier, ...]:
    """The tiers that this process may use, fastest first; ``Tier.PLAIN`` is always the last."""
    found = features()
    return tuple(tier for tier in Tier if any(needs <= found for needs in _NEEDS[tier]))


def choose(name: str | None = None) -> Tier:
    """The fastest tier, or the one of that name.

    Raises:
        UsageError: there is no such tier, or the CPU lacks what it needs.
    """
    usable = available()
    if name is None:
        return usable[0]
    if name not in set(Tier):
        raise UsageError(f"no tier '{name}'{meant(name, Tier)} known: {', '.join(Tier)}")
    tier = Tier(name)
    if tier not in usable:
        raise UsageError(f"this CPU cannot run tier '{name}'; it can run {', '.join(usable)}")
    return tier
