"""The QEMU postcopy migration protocol: both ends of the wire, on the real kernel.

The public names, in the order of the protocol. They are looked up when they are first asked for:
the sans-I/O core imports anywhere, and who only wants `postcopy_proto.userfault` gets neither
numpy nor bitarray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from postcopy_proto.errors import (
    Channel,
    ErrorKind,
    HostUnsupportedError,
    LocalProtocolError,
    PostcopyError,
    ProtocolError,
    RemoteProtocolError,
    UserfaultError,
)

if TYPE_CHECKING:
    from postcopy_proto.destination import DestinationConnection
    from postcopy_proto.dirty import DirtyBitmap, DiscardEncoder, encode_discards, iter_discards
    from postcopy_proto.messages import (
        NEED_DATA,
        CompressedPage,
        Configuration,
        DeviceState,
        EnableColo,
        EndOfStream,
        Eof,
        Message,
        MultifdFlush,
        NeedData,
        OpenReturnPath,
        Packaged,
        Pages,
        Ping,
        Pong,
        PostcopyAdvise,
        PostcopyListen,
        PostcopyRamDiscard,
        PostcopyResume,
        PostcopyRun,
        RamBlockEntry,
        RamBlockList,
        RamEos,
        ReceivedBitmap,
        RecvBitmap,
        ReqPages,
        ReqPagesId,
        ResumeAck,
        SectionEnd,
        SectionFooter,
        SectionFull,
        SectionPart,
        SectionStart,
        Shut,
        StreamHeader,
        SwitchoverAck,
        SwitchoverStart,
        UnknownCommand,
        UnknownReturnPathMessage,
        VmDescription,
        XbzrlePage,
    )
    from postcopy_proto.ramblock import ByteRange, PageSink, PageStore, RAMBlock, SinglePageStore
    from postcopy_proto.source import BackgroundOrder, PageBatch, SourceConnection
    from postcopy_proto.states import ForwardState, ReturnPathState
    from postcopy_proto.userfault.backend import Backend
    from postcopy_proto.userfault.descriptor import Userfaultfd
    from postcopy_proto.userfault.probe import probe
    from postcopy_proto.userfault.region import Region
    from postcopy_proto.wire import (
        ForwardDecoder,
        Limits,
        PreemptDecoder,
        ReturnPathDecoder,
        parse_package,
    )

    # Not by way of the package, where type checkers take it for the module of that name.
    from postcopy_proto.wire.encode import encode

_NAMES = {
    "destination": ("DestinationConnection",),
    "dirty": ("DirtyBitmap", "DiscardEncoder", "encode_discards", "iter_discards"),
    "ramblock": ("ByteRange", "PageSink", "PageStore", "RAMBlock", "SinglePageStore"),
    "source": ("BackgroundOrder", "PageBatch", "SourceConnection"),
    "states": ("ForwardState", "ReturnPathState"),
    "wire": (
        "ForwardDecoder",
        "Limits",
        "PreemptDecoder",
        "ReturnPathDecoder",
        "encode",
        "parse_package",
    ),
    "userfault.backend": ("Backend",),
    "userfault.descriptor": ("Userfaultfd",),
    "userfault.probe": ("probe",),
    "userfault.region": ("Region",),
}
"""of every module but `messages`, which has all the rest, what is looked up in it"""
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:  # or a name that does not exist would pass for one of any type

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'messages')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "NEED_DATA",
    "Backend",
    "BackgroundOrder",
    "ByteRange",
    "Channel",
    "CompressedPage",
    "Configuration",
    "DestinationConnection",
    "DeviceState",
    "DirtyBitmap",
    "DiscardEncoder",
    "EnableColo",
    "EndOfStream",
    "Eof",
    "ErrorKind",
    "ForwardDecoder",
    "ForwardState",
    "HostUnsupportedError",
    "Limits",
    "LocalProtocolError",
    "Message",
    "MultifdFlush",
    "NeedData",
    "OpenReturnPath",
    "Packaged",
    "PageBatch",
    "PageSink",
    "PageStore",
    "Pages",
    "Ping",
    "Pong",
    "PostcopyAdvise",
    "PostcopyError",
    "PostcopyListen",
    "PostcopyRamDiscard",
    "PostcopyResume",
    "PostcopyRun",
    "PreemptDecoder",
    "ProtocolError",
    "RAMBlock",
    "RamBlockEntry",
    "RamBlockList",
    "RamEos",
    "ReceivedBitmap",
    "RecvBitmap",
    "Region",
    "RemoteProtocolError",
    "ReqPages",
    "ReqPagesId",
    "ResumeAck",
    "ReturnPathDecoder",
    "ReturnPathState",
    "SectionEnd",
    "SectionFooter",
    "SectionFull",
    "SectionPart",
    "SectionStart",
    "Shut",
    "SinglePageStore",
    "SourceConnection",
    "StreamHeader",
    "SwitchoverAck",
    "SwitchoverStart",
    "UnknownCommand",
    "UnknownReturnPathMessage",
    "UserfaultError",
    "Userfaultfd",
    "VmDescription",
    "XbzrlePage",
    "encode",
    "encode_discards",
    "iter_discards",
    "parse_package",
    "probe",
]
