"""The inner loops: windows of the input times a table of weights.

Output channels that share a load of the input (a block) and output pixels that share a load of the
weights are unrolled into named ``int32_t`` accumulators, as many as a Cortex-M has registers for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cactus_edge.csource.encoding import Encoding, Layout, blocks
from cactus_edge.csource.text import block, plus

# What fits the registers of a Cortex-M, by instructions counted on the M4, see docs/firmware.md.
_DENSE_PIXELS = 2
_SPARSE_PIXELS = 7


@dataclass(frozen=True)
class Kernel:
    """What the loops need: ``taps`` per channel, ``pixels`` at once, ``stride`` elements apart.

    The C text reads ``window``, writes ``target`` and calls ``requantize_<index>``. Outputs of two
    pixels are ``step`` elements apart. With ``ends`` the two "pixels" are the lower and the upper
    end of one box, and so are their sums: a negative weight takes the other end. With ``raw`` the
    sums themselves are written.
    """

    index: int
    encoding: Encoding
    source_type: str
    target_type: str
    taps: int
    channels: int
    pixels: int = 1
    stride: int = 0
    step: int = 0
    ends: bool = False
    raw: bool = False

    def of_ends(self, stride: int, step: int, *, raw: bool = False) -> Kernel:
        """The same for both ends of a box, that far apart in the input and in the output."""
        return replace(self, pixels=2, stride=stride, step=step, ends=True, raw=raw)

    def products(self, channel: int, weight: str, values: Sequence[str]) -> list[str]:
        """Lines that add a weight times the value of each pixel."""
        chosen = list(values)
        if self.ends:
            low, high = values
            chosen = [f"({weight} < 0 ? {a} : {b})" for a, b in ((high, low), (low, high))]
        return [f"sum_{p}_{channel} += {weight} * {value};" for p, value in enumerate(chosen)]

    def sums(self, width: int) -> list[str]:
        """The declarations of the accumulators of a block."""
        first = [f"int32_t sum_0_{c} = bias_{self.index}[channel{plus(c)}];" for c in range(width)]
        others = [
            f"int32_t sum_{p}_{c} = sum_0_{c};" for p in range(1, self.pixels) for c in range(width)
        ]
        return first + others

    def stores(self, width: int) -> list[str]:
        """The lines that end the accumulators of a block."""
        lines: list[str] = []
        for pixel in range(self.pixels):
            for c in range(width):
                channel = f"channel{plus(c)}"
                value = f"sum_{pixel}_{c}"
                if not self.raw:
                    call = f"requantize_{self.index}({value}, {channel})"
                    value = f"({self.target_type}){call}"
                lines.append(f"target[{channel}{plus(pixel * self.step)}] = {value};")
        return lines


def block_of(width: int) -> int:
    """Output channels of a block of a dense layout, for rows of ``width`` output pixels."""
    return 4 if width < _DENSE_PIXELS else 2


def pixels_at_once(width: int, layout: Layout) -> int:
    """How many output pixels share the weights: the fewest instructions over a row of ``width``.

    One step costs about 6 instructions that all pixels share and 2 for each of them.
    """
    most = min(width, _SPARSE_PIXELS if layout.sparse else _DENSE_PIXELS)
    candidates = range(1, most + 1)
    return min(candidates, key=lambda pixels: (-(-width // pixels) * (6 + 2 * pixels), pixels))


def loops(kernel: Kernel) -> list[str]:
    """All output channels of the kernel's pixels."""
    return _sparse(kernel) if kernel.encoding.layout.sparse else _dense(kernel)


def low_nibble(byte: str) -> str:
    """The signed value of the low nibble."""
    return f"(({byte} & 15) ^ 8) - 8"


def _dense(kernel: Kernel) -> list[str]:
    lines = [f"const int8_t *weight = weights_{kernel.index};"]
    packed = kernel.encoding.layout.packed
    for start, end, width in blocks(kernel.channels, kernel.encoding.block):
        steps: list[str] = []
        if kernel.taps > 1:
            pair = _packed_taps(kernel, width, 2) if packed else _plain_pair(kernel, width)
            steps += block(f"for (int32_t n = 0; n < {kernel.taps // 2}; n++)", *pair)
        if kernel.taps % 2:
            last = _packed_taps(kernel, width, 1) if packed else _plain_tap(kernel, width, 0)
            steps += block("", *last, f"weight += {width};")
        lines += block(
            f"for (int32_t channel = {start}; channel < {end}; channel += {width})",
            *kernel.sums(width),
            f"const {kernel.source_type} *x = window;",
            *steps,
            *kernel.stores(width),
        )
    return lines


def _plain_tap(kernel: Kernel, width: int, tap: int) -> list[str]:
    """All products of one tap of int8 weights; the pointers stand ``tap`` before it."""
    lines = [f"const int32_t x_{p} = x[{p * kernel.stride + tap}];" for p in range(kernel.pixels)]
    for c in range(width):
        lines.append(f"const int32_t weight_{c} = weight[{tap * width + c}];")
        lines += kernel.products(c, f"weight_{c}", [f"x_{p}" for p in range(kernel.pixels)])
    return lines


def _plain_pair(kernel: Kernel, width: int) -> list[str]:
    taps = [line for tap in (0, 1) for line in block("", *_plain_tap(kernel, width, tap))]
    return [*taps, "x += 2;", f"weight += {2 * width};"]


def _packed_taps(kernel: Kernel, width: int, taps: int) -> list[str]:
    """All products of one byte of int4 weights per channel, of which ``taps`` nibbles count."""
    lines = [
        f"const int32_t x_{p}_{tap} = x[{p * kernel.stride + tap}];"
        for p in range(kernel.pixels)
        for tap in range(taps)
    ]
    for c in range(width):
        nibbles = [low_nibble(f"weight[{c}]"), f"weight[{c}] >> 4"][:taps]
        for tap, nibble in enumerate(nibbles):
            lines.append(f"const int32_t weight_{c}_{tap} = {nibble};")
            values = [f"x_{p}_{tap}" for p in range(kernel.pixels)]
            lines += kernel.products(c, f"weight_{c}_{tap}", values)
    return lines if taps == 1 else [*lines, "x += 2;", f"weight += {width};"]


def _sparse(kernel: Kernel) -> list[str]:
    if kernel.encoding.layout.packed:
        decode = ["const int32_t code = *weight++;", "const int32_t value = code >> 4;"]
        decode.append("x += code & 15;")
    else:
        decode = ["x += (uint8_t)weight[0];", "const int32_t value = weight[1];", "weight += 2;"]
    entries = block(
        f"for (int32_t entry = counts_{kernel.index}[channel]; entry > 0; entry--)",
        *decode,
        *kernel.products(0, "value", [f"x[{p * kernel.stride}]" for p in range(kernel.pixels)]),
    )
    return [
        f"const int8_t *weight = weights_{kernel.index};",
        *block(
            f"for (int32_t channel = 0; channel < {kernel.channels}; channel++)",
            *kernel.sums(1),
            f"const {kernel.source_type} *x = window;",
            *entries,
            *kernel.stores(1),
        ),
    ]
