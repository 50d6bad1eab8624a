"""libvirt's save images: `virsh save`, `virsh managedsave`.

libvirt: src/qemu/qemu_saveimage.h. A header in the byte order of the host that wrote it, the
domain's XML, then what QEMU wrote, perhaps compressed:

    0    16  "LibvirtQemudSave"; "LibvirtQemudPart" while it is being written
    16   4   version, 1 or 2
    20   4   data_len: bytes of XML, cookie and padding
    24   4   was_running
    28   4   format: 0 raw, 1 gzip, 2 bzip2, 3 xz, 4 lzop, 5 zstd, 6 sparse
    32   4   cookie_offset in the data, 0 without one
    36   56  unused
    92   .   XML, NUL; cookie, NUL; padding

Sparse images (libvirt 11.2) hold a mapped-ram file.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import shlex
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from postcopy_proto.errors import ErrorKind
from postcopy_proto.savefile.source import Progress, ReadOnlyFile, broken

try:
    import zstandard
except ImportError:  # an extra
    zstandard = None  # type: ignore[assignment]

_DAMAGED: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
if zstandard is not None:
    _DAMAGED += (zstandard.ZstdError,)

MAGIC = b"LibvirtQemudSave"
PARTIAL_MAGIC = b"LibvirtQemudPart"
FORMATS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
HEADER_SIZE = 92
DATA_LIMIT = 64 << 20
"""bytes of XML and cookie that are believed"""

CACHE_SUFFIX = ".postcopy-raw"
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class LibvirtImage:
    """What libvirt's header says."""

    format: str
    was_running: bool
    xml: str
    """the domain's definition"""
    data_at: int
    """file offset of what QEMU wrote"""


def is_libvirt(head: bytes) -> bool:
    """Whether a file that begins like this is one of libvirt's."""
    return head.startswith((MAGIC, PARTIAL_MAGIC))


def read_header(file: ReadOnlyFile) -> LibvirtImage:
    """The header; RemoteProtocolError when it is not one."""
    header = file.read(0, HEADER_SIZE)
    if header.startswith(PARTIAL_MAGIC):
        raise broken("libvirt has not finished writing this save image", 0)
    order = "<" if struct.unpack_from("<I", header, 16)[0] <= 0xFFFF else ">"
    version, length, was_running, number, cookie_at = struct.unpack_from(f"{order}5I", header, 16)
    if version not in (1, 2):
        raise broken(
            f"libvirt save image of version {version}; 1 and 2 are known",
            16,
            kind=ErrorKind.UNSUPPORTED,
        )
    if number >= len(FORMATS):
        raise broken(f"format {number} of libvirt", 28, kind=ErrorKind.UNSUPPORTED)
    if length > min(DATA_LIMIT, file.size - HEADER_SIZE):
        raise broken(f"{length} bytes of XML in a file of {file.size}", 20, kind=ErrorKind.RANGE)
    data = file.read(HEADER_SIZE, length)
    xml = data[: cookie_at or None].split(b"\0", 1)[0]
    return LibvirtImage(
        FORMATS[number], bool(was_running), xml.decode(errors="replace"), HEADER_SIZE + length
    )


def decompressed(
    file: ReadOnlyFile, image: LibvirtImage, progress: Progress | None = None
) -> ReadOnlyFile:
    """A file with what QEMU wrote, for an image in one of the compressed formats.

    It is kept beside the image as FILE.DIGEST.postcopy-raw, to be used again and to be deleted at
    any time. RemoteProtocolError when the data is damaged, or when the format can't be read here:
    then it says which command can. OSError when there is no room for it.
    """
    path = file.path.with_name(f"{file.path.name}.{file.fingerprint()}{CACHE_SUFFIX}")
    with contextlib.suppress(FileNotFoundError):
        found = ReadOnlyFile(path)
        # It got the image's time when it was whole: another one was made from another image.
        if found.mtime_ns == file.mtime_ns:
            return found
        found.close()
    descriptor, partial = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with open(descriptor, "wb") as target:
            _decompress(file, image, target, progress or (lambda *_: None))
            os.fsync(target.fileno())
        os.utime(partial, ns=(file.mtime_ns, file.mtime_ns))
        Path(partial).rename(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return ReadOnlyFile(path)


def _decompress(
    file: ReadOnlyFile, image: LibvirtImage, target: IO[bytes], progress: Progress
) -> None:
    with open(file.path, "rb") as compressed:
        compressed.seek(image.data_at)
        try:
            with _reader(file, image, compressed) as source:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    progress("decompressing", compressed.tell(), file.size)
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk, not of the data
            raise broken(
                f"{image.format} data that can't be decompressed: {error}", image.data_at
            ) from error


def _reader(file: ReadOnlyFile, image: LibvirtImage, compressed: IO[bytes]) -> IO[bytes]:
    """The decompressed data of an image, as a file."""
    match image.format:
        case "gzip":
            return cast(IO[bytes], gzip.GzipFile(fileobj=compressed))
        case "bzip2":
            return cast(IO[bytes], bz2.BZ2File(compressed))
        case "xz":
            return cast(IO[bytes], lzma.LZMAFile(compressed))
        case "zstd" if zstandard is not None:
            return cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(compressed))
    quoted, raw = shlex.quote(str(file.path)), shlex.quote(f"{file.path}.raw")
    raise broken(
        f"compressed with {image.format}, which can't be read here; decompress it first: "
        f"tail -c +{image.data_at + 1} {quoted} | {image.format} -dc > {raw}",
        image.data_at,
        kind=ErrorKind.UNSUPPORTED,
    )
