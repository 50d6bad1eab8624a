"""What the message families share: counted names, and messages laid out by a construct schema."""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

from construct import (
    Adapter,
    Const,
    Construct,
    ConstructError,
    FormatField,
    GreedyBytes,
    Int8ub,
    Prefixed,
    Renamed,
    Struct,
    Subconstruct,
)

from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.messages import Message
from postcopy_proto.ramblock import IDSTR_MAX, decode_idstr, encode_idstr

M = TypeVar("M", bound=Message)


def malformed(reason: str, message: str | None = None) -> RemoteProtocolError:
    """The error for bytes of which no message can consist; the decoder adds where it was."""
    return RemoteProtocolError(reason, kind=ErrorKind.MALFORMED, message=message)


def checked_idstr(raw: bytes | memoryview, limit: int) -> str:
    """A peer's name: 1 to `limit` bytes without a NUL; RemoteProtocolError otherwise."""
    name = bytes(raw)
    if not name:
        raise malformed(f"a name of 0 bytes; 1 to {IDSTR_MAX} are allowed")
    if len(name) > limit:
        raise RemoteProtocolError(
            f"a name of {len(name)} bytes; the limit is {limit}", kind=ErrorKind.LIMIT
        )
    if 0 in name:
        raise malformed(f"a NUL in the name {name!r}")
    return decode_idstr(name)


class IdstrAdapter(Adapter):  # type: ignore[misc]
    """A name as str; see `ramblock.encode_idstr` for what a name may be."""

    def _decode(self, obj: bytes, context: Any, path: Any) -> str:
        return checked_idstr(obj, IDSTR_MAX)

    def _encode(self, obj: str, context: Any, path: Any) -> bytes:
        return encode_idstr(obj)


Idstr = IdstrAdapter(Prefixed(Int8ub, GreedyBytes))
"""u8 length n, then n bytes without a terminator (qemu_put_counted_string)."""


def fixed_struct(schema: Construct) -> struct.Struct:
    """The `struct` format of a schema that has only integers: its fast form, same layout.

    Constants take part: the caller packs them and must compare them after unpacking.
    """
    return struct.Struct(">" + "".join(_format_field(sub).fmtstr[1:] for sub in schema.subcons))


def _format_field(field: Construct) -> Any:
    while isinstance(field, Subconstruct):
        field = field.subcon
    return field


class Codec(Generic[M]):
    """A message and its layout: a schema whose named fields are the message's fields.

    Constants in the schema are written and checked, and are no fields of the message.

    Where there is nothing but integers behind a constant, as at both ends of every section, they
    are read by `struct`; what that does not take is the schema's to read or to refuse.
    """

    def __init__(self, message: type[M], schema: Construct) -> None:
        self.message = message
        self.schema = schema
        self._fields = [
            field.name for field in schema.subcons if field.name and not _is_constant(field)
        ]
        self._fixed = fixed_struct(schema) if _is_constant_and_integers(schema) else None
        self._constant = schema.subcons[0].subcon.value if self._fixed else None

    def encode(self, message: M) -> bytes:
        """The bytes of `message`; ValueError when a value does not fit its field."""
        values = {name: getattr(message, name) for name in self._fields}
        try:
            encoded: bytes = self.schema.build(values)
        except ConstructError as error:
            raise self.misfit(message) from error
        return encoded

    def decode(self, data: bytes | memoryview) -> M:
        """The message in `data`; RemoteProtocolError when it does not follow the schema."""
        if self._fixed is not None and len(data) >= self._fixed.size:
            constant, *values = self._fixed.unpack_from(data)
            if constant == self._constant:
                return self.message(**dict(zip(self._fields, values, strict=True)))
        try:
            parsed = self.schema.parse(data)
        except ConstructError as error:
            reason = str(error).splitlines()[-1]
            raise malformed(f"not as laid out: {reason}", self.message.NAME) from error
        return self.message(**{name: parsed[name] for name in self._fields})

    def misfit(self, message: Message) -> ValueError:
        """The error that names the first value of `message` that does not fit its field."""
        for field in self.schema.subcons:
            form = _format_field(field)
            if isinstance(form, FormatField) and not _is_constant(field):
                value, bound = getattr(message, field.name), (1 << 8 * form.sizeof()) - 1
                if not isinstance(value, int) or not 0 <= value <= bound:
                    return ValueError(
                        f"{message.NAME}: {field.name} is {value!r}; 0 to {bound:#x} fits"
                    )
        return ValueError(f"{message.NAME}: {message!r} can't be encoded")


def _is_constant(field: Construct) -> bool:
    return isinstance(field, Const) or (
        isinstance(field, Subconstruct) and _is_constant(field.subcon)
    )


def _is_constant_and_integers(schema: Construct) -> bool:
    constant, *fields = schema.subcons or (None,)
    return _is_constant(constant) and all(
        isinstance(field, Renamed) and isinstance(field.subcon, FormatField) for field in fields
    )


def item(kind: int, *fields: Construct) -> Construct:
    """The schema of a section-level item: its type byte, then its fields."""
    return Struct("type" / Const(kind, Int8ub), *fields)
