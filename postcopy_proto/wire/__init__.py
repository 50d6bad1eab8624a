"""Bytes <-> messages: one module a message family, and one decoder a channel.

Nothing here knows which message makes sense when: that is `states`' business. Each family's module
opens with its layout and the QEMU functions it mirrors, and holds its construct schema.
"""

from postcopy_proto.wire.encode import encode
from postcopy_proto.wire.forward import ForwardDecoder
from postcopy_proto.wire.limits import Limits
from postcopy_proto.wire.package import parse_package
from postcopy_proto.wire.preempt import PreemptDecoder
from postcopy_proto.wire.return_path import ReturnPathDecoder

__all__ = [
    "ForwardDecoder",
    "Limits",
    "PreemptDecoder",
    "ReturnPathDecoder",
    "encode",
    "parse_package",
]
