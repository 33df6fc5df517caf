"""The text of a VNN-LIB file as nested lists: tokens, lines, and limits for hostile input.

Both versions share this: parenthesised lists of symbols, numbers and strings, comments from ``;``
to the end of the line, and in version 2 indices or shapes in brackets behind a symbol. Nothing here
recurses; time and memory are linear in the size of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from cactus_edge.errors import DataError

MOST_BYTES = 1 << 26
DEEPEST = 64
MOST_NODES = 1 << 19
"""Of one list at the top; each takes a hundred bytes."""
_LONGEST = 100
_LARGEST_EXPONENT = 60
_MOST_INDICES = 16

_TOKEN = re.compile(
    r"(?P<skip>[ \t\r\n]+|;[^\n]*)"
    r"|(?P<open>\()"
    r"|(?P<close>\))"
    r"|(?P<index>\[[0-9, \t\r\n]*\])"
    r'|(?P<string>"(?:[^"\\\n]|\\[^\n])*")'
    r'|(?P<symbol>[^\s()\[\],;"]+)'
)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE](?P<exponent>[+-]?[0-9]+))?")


@dataclass(frozen=True, slots=True)
class Node:
    """A symbol, number or string (``text``), or a list (``children``), and where it starts.

    ``indices`` are the integers in brackets behind a symbol, None without brackets.
    """

    line: int
    text: str = ""
    children: tuple[Node, ...] | None = None
    indices: tuple[int, ...] | None = None

    @property
    def head(self) -> str:
        """The symbol that a list starts with; an empty string where there is none."""
        return self.children[0].text if self.children else ""

    @property
    def arguments(self) -> tuple[Node, ...]:
        """What follows the head of a list."""
        return self.children[1:] if self.children else ()


@dataclass(frozen=True)
class Source:
    """A file's name, for messages."""

    file: str

    def error(self, line: int, message: str) -> DataError:
        """An error at a line."""
        return DataError(f"{self.file}:{line}: {message}")


def read(content: bytes, source: Source) -> Iterator[Node]:
    """The lists at the top of a file, one by one: no more than one is held here.

    Raises:
        DataError: too large, not text, or not balanced lists of tokens.
    """
    if len(content) > MOST_BYTES:
        raise DataError(f"{source.file}: {len(content)} bytes; up to {MOST_BYTES} are read")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        raise source.error(line, "not UTF-8 text") from None
    position = nodes = 0
    line = 1
    open_lists: list[tuple[int, list[Node]]] = [(0, [])]
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            shown = text[position : position + 20].split("\n")[0]
            raise source.error(line, f"unexpected {shown!r}")
        kind, token = match.lastgroup, match.group()
        position = match.end()
        nodes += kind != "skip"
        if nodes > MOST_NODES:
            raise source.error(line, f"a list of more than {MOST_NODES} parts; write several")
        if kind == "open":
            if len(open_lists) > DEEPEST:
                raise source.error(line, f"lists nested deeper than {DEEPEST}")
            open_lists.append((line, []))
        elif kind == "close":
            if len(open_lists) == 1:
                raise source.error(line, "a ')' without its '('")
            begin, children = open_lists.pop()
            node = Node(begin, children=tuple(children))
            if len(open_lists) == 1:
                yield node
                nodes = 0
            else:
                open_lists[-1][1].append(node)
        elif kind == "index":
            _attach(open_lists[-1][1], token, line, source)
        elif kind != "skip":
            if len(open_lists) == 1:
                raise source.error(line, f"'{token[:20]}' outside of a list")
            if len(token) > _LONGEST:
                raise source.error(line, f"'{token[:20]}...' is longer than {_LONGEST} characters")
            open_lists[-1][1].append(Node(line, token))
        line += token.count("\n")
    if len(open_lists) > 1:
        raise source.error(open_lists[-1][0], "a '(' without its ')'")


def _attach(children: list[Node], token: str, line: int, source: Source) -> None:
    """Put indices behind the symbol that they follow."""
    last = children[-1] if children else None
    if last is None or not last.text or last.indices is not None:
        raise source.error(line, f"'{token[:20]}' does not follow a name")
    parts = [part.strip() for part in token[1:-1].split(",")] if token[1:-1].strip() else []
    if len(parts) > _MOST_INDICES or not all(part.isdigit() and len(part) < 10 for part in parts):
        raise source.error(line, f"'{token[:40]}' is no list of indices such as [0,12]")
    children[-1] = replace(last, indices=tuple(int(part) for part in parts))


def number(node: Node, source: Source) -> Fraction | None:
    """The exact value of a number; None where the node is none.

    Raises:
        DataError: a number whose exponent is beyond all reason.
    """
    match = _NUMBER.fullmatch(node.text) if node.children is None else None
    if match is None or node.indices is not None:
        return None
    exponent = match["exponent"] or "0"
    if len(exponent) > 4 or abs(int(exponent)) > _LARGEST_EXPONENT:
        raise source.error(node.line, f"the exponent of {node.text} is beyond {_LARGEST_EXPONENT}")
    return Fraction(node.text)
