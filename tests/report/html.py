"""Pages read back with the standard library: well-formed, and tables as text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "input", "br", "img", "link", "hr"}


@dataclass
class Element:
    """``text`` is what stands directly in it or in its children."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts).strip()

    def every(self, tag: str) -> list[Element]:
        found = [child for child in self.children if child.tag == tag]
        return found + [deeper for child in self.children for deeper in child.every(tag)]

    def by_id(self, name: str) -> Element:
        if self.attributes.get("id") == name:
            return self
        for child in self.children:
            try:
                return child.by_id(name)
            except KeyError:
                continue
        raise KeyError(name)


class _Strict(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"doubled attribute in <{tag}>"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.parts.append(data)


def parse(page: bytes) -> Element:
    parser = _Strict()
    parser.feed(page.decode())
    parser.close()
    assert len(parser.open) == 1, f"<{parser.open[-1].tag}> is never closed"
    return parser.root


def rows(table: Element) -> list[list[str]]:
    body = table.every("tbody")[0]
    return [[cell.text for cell in row.children] for row in body.every("tr")]


def embedded(root: Element) -> dict[str, Any]:
    return json.loads(root.by_id("data").text)
