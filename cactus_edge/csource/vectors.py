"""Sixteen products per instruction: ``VMLADAVA.S8`` of Armv8.1-M's vector extension (MVE).

A vector of the table has to hold taps of one channel. Words of four int8 taps alternate between
the channels of a block, so ``VLD2`` and ``VLD4`` of words part them as they load. Words have to lie
at multiples of four; in tables whose blocks do not, bytes are gathered. What is left of fewer than
sixteen taps is gathered under a predicate.

Bytes of two int4 taps alternate between two channels: in a block of two channels, ``VLD2`` of bytes
parts those, and the same instruction parts even and odd taps of the input. Nibbles are multiplied
where they stand, as 16 times their value. Everything stays an exact sum of products in 32 bits.

These are intrinsics, which compilers that have the extension bring along: unlike SMLAD's operands
they come out well, with the loops of the low-overhead branch extension.

Source: Armv8-M Architecture Reference Manual, C2.4 (VMLADAVA, VLD2, VLD4, VLDR); Arm MVE
Intrinsics.
"""

from __future__ import annotations

from collections.abc import Sequence

from cactus_edge.csource.text import block

_TAPS = 16
_PACKED_TAPS = 32
_PACKED_GROUPS = _PACKED_TAPS // 4


def guard() -> str:
    """Where the loops are used: where SMLAD's are, and there are vectors."""
    return """\
#if defined(PAIRS) && defined(__ARM_FEATURE_MVE)
#if __ARM_FEATURE_MVE & 1
#include <arm_mve.h>
#define VECTORS
#endif
#endif

/* Vectors of words are loaded from multiples of four alone. */
#ifdef VECTORS
#define TABLE __attribute__((aligned(4))) static const
#else
#define TABLE static const
#endif
"""


def plain(groups: int, stride: int, sums: Sequence[Sequence[str]], *, words: bool) -> list[str]:
    """``groups`` times four int8 taps of a block of channels, for one or two pixels.

    Args:
        groups: at least 1.
        stride: bytes from the first pixel to the second.
        sums: C variables [pixels][channels].
        words: ``weight`` is a multiple of four.

    Returns:
        C statements that move ``x`` and ``weight`` behind what they used.
    """
    width = len(sums[0])
    steps, rest = divmod(groups, 4)
    apart = words and width in (2, 4)
    lines: list[str] = []
    if steps:
        body = _parted(width) if apart else _gathered(width, "", words=words)
        body += _products(sums, stride, "")
        body += [f"x += {_TAPS};", f"weight += {_TAPS * width};"]
        lines += block(f"for (int32_t n = {steps}; n > 0; n--)", *body)
    if rest:
        lines += block(
            "",
            # A predicate for words: what is loaded beyond them is 0, and nothing beyond is read.
            f"const mve_pred16_t some = vctp32q({rest});",
            *_gathered(width, "some", words=words),
            *_products(sums, stride, "some"),
            f"x += {4 * rest};",
            f"weight += {4 * rest * width};",
        )
    return lines


def _parted(width: int) -> list[str]:
    """``weight_<channel>``, from a load that takes the channels apart."""
    load = f"vld{width}q_s32((const int32_t *)(const void *)weight)"
    return [
        f"const int32x4x{width}_t all = {load};",
        *(
            f"const int8x16_t weight_{c} = vreinterpretq_s8_s32(all.val[{c}]);"
            for c in range(width)
        ),
    ]


def _gathered(width: int, predicate: str, *, words: bool) -> list[str]:
    """The same from loads of single words, or bytes."""
    zero, some = ("_z", f", {predicate}") if predicate else ("", "")
    if words:
        start = "(const int32_t *)(const void *)weight"
        gather = f"vldrwq_gather_shifted_offset{zero}_s32"
        lines = [f"const uint32x4_t places = vmulq_n_u32(vidupq_n_u32(0, 1), {width});"]
        loads = [
            f"vreinterpretq_s8_s32({gather}({start} + {c}, places{some}))" for c in range(width)
        ]
    else:
        lines = [
            "const uint8x16_t taps = vidupq_n_u8(0, 1);",
            "const uint8x16_t words = vandq_u8(taps, vdupq_n_u8(12));",
            f"const uint8x16_t places = vaddq_u8(taps, vmulq_n_u8(words, {width - 1}));",
        ]
        gather = f"vldrbq_gather_offset{zero}_s8"
        loads = [f"{gather}(weight + {4 * c}, places{some})" for c in range(width)]
    return lines + [f"const int8x16_t weight_{c} = {load};" for c, load in enumerate(loads)]


def _products(sums: Sequence[Sequence[str]], stride: int, predicate: str) -> list[str]:
    lines: list[str] = []
    for p, row in enumerate(sums):
        load = f"vldrbq_z_s8(x + {p * stride}, {predicate})"
        lines.append(
            f"const int8x16_t x_{p} = {load if predicate else f'vldrbq_s8(x + {p * stride})'};"
        )
        lines += [
            f"{total} = vmladavaq_s8({total}, weight_{c}, x_{p});" for c, total in enumerate(row)
        ]
    return lines


def packed(groups: int, stride: int, sums: Sequence[Sequence[str]]) -> list[str]:
    """The same for int4 taps of two channels, ``groups`` a multiple of eight.

    Sums are 16 times as large; ``weight`` may be anywhere.
    """
    lines = ["const int8x16x2_t bytes = vld2q_s8(weight);"]
    lines += [f"const int8x16x2_t taps_{p} = vld2q_s8(x + {p * stride});" for p in range(len(sums))]
    for c in range(2):
        lines += [
            f"const int8x16_t even_{c} = vshlq_n_s8(bytes.val[{c}], 4);",
            f"const int8x16_t odd_{c} = vbicq_s8(bytes.val[{c}], vdupq_n_s8(15));",
        ]
        for p, row in enumerate(sums):
            lines += [
                f"{row[c]} = vmladavaq_s8({row[c]}, even_{c}, taps_{p}.val[0]);",
                f"{row[c]} = vmladavaq_s8({row[c]}, odd_{c}, taps_{p}.val[1]);",
            ]
    lines += [f"x += {_PACKED_TAPS};", f"weight += {_PACKED_TAPS};"]
    return block(f"for (int32_t n = {groups // _PACKED_GROUPS}; n > 0; n--)", *lines)


def split(groups: int, width: int, *, is_packed: bool) -> int:
    """How many of the groups of four int4 or int8 taps of a block vectors can have."""
    if not is_packed:
        return groups
    return groups - groups % _PACKED_GROUPS if width == 2 else 0
