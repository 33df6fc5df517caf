"""Finished candidates in a folder: what was measured is not measured again.

<key>.json         a ``Candidate``; the key is a hash of all that its figures depend on
<sha256>.tflite    the model it is about, named by its content
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

import cactus_edge
from cactus_edge import files
from cactus_edge.errors import UsageError
from cactus_edge.search.report import FORMAT, VERSION, Candidate

_LETTERS = 16


def key_of(parts: Sequence[object]) -> str:
    """A name for what depends on ``parts`` and on this version of the tool."""
    whole = [FORMAT, VERSION, cactus_edge.__version__, *parts]
    return hashlib.sha256(msgspec.json.encode(whole)).hexdigest()[:_LETTERS]


class Store:
    """A folder of finished candidates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, candidate: Candidate) -> Path:
        """Where a candidate's file is."""
        return self.folder / f"{candidate.sha256[:_LETTERS]}.tflite"

    def content(self, candidate: Candidate) -> bytes:
        """The bytes of a candidate's file.

        Raises:
            UsageError: it is not there, or not what was measured.
        """
        path = self.model(candidate)
        content = files.read(path, "candidate")
        if hashlib.sha256(content).hexdigest() != candidate.sha256:
            raise UsageError(f"{path}: not the file that was measured; remove it and search again")
        return content

    def find(self, key: str) -> Candidate | None:
        """What was kept under this key; None if nothing was, or it is damaged."""
        try:
            kept = files.read(self.folder / f"{key}.json", "candidate")
            candidate = msgspec.json.decode(kept, type=Candidate)
            self.content(candidate)
        except (UsageError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        return candidate

    def keep(self, key: str, candidate: Candidate, content: bytes) -> None:
        """Write the model, then the figures: with these, both are complete."""
        files.write(self.model(candidate), content, force=True)
        files.write(self.folder / f"{key}.json", msgspec.json.encode(candidate), force=True)
