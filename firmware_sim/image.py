"""What is in an ELF file: segments to load, symbols, and how much of which memory it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cactus_edge.csource import CLayer
from cactus_edge.errors import DoesNotFitError, MissingExtraError
from firmware_sim.boards import Board

# A model that leaves less than this for the stack is not worth starting.
_LEAST_STACK = 512
_LAYERS_NAMED = 5


@dataclass(frozen=True)
class Image:
    """``segments`` are (address, content); ``static_bytes`` is all static data in RAM."""

    segments: tuple[tuple[int, bytes], ...]
    symbols: dict[str, int]
    code_bytes: int
    constant_bytes: int
    data_bytes: int
    static_bytes: int

    def function(self, name: str) -> int:
        """Where a function is; 0 if there is none of this name."""
        return self.symbols.get(name, 0) & ~1

    @property
    def flash_bytes(self) -> int:
        """Code, constants and the initial values of data."""
        return self.code_bytes + self.constant_bytes + self.data_bytes

    def address(self, symbol: str) -> int:
        """Where a symbol is, the Thumb bit of functions cleared."""
        return self.symbols[symbol] & ~1


def read_image(path: Path) -> Image:
    """The image in an ELF file.

    Raises:
        MissingExtraError: pyelftools is not installed.
    """
    try:
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection
    except ModuleNotFoundError:
        raise MissingExtraError("pyelftools", "sim", "Reading firmware") from None
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        segments = tuple(
            (int(segment["p_paddr"]), bytes(segment.data()))
            for segment in elf.iter_segments()
            if segment["p_type"] == "PT_LOAD" and segment["p_filesz"]
        )
        tables = [s for s in elf.iter_sections() if isinstance(s, SymbolTableSection)]
        symbols = {
            symbol.name: int(symbol["st_value"]) for t in tables for symbol in t.iter_symbols()
        }
        sizes = {section.name: int(section["sh_size"]) for section in elf.iter_sections()}
    text, constants, data, bss = (
        sizes.get(name, 0) for name in (".text", ".rodata", ".data", ".bss")
    )
    return Image(segments, symbols, text, constants, data, data + bss)


def check_fit(image: Image, board: Board, layers: Sequence[CLayer] = ()) -> None:
    """Whether ``board`` can hold the image and a stack.

    Raises:
        DoesNotFitError: it cannot; the message says by how much, and which layers need most.
    """
    flash = {layer: layer.table_bytes for layer in layers}
    arena = {layer: layer.live_bytes for layer in layers}
    needs = (
        ("flash", image.flash_bytes, board.flash_bytes, "constants", flash),
        ("RAM", image.static_bytes + _LEAST_STACK, board.ram_bytes, "the arena", arena),
    )
    for what, needed, available, where, shares in needs:
        if needed > available:
            raise DoesNotFitError(
                f"the model does not fit {board.name} ({board.cpu}): it needs {needed} bytes of "
                f"{what}, the board has {available}; prune it, pack its weights in 4 bits, or "
                f"choose a larger board{_largest(shares, where)}"
            )


def _largest(shares: Mapping[CLayer, int], where: str) -> str:
    """The layers that need most, as the end of a sentence."""
    ordered = sorted((layer for layer in shares if shares[layer]), key=lambda n: -shares[n])
    parts = [
        f"layer {n.index} ({n.kind} '{n.name}') {shares[n]} bytes" for n in ordered[:_LAYERS_NAMED]
    ]
    return f". Of {where} need most: {', '.join(parts)}" if parts else ""
