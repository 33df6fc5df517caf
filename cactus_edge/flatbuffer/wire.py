"""Flatbuffer tables, written from dictionaries and read with every access checked.

The ``flatbuffers`` runtime for Python verifies nothing: an offset in a damaged file reads from
anywhere, negative positions count from the end. Here every table, vector and string is checked
against the file before it is touched, as the C++ verifier does, and reading is paid from a budget
in proportion to the file, because offsets may point to the same bytes over and over.

Reference: https://flatbuffers.dev/internals.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import flatbuffers
import numpy as np
import numpy.typing as npt

from cactus_edge.errors import MalformedModelError, UnsupportedModelError
from cactus_edge.flatbuffer import schema
from cactus_edge.flatbuffer.schema import Field

# A table to be written: scalars are int, vectors of scalars arrays or bytes, unions a pair.
Values = Mapping[str, object]

_FORMATS = {
    "bool": "<B",
    "int8": "<b",
    "uint8": "<B",
    "int32": "<i",
    "uint32": "<I",
    "float32": "<I",
    "int64": "<q",
    "uint64": "<Q",
}
_DTYPES = {
    "bool": np.dtype("u1"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "int32": np.dtype("<i4"),
    "uint32": np.dtype("<u4"),
    "float32": np.dtype("<u4"),
    "int64": np.dtype("<i8"),
}
# Of a file's size. Converters' files need 3; a table costs more than its bytes, as an object does.
_BUDGET_FACTOR = 16
_TABLE_COST = 64
_KEPT_FACTOR, _KEPT_BYTES = 2, 4 << 20
_MOST_TABLES = 1 << 15
_MOST_INTEGERS = 1 << 16
_LONGEST_TEXT = 1 << 14


# ---------------------------------------------------------------------------------------- writing
def serialize(model: Values) -> bytes:
    """The file whose root is ``Model`` with these values; the same values give the same bytes."""
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(_write_table(builder, "Model", model), file_identifier=schema.IDENTIFIER)
    return bytes(builder.Output())


def _write_table(builder: flatbuffers.Builder, table: str, values: Values) -> int:
    fields = schema.TABLES[table]
    assert values.keys() <= fields.keys(), values.keys() - fields.keys()
    present = [item for item in fields.values() if item.name in values]
    offsets = {
        item.name: _write_reference(builder, item, values[item.name])
        for item in present
        if not item.scalar
    }
    builder.StartObject(len(fields))
    # Large fields first leaves no gaps between them.
    for item in sorted(present, key=lambda f: (-f.size, f.slot)):
        if not item.scalar:
            builder.PrependUOffsetTRelativeSlot(item.slot, offsets[item.name], 0)
            continue
        name = "Uint32" if item.type == "float32" else item.type.capitalize()
        prepend = getattr(builder, f"Prepend{name}Slot")
        prepend(item.slot, values[item.name], item.default)
    return cast(int, builder.EndObject())


def _write_reference(builder: flatbuffers.Builder, item: Field, value: object) -> int:
    if item.type == "string":
        return cast(int, builder.CreateString(value))
    if item.type == "union":
        table, values = cast(tuple[str, Values], value)
        return _write_table(builder, table, values)
    if not item.item:
        return _write_table(builder, item.type, cast(Values, value))
    if isinstance(value, bytes):
        return _write_bytes(builder, value)
    if item.item in schema.SCALARS:
        array = np.asarray(value, _DTYPES[item.item])
        return cast(int, builder.CreateNumpyVector(array))
    offsets = [_write_table(builder, item.item, v) for v in cast(list[Values], value)]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return cast(int, builder.EndVector())


def _write_bytes(builder: flatbuffers.Builder, data: bytes) -> int:
    """A vector of bytes at the alignment that the schema forces for buffers."""
    builder.StartVector(1, len(data), schema.DATA_ALIGNMENT)
    head = builder.head - len(data)
    builder.Bytes[head : builder.head] = data
    builder.head = head
    return cast(int, builder.EndVector())


# ---------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Place:
    """A file and where in it, for messages."""

    file: str
    where: str = ""

    def at(self, where: str) -> Place:
        """Another place in the same file."""
        return Place(self.file, where)

    def message(self, text: str) -> str:
        """One line; what a file says may be of any length, so each part is cut."""
        parts = [self.where, text] if self.where else [text]
        cut = [part if len(part) <= 300 else f"{part[:297]}..." for part in parts]
        return ": ".join([self.file, *cut])

    def malformed(self, text: str) -> MalformedModelError:
        """The error for what no writer should have produced."""
        return MalformedModelError(self.message(text))

    def unsupported(self, text: str) -> UnsupportedModelError:
        """The error for what other tools may handle."""
        return UnsupportedModelError(self.message(text))


@dataclass
class File:
    """The bytes of a file, how many more of them may be looked at, and how many more copied."""

    data: bytes
    name: str
    budget: int = field(init=False)
    kept: int = field(init=False)

    def __post_init__(self) -> None:
        """Allow each byte to be looked at and to be copied a fixed number of times on average."""
        self.budget = _BUDGET_FACTOR * len(self.data) + (1 << 18)
        self.kept = _KEPT_FACTOR * len(self.data) + _KEPT_BYTES

    def spend(self, count: int, place: Place) -> None:
        """Pay for looking at ``count`` bytes.

        Raises:
            MalformedModelError: the file refers to the same bytes far too often.
        """
        self.budget -= count
        if self.budget < 0:
            raise place.malformed("refers to the same bytes over and over")

    def keep(self, count: int, place: Place) -> None:
        """Pay for a copy of ``count`` bytes that the graph will hold.

        Raises:
            UnsupportedModelError: constants or texts are used far too often.
        """
        self.kept -= count
        if self.kept < 0:
            raise place.unsupported(
                "uses the same constants over and over; repeat them in the file"
            )

    def scalar(self, kind: str, position: int, place: Place) -> int:
        """The aligned scalar at ``position``."""
        size = schema.SCALARS[kind]
        if not 0 <= position <= len(self.data) - size:
            raise place.malformed(
                f"offset {position} is outside the file of {len(self.data)} bytes"
            )
        if position % size:
            raise place.malformed(f"offset {position} is not aligned to {size} bytes")
        return struct.unpack_from(_FORMATS[kind], self.data, position)[0]

    def follow(self, position: int, place: Place) -> int:
        """The position that the unsigned offset at ``position`` points to."""
        offset = self.scalar("uint32", position, place)
        if offset == 0:
            raise place.malformed(f"offset at {position} is 0")
        return position + offset


def open_root(data: bytes, name: str) -> Table:
    """The root table of a ``.tflite`` file of which every table has been verified.

    Raises:
        MalformedModelError: too short, another identifier, or anything outside the file.
        UnsupportedModelError: a field of a newer schema.
    """
    place = Place(name)
    if len(data) < 8 or data[4:8] != schema.IDENTIFIER:
        raise place.malformed(
            f"not a .tflite file ({len(data)} bytes without the identifier "
            f"'{schema.IDENTIFIER.decode()}' at offset 4)"
        )
    if len(data) > schema.LARGEST_FILE:
        raise place.malformed(f"{len(data)} bytes; a flatbuffer is smaller than 2 GiB")
    file = File(data, name)
    root = place.at("root")
    model = Table(file, "Model", file.follow(0, root), root)
    model.verify()
    return model


class Table:
    """A checked view of one table."""

    def __init__(self, file: File, kind: str, position: int, place: Place) -> None:
        """Check the table and its vtable.

        Raises:
            MalformedModelError: one of them does not lie inside the file.
            UnsupportedModelError: a field is set that the schema known here does not have.
        """
        self.file = file
        self.place = place
        self.position = position
        self._fields = schema.TABLES[kind]
        vtable = position - file.scalar("int32", position, place)
        header = self._header(vtable)
        slots = header[2:]
        file.spend(2 * len(header) + header[1] + _TABLE_COST, place)
        self._size = header[1]
        if any(0 < offset < 4 or offset >= self._size for offset in slots if offset):
            raise place.malformed(f"a field of its {kind} table lies outside the table")
        if any(slots[len(self._fields) :]):
            slot = next(i for i, o in enumerate(slots) if o and i >= len(self._fields))
            raise place.unsupported(f"field {slot} of its {kind} table is from a newer schema")
        self._slots = slots

    def _header(self, vtable: int) -> tuple[int, ...]:
        """The vtable as 16-bit integers: its size, the table's size, an offset per field."""
        data, place = self.file.data, self.place
        if not 0 <= vtable <= len(data) - 4 or vtable % 2:
            raise place.malformed(f"its vtable at {vtable} is outside the file or not aligned")
        size, extent = struct.unpack_from("<HH", data, vtable)
        if size < 4 or size % 2 or vtable + size > len(data):
            raise place.malformed(f"its vtable at {vtable} has a wrong size, {size} bytes")
        if extent < 4 or self.position + extent > len(data):
            raise place.malformed(f"its table at {self.position} runs over the end of the file")
        return struct.unpack_from(f"<{size // 2}H", data, vtable)

    def _at(self, name: str) -> int | None:
        """Where the field is stored, None if it is absent."""
        item = self._fields[name]
        offset = self._slots[item.slot] if item.slot < len(self._slots) else 0
        if not offset:
            return None
        if offset + item.size > self._size:
            raise self.place.malformed(f"field '{name}' runs over the end of its table")
        return self.position + offset

    def present(self, name: str) -> bool:
        """Whether the field is stored at all."""
        return self._at(name) is not None

    def integer(self, name: str) -> int:
        """A scalar, its default where it is absent; a float32 is its bit pattern."""
        item = self._fields[name]
        position = self._at(name)
        if position is None:
            return item.default
        return self.file.scalar(item.type, position, self.place)

    def _vector(self, name: str, size: int) -> tuple[int, int] | None:
        """``(position of the first element, count)`` of a vector that lies inside the file."""
        at = self._at(name)
        if at is None:
            return None
        start = self.file.follow(at, self.place)
        count = self.file.scalar("uint32", start, self.place)
        start += 4
        if start + count * size > len(self.file.data):
            raise self.place.malformed(
                f"'{name}' of {count} elements is longer than the file of "
                f"{len(self.file.data)} bytes"
            )
        if start % min(size, 8):
            raise self.place.malformed(f"'{name}' is not aligned to {size} bytes")
        self.file.spend(count * size + 4, self.place)
        return start, count

    def array(self, name: str) -> npt.NDArray[Any]:
        """A vector of scalars, [count] of its type; empty where it is absent."""
        item = self._fields[name].item
        dtype = _DTYPES[item]
        found = self._vector(name, dtype.itemsize)
        if found is None:
            return np.zeros(0, dtype)
        return np.frombuffer(self.file.data, dtype, found[1], found[0])

    def integers(self, name: str) -> tuple[int, ...]:
        """A vector of scalars as Python integers.

        Raises:
            UnsupportedModelError: more than any list of tensors or extents has.
        """
        array = self.array(name)
        if len(array) > _MOST_INTEGERS:
            raise self.place.unsupported(
                f"'{name}' has {len(array)} elements; up to {_MOST_INTEGERS} are supported"
            )
        return tuple(array.tolist())

    def text(self, name: str) -> str:
        """A string of printable characters; empty where it is absent."""
        found = self._vector(name, 1)
        if found is None:
            return ""
        start, count = found
        if count > _LONGEST_TEXT:
            raise self.place.unsupported(
                f"'{name}' has {count} bytes; up to {_LONGEST_TEXT} are supported"
            )
        raw = self.file.data[start : start + count]
        if self.file.data[start + count : start + count + 1] != b"\0":
            raise self.place.malformed(f"'{name}' does not end with a zero byte")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.place.malformed(f"'{name}' is not UTF-8") from None
        if not text.isprintable():
            raise self.place.malformed(f"'{name}' holds characters that cannot be printed")
        return text

    def verify(self) -> None:
        """Check everything below this table, read or not, as the C++ verifier does."""
        for item in self._fields.values():
            if item.scalar:
                self.integer(item.name)
            elif item.type == "string":
                self.text(item.name)
            elif item.type == "union":
                kind = schema.TABLE_OF_OPTIONS.get(self.integer(f"{item.name}_type"))
                if kind and (child := self.table(item.name, kind)):
                    child.verify()
            elif item.item in schema.SCALARS:
                self.array(item.name)
            elif item.item:
                for element in self.tables(item.name, item.item.lower()):
                    element.verify()
            elif item.type != "opaque" and (child := self.table(item.name)):
                child.verify()

    def table(self, name: str, kind: str = "") -> Table | None:
        """The table that the field refers to; ``kind`` names the table of a union."""
        at = self._at(name)
        if at is None:
            return None
        target = self.file.follow(at, self.place)
        return Table(self.file, kind or self._fields[name].type, target, self.place)

    def tables(self, name: str, label: str) -> list[Table]:
        """A vector of tables; the place of each is ``label`` and its index."""
        found = self._vector(name, 4)
        if found is None:
            return []
        if found[1] > _MOST_TABLES:
            raise self.place.unsupported(
                f"{found[1]} of '{name}'; up to {_MOST_TABLES} are supported"
            )
        kind = self._fields[name].item
        elements: list[Table] = []
        for index in range(found[1]):
            place = self.place.at(f"{label} {index}")
            target = self.file.follow(found[0] + 4 * index, place)
            elements.append(Table(self.file, kind, target, place))
        return elements
