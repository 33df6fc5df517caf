"""Two 16-bit products per instruction: ``SMLAD`` of ARMv7E-M, and of ARMv8-M with DSP extension.

Four bytes of the input become two words of two numbers each, bytes 0 and 2, and bytes 1 and 3; so
do four weights, and the pairs meet. Nibbles are multiplied where they stand, as 16 times their
value. Everything stays an exact sum of products in 32 bits. The loop is one piece of assembly with
as many registers as there are: compilers that schedule such instructions one by one spill. Loads
need no alignment on these processors.

Source: ARMv7-M Architecture Reference Manual, A7.7 (SMLAD, SXTB16, UXTB16).
"""

from __future__ import annotations

from collections.abc import Sequence

from cactus_edge.csource.text import block

FURTHEST = 4095
"""The greatest distance of two pixels that a load can reach."""


def guard(upper: str) -> str:
    """The condition under which the loops are used; ``-O0`` has too few registers."""
    return f"""\
#if defined(__ARM_FEATURE_DSP) && defined(__GNUC__) && defined(__OPTIMIZE__)
#ifndef {upper}_PORTABLE
#define PAIRS
#endif
#endif
"""


def loop(
    groups: int, stride: int, sums: Sequence[Sequence[str]], kind: str, *, packed: bool
) -> list[str]:
    """``groups`` times four taps of a block of channels, for one or two pixels.

    Args:
        groups: at least 1.
        stride: bytes from the first pixel to the second, at most ``FURTHEST``.
        sums: C variables [pixels][channels].
        kind: ``s`` for int8 inputs, ``u`` for uint8.
        packed: int4 weights, with an even number of channels.

    Returns:
        C statements that move ``x`` and ``weight`` behind what they used.
    """
    pixels, channels = range(len(sums)), range(len(sums[0]))
    narrow = packed and len(pixels) == 1
    # The first pixel's load moves the pointer, so it comes last.
    code = ["1:"]
    for p in reversed(pixels):
        code.append(f"ldr %[even{p}], [%[x], #{stride}]" if p else "ldr %[even0], [%[x]], #4")
    for p in pixels:
        code.append(f"{kind}xtb16 %[odd{p}], %[even{p}], ror #8")
        code.append(f"{kind}xtb16 %[even{p}], %[even{p}]")

    def multiply(weights: str, half: str, channel: int) -> None:
        for p in pixels:
            total = f"%[sum{p}_{channel}]"
            code.append(f"smlad {total}, %[{weights}], %[{half}{p}], {total}")

    def taps(source: str, target: str, half: str, channel: int, rotation: str = "") -> None:
        code.append(f"sxtb16 %[{target}], %[{source}]{rotation}")
        multiply(target, half, channel)

    for c in channels if not packed else range(0, len(channels), 2):
        code.append("ldr %[code], [%[weight]], #4")
        if not packed:
            taps("code", "two", "even", c)
            taps("code", "code", "odd", c, ", ror #8")
            continue
        if narrow:
            code += ["lsl %[low], %[code], #4"]
            code += [f"bic %[{name}], %[{name}], #0x0f0f0f0f" for name in ("low", "code")]
            taps("low", "two", "even", c)
            taps("code", "two", "odd", c)
            taps("low", "low", "even", c + 1, ", ror #8")
            taps("code", "code", "odd", c + 1, ", ror #8")
            continue
        # One register less: the other nibbles are cleared behind the extension.
        for half in ("odd", "even"):
            for channel, rotation in ((c, ""), (c + 1, ", ror #8")):
                code.append(f"sxtb16 %[two], %[code]{rotation}")
                code.append("bic %[two], %[two], #0x000f000f")
                multiply("two", half, channel)
            if half == "odd":
                code.append("lsl %[code], %[code], #4")
    code += ["subs %[n], %[n], #1", "bne 1b"]

    scratch = [f"{half}{p}" for p in pixels for half in ("even", "odd")]
    scratch += ["code", "two", *(["low"] if narrow else [])]
    changed = [f'[{name}] "+r"({name})' for name in ("x", "weight", "n")]
    changed += [f'[sum{p}_{c}] "+r"({sums[p][c]})' for p in pixels for c in channels]
    changed += [f'[{name}] "=&r"({name})' for name in scratch]
    return block(
        "",
        f"int32_t n = {groups};",
        f"uint32_t {', '.join(scratch)};",
        "__asm volatile(",
        *(f'  "{line}\\n\\t"' for line in code),
        *(f"  {':' if i == 0 else ','} {operand}" for i, operand in enumerate(changed)),
        '  : : "memory", "cc");',
    )
