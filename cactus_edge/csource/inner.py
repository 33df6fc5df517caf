"""The inner loops: windows of the input times a table of weights.

Output channels that share a load of the input (a block) and output pixels that share a load of the
weights are unrolled into named ``int32_t`` accumulators, as many as a Cortex-M has registers for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cactus_edge.csource import pairs, vectors
from cactus_edge.csource.encoding import Encoding, Layout, blocks, group_units, place
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
    sums themselves are written. ``pairs``: there may be a variant with two-way
    multiplications.
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
    pairs: bool = False

    @property
    def words(self) -> bool:
        """Whether every block of int8 weights begins at a multiple of four, if the table does."""
        return self.encoding.block * self.taps % 4 == 0 or self.channels <= self.encoding.block

    def of_ends(self, stride: int, step: int, *, raw: bool = False) -> Kernel:
        """The same for both ends of a box, that far apart in the input and in the output."""
        return replace(self, pixels=2, stride=stride, step=step, ends=True, raw=raw, pairs=False)

    def products(self, channel: int, weight: str, values: Sequence[str]) -> list[str]:
        """Lines that add a weight times the value of each pixel."""
        if not self.ends:
            return [f"sum_{p}_{channel} += {weight} * {value};" for p, value in enumerate(values)]
        return both_ends(weight, values[0], values[1], [f"sum_{p}_{channel}" for p in (0, 1)])

    def sums(self, channels: Sequence[int]) -> list[str]:
        """The declarations of the accumulators of some channels of a block."""
        first = [f"int32_t sum_0_{c} = bias_{self.index}[channel{plus(c)}];" for c in channels]
        others = [
            f"int32_t sum_{p}_{c} = sum_0_{c};" for p in range(1, self.pixels) for c in channels
        ]
        return first + others

    def stores(self, channels: Sequence[int]) -> list[str]:
        """The lines that end the accumulators of some channels of a block."""
        lines: list[str] = []
        for pixel in range(self.pixels):
            for c in channels:
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


def both_ends(weight: str, low: str, high: str, sums: Sequence[str]) -> list[str]:
    """Lines that add a weight times an interval to the sums of lower and upper ends.

    A negative weight times the other end is ``weight * low + weight * (high - low)``: no branch.
    Every sum on the way is one that some input has, so it fits.
    """
    negative = f"negative_{weight}"
    return [
        f"const int32_t {negative} = {weight} < 0 ? {weight} : 0;",
        f"{sums[0]} += {weight} * {low} + {negative} * ({high} - {low});",
        f"{sums[1]} += {weight} * {high} - {negative} * ({high} - {low});",
    ]


def low_nibble(byte: str) -> str:
    """The signed value of the low nibble."""
    return f"(({byte} & 15) ^ 8) - 8"


def _dense(kernel: Kernel) -> list[str]:
    if kernel.ends:
        return _dense_ends(kernel)
    lines = [f"const int8_t *weight = weights_{kernel.index};"]
    for start, end, width in blocks(kernel.channels, kernel.encoding.block):
        lines += block(
            f"for (int32_t channel = {start}; channel < {end}; channel += {width})",
            *kernel.sums(range(width)),
            f"const {kernel.source_type} *x = window;",
            *_taps(kernel, width, range(width)),
            *kernel.stores(range(width)),
        )
    return lines


def _dense_ends(kernel: Kernel) -> list[str]:
    """A block's channels two by two: four sums are what there are registers for."""
    lines = [f"const int8_t *table = weights_{kernel.index};"]
    row = (kernel.taps + 1) // 2 if kernel.encoding.layout.packed else kernel.taps
    for start, end, width in blocks(kernel.channels, kernel.encoding.block):
        body: list[str] = []
        for first in range(0, width, 2):
            channels = range(first, min(first + 2, width))
            body += block(
                "",
                *kernel.sums(channels),
                "const int8_t *weight = table;",
                f"const {kernel.source_type} *x = window;",
                *_taps(kernel, width, channels),
                *kernel.stores(channels),
            )
        head = f"for (int32_t channel = {start}; channel < {end}; channel += {width})"
        lines += block(head, *body, f"table += {row * width};")
    return lines


