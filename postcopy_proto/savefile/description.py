"""The JSON behind a stream's EOF, and the device sections that it tells apart.

A device section has no length (see wire/device_state.py), but the description that QEMU writes
behind EOF lists every section in stream order with the sizes of its fields: together they say
where each section ends. QEMU: migration/vmstate.c `vmstate_save_state`, `vmsd_desc_field_start`,
`vmsd_desc_field_end`, `vmstate_subsection_save`; migration/savevm.c `vmstate_save_old_style`.

    body of a section  = its fields, then its subsections
    field              = size bytes, array_len times (1 when absent); structures are counted whole
    subsection         = 0x05, u8 n, n bytes of vmsd_name, u32 version, then fields and subsections
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import SectionFull, VmDescription
from postcopy_proto.wire.stream import (
    SECTION_AFTER_NAME,
    SECTION_ID_SIZE,
    SECTION_NAME_AT,
    QemuVm,
)

_SUBSECTION_HEAD = 6  # type, name length, version_id


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """One SECTION_FULL: who it belongs to and where it stands."""

    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    offset: int
    """of its header, in bytes from the start of the device state"""
    length: int
    """bytes, header and footer included"""


def split_device_state(
    state: bytes | memoryview, description: bytes, *, offset: int = 0
) -> list[DeviceSection]:
    """The sections of a device state, by the description that came with it.

    `state` is `DeviceState.data`, `description` is `VmDescription.text`; `offset` is the stream
    offset of the state in bytes, for errors. Every header and footer must agree with the
    description, and the last section must end with the state: RemoteProtocolError otherwise.
    """
    view = memoryview(state)
    sections: list[DeviceSection] = []
    at = 0
    for device in _devices(description):
        section = _section(view, at, device, offset)
        sections.append(section)
        at += section.length
    if at != len(view):
        raise _mismatch(
            f"{len(view) - at} bytes behind the last device section of the description", offset + at
        )
    return sections


def _section(view: memoryview, at: int, device: dict[str, Any], offset: int) -> DeviceSection:
    """The section at `at`, which must be the one that `device` describes."""
    name = _text(device, "name")
    raw = name.encode("utf-8", "surrogateescape")
    name_at = at + SECTION_NAME_AT
    body_at = name_at + 1 + len(raw) + SECTION_AFTER_NAME
    footer_at = body_at + _body_length(device)
    end = footer_at + SECTION_ID_SIZE
    if end > len(view):
        raise _mismatch(
            f"{name!r} should take {end - at} bytes by its description; {len(view) - at} are left",
            offset + at,
        )
    if view[at] != QemuVm.SECTION_FULL:
        raise _mismatch(
            f"byte {view[at]:#04x} where the section of {name!r} should begin", offset + at
        )
    if view[name_at] != len(raw) or view[name_at + 1 : name_at + 1 + len(raw)] != raw:
        raise _mismatch(f"a section that is not {name!r}, as described", offset + at)
    section_id = view[at + 1 : name_at]
    instance_id = int.from_bytes(view[body_at - 8 : body_at - 4], "big")
    if instance_id != _count(device, "instance_id"):
        raise _mismatch(f"instance {instance_id} of {name!r}, not as described", offset + at)
    if view[footer_at] != QemuVm.SECTION_FOOTER or view[footer_at + 1 : end] != section_id:
        raise _mismatch(
            f"no footer behind {name!r} where its description ends it", offset + footer_at
        )
    return DeviceSection(
        section_id=int.from_bytes(section_id, "big"),
        idstr=name,
        instance_id=instance_id,
        version_id=int.from_bytes(view[body_at - 4 : body_at], "big"),
        offset=at,
        length=end - at,
    )


def _devices(description: bytes) -> Iterator[dict[str, Any]]:
    try:
        parsed = json.loads(description)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise _malformed("no JSON object")
    return _objects(parsed, "devices")


def _body_length(device: dict[str, Any]) -> int:
    """Bytes of a section's body."""
    if "fields" not in device and "size" in device:
        return _count(device, "size")
    total = 0
    pending = [device]
    while pending:
        state = pending.pop()
        for field in _objects(state, "fields"):
            total += _count(field, "size") * _count(field, "array_len", 1)
        for subsection in _objects(state, "subsections"):
            name = _text(subsection, "vmsd_name").encode("utf-8", "surrogateescape")
            total += _SUBSECTION_HEAD + len(name)
            pending.append(subsection)
    return total


# ---- JSON that may hold anything


def _objects(parent: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    values = parent.get(key, [])
    if not isinstance(values, list):
        raise _malformed(f"{key!r} is no array")
    for value in values:
        if not isinstance(value, dict):
            raise _malformed(f"{key!r} holds something that is no object")
        yield value


def _text(parent: dict[str, Any], key: str) -> str:
    value = parent.get(key)
    if not isinstance(value, str):
        raise _malformed(f"{key!r} is missing or no string")
    return value


def _count(parent: dict[str, Any], key: str, default: int | None = None) -> int:
    value = parent.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _malformed(f"{key!r} is missing or no count")
    return value


def _malformed(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(reason, channel=Channel.FILE, message=VmDescription.NAME)


def _mismatch(reason: str, offset: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        reason,
        kind=ErrorKind.MISMATCH,
        channel=Channel.FILE,
        offset=offset,
        message=SectionFull.NAME,
    )
