"""Coverage-guided search for files that a target does not handle: ``python -m tests.fuzz.search``.

Atheris (libFuzzer) makes files and follows the branches of the target's modules. What leaves a
target, takes more than ``SECONDS`` of processor time or more memory than ``memory_limit`` allows is
a finding; the smallest file for each place in the code is kept, and the search goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import resource
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

from tests.fuzz.guides import guide, readers
from tests.fuzz.limits import SECONDS, memory_limit

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

PACKAGE = "cactus_edge"
PAGE = resource.getpagesize()
_SAVE_EVERY = 500
_POOL = 3000
_THOROUGH = 8
"""Of so many files one is tested for all that has to hold of what was read."""


@contextmanager
def guided(prefixes: tuple[str, ...]) -> Iterator[None]:
    """Instrument these of the modules imported here; atheris itself takes whole packages."""
    with atheris.instrument_imports(include=list(prefixes)):
        finder = sys.meta_path[0]
        find = finder.find_spec

        def find_guided(name: str, *rest: object) -> object:
            return find(name, *rest) if name.startswith(prefixes) else None

        finder.find_spec = find_guided  # type: ignore[method-assign]
        yield


def peak() -> int:
    """The largest resident size so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def resident() -> int:
    """The resident size now, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def place(error: BaseException) -> str:
    """Where in this package an error was raised, and its class."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"/{PACKAGE}/" in f.filename] or list(frames)
    return f"{type(error).__name__}-{Path(own[-1].filename).stem}-{own[-1].name}"


def mutated_message(data: bytes, longest: int, seed: int) -> bytes:
    """Another protobuf message: one field is changed, doubled or left out, and lengths fit."""
    choice = random.Random(seed)
    fields = _fields(data)
    if fields is None or not fields:
        return atheris.Mutate(data, longest)
    index = choice.randrange(len(fields))
    key, payload = fields[index]
    kind = choice.random()
    if kind < 0.05:
        fields.insert(choice.randrange(len(fields) + 1), fields[index])
    elif kind < 0.1:
        del fields[index]
    elif key & 7 == 2 and kind < 0.8 and _fields(payload):
        fields[index] = key, mutated_message(payload, longest, choice.getrandbits(32))
    elif key & 7 == 2:
        fields[index] = key, atheris.Mutate(payload, max(len(payload) + 16, 16))
    else:
        number = choice.choice((0, 1, 2, 3, 7, 16, 127, 2**31, 2**62, choice.getrandbits(8)))
        fields[index] = key, _varint(number) if key & 7 == 0 else choice.randbytes(len(payload))
    return b"".join(
        _varint(key) + (_varint(len(payload)) if key & 7 == 2 else b"") + payload
        for key, payload in fields
    )[:longest]


def mutated_flatbuffer(data: bytes, longest: int, seed: int) -> bytes:
    """Another flatbuffer: mostly some values in place, for offsets tie its parts together."""
    choice = random.Random(seed)
    if len(data) < 8 or choice.random() < 0.2:
        return atheris.Mutate(data, longest)
    changed = bytearray(data)
    for _ in range(choice.choice((1, 1, 1, 2, 4))):
        width = choice.choice((1, 1, 2, 4))
        at = choice.randrange(len(data) // width) * width
        old = int.from_bytes(data[at : at + width], "little")
        near, bit = old + choice.randint(-4, 4), old ^ (1 << choice.randrange(8 * width))
        number = choice.choice((0, 1, -1, near, bit, choice.getrandbits(8 * width)))
        changed[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(changed)


def _fields(data: bytes) -> list[tuple[int, bytes]] | None:
    """Key and payload of each field of a message; None where the bytes are none."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        if key & 7 == 0:
            end = _number(data, at)[1]
        elif key & 7 == 2:
            length, at = _number(data, at)
            end = at + length
        else:
            end = at + {1: 8, 5: 4}.get(key & 7, 1 << 60)
        if key < 8 or end > len(data):
            return None
        found.append((key, data[at:end]))
        at = end
    return found


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    return 0, 1 << 60


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


class Search:
    """One target's search; everything that it finds lies in ``folder``."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        self.folder = folder
        self.executions = self.accepted = 0
        self.begun = time.process_time()
        self.count_file = folder / f"count-{int(time.time())}-{os.getpid()}.json"
        for name in ("findings", "accepted"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.random = random.Random(0)
        self.readers = readers(target.name)

    def one(self, data: bytes) -> None:
        before, start = peak(), time.process_time()
        try:
            if self.target.accepts(data, thorough=not zlib.crc32(data) % _THOROUGH):
                self.keep(data)
        except Exception as error:
            self.found(data, place(error), traceback.format_exc())
        seconds = time.process_time() - start
        if seconds > SECONDS:
            self.found(data, "slow", f"{seconds:.1f} s of processor time")
        if (after := peak()) > before and after - resident() > memory_limit(len(data)):
            self.found(data, "memory", f"{(after - resident()) >> 20} MiB for {len(data)} bytes")
        self.executions += 1
        if not self.executions % _SAVE_EVERY:
            self.save()

    def keep(self, data: bytes) -> None:
        """A sample of what was accepted, for comparison with a runtime."""
        self.accepted += 1
        if self.accepted <= _POOL or self.random.random() < _POOL / self.accepted:
            slot = self.accepted if self.accepted <= _POOL else self.random.randrange(_POOL)
            (self.folder / "accepted" / f"{os.getpid()}-{slot}").write_bytes(data)

    def found(self, data: bytes, key: str, text: str) -> None:
        path = self.folder / "findings" / f"{key}.bin"
        if path.exists() and path.stat().st_size <= len(data):
            return
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(text)
        print(f"FINDING {self.target.name} {key} ({len(data)} bytes)", flush=True)

    def save(self) -> None:
        record = {
            "readers": self.readers,
            "executions": self.executions,
            "accepted": self.accepted,
            "processor seconds": round(time.process_time() - self.begun),
        }
        written = self.count_file.with_suffix(".part")
        written.write_text(json.dumps(record))
        written.replace(self.count_file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    given = parser.parse_args()
    logging.disable()  # warnings of files that are read nevertheless
    with guided(guide(given.target)):
        from tests.fuzz.targets import TARGETS

        target = TARGETS[given.target]
        assert target.accepts(target.seeds()[0])  # some readers are imported as they are used
    folder = given.folder / given.target
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        assert target.accepts(seed), given.target
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    kept = Path(__file__).with_name("corpus") / given.target
    options = [
        f"-max_total_time={given.seconds}",
        f"-max_len={target.longest}",
        "-len_control=0",
        "-timeout=120",
        "-rss_limit_mb=4096",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    folders = [str(corpus), *([str(kept)] if kept.is_dir() else [])]
    made = {"onnx": mutated_message, "tflite": mutated_flatbuffer}.get(given.target)
    mutator = {"custom_mutator": made} if made else {}
    if made:
        options.append("-mutate_depth=2")  # five changes of a valid file leave few that are read
    atheris.Setup([sys.argv[0], *options, *folders], Search(target, folder).one, **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
