"""Finding out what a file is, and opening it as a `SavedVm`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from postcopy_proto import messages as m
from postcopy_proto.errors import ErrorKind, RemoteProtocolError
from postcopy_proto.ramblock import TARGET_PAGE_SIZE
from postcopy_proto.savefile.libvirt import decompressed, is_libvirt, read_header
from postcopy_proto.savefile.mapped_ram import MappedRam
from postcopy_proto.savefile.source import Progress, ReadOnlyFile, SavedVm, broken, relocated
from postcopy_proto.savefile.stream import SaveStream
from postcopy_proto.wire import Limits
from postcopy_proto.wire.buffer import NeedMoreError, ReceiveBuffer
from postcopy_proto.wire.configuration import read_configuration
from postcopy_proto.wire.forward import CAPABILITY_MAPPED_RAM
from postcopy_proto.wire.stream import HEADER_SIZE, decode_header

_HEAD = 128 << 10
"""bytes that hold file header and configuration for certain"""

LARGEST_PAGE_BITS = 16


def open_saved_vm(
    path: Path | str,
    *,
    page_sizes: Mapping[str, int] | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> SavedVm:
    """The VM in a save file of QEMU or libvirt.

    `page_sizes`: the host pages of blocks at the destination, in bytes, where they are not base
    pages. `cache`: keep the index of a save stream beside it. OSError when the file can't be
    opened; RemoteProtocolError with the file offset when it is not a whole save file, or has
    what can't be served; ValueError for page sizes of blocks that it does not have.
    """
    file = ReadOnlyFile(path)
    try:
        stream_at = 0
        if is_libvirt(file.read(0, min(16, file.size))):
            image = read_header(file)
            stream_at = image.data_at
            if image.format not in ("raw", "sparse"):
                raw = decompressed(file, image, progress)
                file.close()
                file, stream_at = raw, 0
        configuration, sections_at = _read_configuration(file, stream_at)
        page_size = TARGET_PAGE_SIZE
        if configuration.target_page_bits is not None:
            page_size = 1 << configuration.target_page_bits
        if CAPABILITY_MAPPED_RAM in (configuration.capabilities or ()):
            return MappedRam(file, configuration, page_size, sections_at, page_sizes=page_sizes)
        return SaveStream(
            file,
            configuration,
            page_size,
            stream_at=stream_at,
            page_sizes=page_sizes,
            cache=cache,
            progress=progress,
        )
    except BaseException:
        file.close()
        raise


def _read_configuration(file: ReadOnlyFile, stream_at: int) -> tuple[m.Configuration, int]:
    """The configuration, and the file offset of what follows it."""
    buffer = ReceiveBuffer()
    buffer.feed(file.read(stream_at, min(_HEAD, file.size - stream_at)))
    buffer.feed(b"")
    try:
        decode_header(buffer.peek(HEADER_SIZE))
        buffer.skip(HEADER_SIZE)
        configuration = read_configuration(buffer, Limits())
    except NeedMoreError:
        raise broken(
            "not a save file, or one that ends inside its header",
            file.size,
            kind=ErrorKind.TRUNCATED,
        ) from None
    except RemoteProtocolError as error:
        error.offset = buffer.offset if error.offset is None else error.offset
        raise relocated(error, stream_at) from error
    bits = configuration.target_page_bits
    if bits is not None and not 10 <= bits <= LARGEST_PAGE_BITS:
        raise broken(f"target pages of 2^{bits} bytes", stream_at, kind=ErrorKind.UNSUPPORTED)
    return configuration, stream_at + buffer.offset