def _taps(kernel: Kernel, width: int, channels: Sequence[int]) -> list[str]:
    """All products of some channels of a block of that width; ``weight`` moves behind the block."""
    layout = kernel.encoding.layout
    bytes_of = _packed_bytes if layout.packed else _plain_bytes
    groups, rest = divmod(kernel.taps, 4)
    units = group_units(layout)
    steps: list[str] = []
    if groups:
        body: list[str] = []
        for unit in range(units):
            places = {c: place(layout, width, c, unit) for c in channels}
            body += block("", *bytes_of(kernel, places, unit * 4 // units, 4 // units))
        body += ["x += 4;", f"weight += {units * width};"]
        head = f"for (int32_t n = 0; n < {groups}; n++)"
        steps += _choice(kernel, width, groups, block(head, *body))
    for unit, tap in enumerate(range(0, rest, 2 if layout.packed else 1)):
        places = {c: unit * width + c for c in channels}
        taps = min(2, rest - tap) if layout.packed else 1
        steps += block("", *bytes_of(kernel, places, tap, taps))
    if rest and not kernel.ends:
        steps.append(f"weight += {(rest + 1) // 2 * width if layout.packed else rest * width};")
    return steps


def _choice(kernel: Kernel, width: int, groups: int, portable: list[str]) -> list[str]:
    """The groups of four taps, by two-way or vector multiplications where there are such."""
    packed, pixels = kernel.encoding.layout.packed, range(kernel.pixels)
    apart = kernel.stride if kernel.pixels > 1 else 0
    if not kernel.pairs or (packed and width % 2) or apart > pairs.FURTHEST:
        return portable
    name = "wide" if packed else "sum"
    sums = [[f"{name}_{p}_{c}" for c in range(width)] for p in pixels]
    kind = "u" if kernel.source_type == "uint8_t" else "s"

    def paired(count: int) -> list[str]:
        return pairs.loop(count, apart, sums, kind, packed=packed) if count else []

    def whole(loop: list[str]) -> list[str]:
        if not packed:
            return loop
        both = [(p, c) for p in pixels for c in range(width)]
        starts = [f"int32_t wide_{p}_{c} = 0;" for p, c in both]
        ends = [f"sum_{p}_{c} += wide_{p}_{c} >> 4;" for p, c in both]
        return block("", *starts, *loop, *ends)

    lines = ["#ifdef PAIRS", *whole(paired(groups)), "#else", *portable, "#endif"]
    many = vectors.split(groups, width, is_packed=packed) if kind == "s" else 0
    if many:
        loop = (
            vectors.packed(many, apart, sums)
            if packed
            else vectors.plain(many, apart, sums, words=kernel.words)
        )
        vectored = whole([*loop, *paired(groups - many)])
        lines = ["#ifdef VECTORS", *vectored, "#else", *lines, "#endif"]
    return lines


def _plain_bytes(kernel: Kernel, places: Mapping[int, int], tap: int, taps: int) -> list[str]:
    """All products of one tap of int8 weights; ``places`` are theirs by channel."""
    assert taps == 1, "a byte is one weight"
    lines = [f"const int32_t x_{p} = x[{p * kernel.stride + tap}];" for p in range(kernel.pixels)]
    for c, where in places.items():
        lines.append(f"const int32_t weight_{c} = weight[{where}];")
        lines += kernel.products(c, f"weight_{c}", [f"x_{p}" for p in range(kernel.pixels)])
    return lines


def _packed_bytes(kernel: Kernel, places: Mapping[int, int], tap: int, taps: int) -> list[str]:
    """The same of a byte of int4 weights per channel, of which ``taps`` nibbles count."""
    lines = [
        f"const int32_t x_{p}_{t} = x[{p * kernel.stride + tap + t}];"
        for p in range(kernel.pixels)
        for t in range(taps)
    ]
    for c, where in places.items():
        nibbles = [low_nibble(f"weight[{where}]"), f"weight[{where}] >> 4"][:taps]
        for t, nibble in enumerate(nibbles):
            lines.append(f"const int32_t weight_{c}_{t} = {nibble};")
            values = [f"x_{p}_{t}" for p in range(kernel.pixels)]
            lines += kernel.products(c, f"weight_{c}_{t}", values)
    return lines


def _sparse(kernel: Kernel) -> list[str]:
    if kernel.encoding.layout.packed:
        decode = ["const int32_t code = *weight++;", "const int32_t value = code >> 4;"]
        decode.append("x += code & 15;")
    else:
        decode = ["x += (uint8_t)weight[0];", "const int32_t value = weight[1];", "weight += 2;"]
    products = kernel.products(
        0, "value", [f"x[{p * kernel.stride}]" for p in range(kernel.pixels)]
    )
    return [
        f"const int8_t *weight = weights_{kernel.index};",
        *block(
            f"for (int32_t channel = 0; channel < {kernel.channels}; channel++)",
            *kernel.sums([0]),
            f"const {kernel.source_type} *x = window;",
            f"int32_t entry = counts_{kernel.index}[channel];",
            *_words(kernel),
            *block("for (; entry > 0; entry--)", *decode, *products),
            *kernel.stores([0]),
        ),
    ]


def _words(kernel: Kernel) -> list[str]:
    """Entries of a sparse layer by whole words, where there are instructions for that."""
    packed = kernel.encoding.layout.packed
    far = (kernel.pixels - 1) * kernel.stride > pairs.FURTHEST
    if not kernel.pairs or far or kernel.pixels > pairs.most_pixels(packed=packed):
        return []
    name = "wide" if packed else "sum"
    sums = [f"{name}_{p}_0" for p in range(kernel.pixels)]
    kind = "u" if kernel.source_type == "uint8_t" else "s"
    loop = pairs.sparse_loop(kernel.stride, sums, kind, packed=packed)
    if packed:
        ends = [f"sum_{p}_0 += wide_{p}_0 >> 4;" for p in range(kernel.pixels)]
        loop = [*(f"int32_t {sum_} = 0;" for sum_ in sums), *loop, *ends]
    entries = pairs.per_word(packed=packed)
    head = [f"int32_t n = entry / {entries};", f"entry %= {entries};"]
    return ["#ifdef PAIRS", *block("", *head, *block("if (n > 0)", *loop)), "#endif"]
