"""Instructions of the DSP extension: ARMv7E-M, and ARMv8-M where it is present.

``SMLAD`` multiplies two pairs of 16-bit numbers for dense layers.

Four bytes of the input become two words of two numbers each, bytes 0 and 2, and bytes 1 and 3; so
do four weights, and the pairs meet. Nibbles are multiplied where they stand, as 16 times their
value. Everything stays an exact sum of products in 32 bits. The loop is one piece of assembly with
as many registers as there are: compilers that schedule such instructions one by one spill. Loads
need no alignment on these processors, unless the compiler is told that they do.

Sparse layers load two or four entries at once and take them apart on the way: ``UXTAB`` adds a
distance to the pointer, ``SMLABB`` and ``SMLABT`` multiply with one half of a word of two weights.

Source: ARMv7-M Architecture Reference Manual, A7.7 (SMLAD, SMLABB, SXTB16, UXTAB, UXTB16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cactus_edge.csource.text import block

FURTHEST = 4095
"""The greatest distance of two pixels that a load can reach."""


def guard(upper: str) -> str:
    """The condition under which the loops are used; ``-O0`` has too few registers.

    ``__ARM_FEATURE_DSP`` alone is also ARMv5TE's, which has none of these instructions, and that of
    instruction set A32, which has other immediates.
    """
    return f"""\
#if defined(__ARM_FEATURE_DSP) && defined(__thumb2__) && defined(__ARM_FEATURE_UNALIGNED)
#if defined(__GNUC__) && defined(__OPTIMIZE__) && !defined({upper}_PORTABLE)
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
    variables = {f"sum{p}_{c}": sums[p][c] for p in pixels for c in channels}
    return block("", f"int32_t n = {groups};", *_assembly(code, variables, scratch))


def per_word(*, packed: bool) -> int:
    """Entries of a sparse layer in the word that is loaded at once."""
    return 4 if packed else 2


def most_pixels(*, packed: bool) -> int:
    """How many pixels of a sparse layer there are registers for."""
    return 6 if packed else 7


def sparse_loop(stride: int, sums: Sequence[str], kind: str, *, packed: bool) -> list[str]:
    """``n`` words of entries, at least one, for all pixels.

    Args:
        stride: bytes from one pixel to the next; the last is at most ``FURTHEST`` away.
        sums: C variables, one a pixel; of packed entries they get 16 times the products.
        kind: ``s`` for int8 inputs, ``u`` for uint8.
        packed: entries of one byte instead of two.

    Returns:
        C statements that move ``x`` and ``weight`` behind what they used, and end with ``n`` 0.
    """

    def entry(distances: str, rotation: int, weights: str, half: str) -> list[str]:
        lines = [f"uxtab %[x], %[x], %[{distances}]" + (f", ror #{rotation}" if rotation else "")]
        for p in range(len(sums)):
            at = f", #{p * stride}" if p else ""
            lines.append(f"ldr{'sb' if kind == 's' else 'b'} %[value], [%[x]{at}]")
            lines.append(f"smlab{half} %[sum{p}], %[value], %[{weights}], %[sum{p}]")
        return lines

    word = ["ldr %[code], [%[weight]], #4"]
    if packed:
        # The other nibbles are cleared: weights stay where they stand, as 16 times their value.
        word += ["and %[low], %[code], #0x0f0f0f0f", "bic %[code], %[code], #0x0f0f0f0f"]
        word += ["sxtb16 %[two], %[code]", "sxtb16 %[code], %[code], ror #8"]
        for place, (weights, half) in enumerate(zip(("two", "code") * 2, "bbtt", strict=True)):
            word += entry("low", 8 * place, weights, half)
    else:
        word += ["sxtb16 %[two], %[code], ror #8"]
        word += [*entry("code", 0, "two", "b"), *entry("code", 16, "two", "t")]
    code = ["1:", *word]
    if len(sums) == 1 and not packed:
        # Two words in a round; an odd number of them begins with the second.
        start = ["adds %[n], %[n], #1", "lsrs %[n], %[n], #1", "bcc 2f"]
        code = [*start, "1:", *word, "2:", *word]
    code += ["subs %[n], %[n], #1", "bne 1b"]
    scratch = ["code", "two", "value", *(["low"] if packed else [])]
    return _assembly(code, {f"sum{p}": name for p, name in enumerate(sums)}, scratch)


def _assembly(code: Sequence[str], sums: Mapping[str, str], scratch: Sequence[str]) -> list[str]:
    """A loop that changes ``x``, ``weight``, ``n`` and the sums, by operand and C variable."""
    changed = [f'[{name}] "+r"({name})' for name in ("x", "weight", "n")]
    changed += [f'[{operand}] "+r"({variable})' for operand, variable in sums.items()]
    changed += [f'[{name}] "=&r"({name})' for name in scratch]
    return [
        f"uint32_t {', '.join(scratch)};",
        "__asm volatile(",
        *(f'  "{line}\\n\\t"' for line in code),
        *(f"  {':' if i == 0 else ','} {operand}" for i, operand in enumerate(changed)),
        '  : : "memory", "cc");',
    ]
