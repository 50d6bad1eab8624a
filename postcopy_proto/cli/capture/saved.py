"""Save files that are no stream from their first byte: mapped-ram files and libvirt's images."""

from __future__ import annotations

from typing import Any

import numpy as np

from postcopy_proto import messages as m
from postcopy_proto.cli.capture.summary import ForwardSummary
from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.ramblock import RAMBlock
from postcopy_proto.savefile import ReadOnlyFile, SavedVm, open_saved_vm
from postcopy_proto.savefile.libvirt import is_libvirt, read_header

_MAGIC_BYTES = 16
_PAGES_AT_ONCE = 1 << 20


def libvirt_stream_at(path: str) -> tuple[int, str] | None:
    """Where QEMU's bytes begin in a libvirt save image, and how they are packed; None for others.

    RemoteProtocolError when the image's header is broken.
    """
    file = ReadOnlyFile(path)
    try:
        if not is_libvirt(file.read(0, min(_MAGIC_BYTES, file.size))):
            return None
        image = read_header(file)
        return image.data_at, image.format
    finally:
        file.close()


def is_mapped_ram(failure: RemoteProtocolError | None) -> bool:
    """Whether a stream was given up because it is a mapped-ram file."""
    return (
        failure is not None
        and failure.kind is ErrorKind.UNSUPPORTED
        and failure.message == m.Configuration.NAME
    )


def summarise_mapped_ram(path: str) -> ForwardSummary:
    """The counts of a mapped-ram file; zero pages are those that it leaves out."""
    saved = open_saved_vm(path, cache=False)
    try:
        blocks = {block.idstr: _counts(saved, block) for block in saved.blocks}
        return ForwardSummary.of_file(saved.configuration.machine, blocks)
    finally:
        saved.close()


def _counts(saved: SavedVm, block: RAMBlock) -> dict[str, Any]:
    total = block.page_count(saved.target_page_size)
    zero = 0
    for first in range(0, total, _PAGES_AT_ONCE):
        pages = np.arange(first, min(first + _PAGES_AT_ONCE, total), dtype=np.intp)
        zero += int(np.count_nonzero(saved.zero_pages(block.idstr, pages)))
    return {
        "length": block.used_length,
        "pages": total - zero,
        "zero_pages": zero,
        "discard_ranges": 0,
        "discarded_bytes": 0,
    }
