"""One function for every message: its bytes, as its family's module lays them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from postcopy_proto import messages
from postcopy_proto.messages import Message
from postcopy_proto.wire import (
    block_list,
    commands,
    configuration,
    pages,
    return_path,
    stream,
)

_ENCODERS: dict[type[Message], Callable[[Any], bytes]] = {
    messages.StreamHeader: stream.encode_header,
    messages.Configuration: configuration.encode_configuration,
    messages.SectionStart: stream.SECTION_START.encode,
    messages.SectionPart: stream.SECTION_PART.encode,
    messages.SectionEnd: stream.SECTION_END.encode,
    messages.SectionFull: stream.SECTION_FULL.encode,
    messages.SectionFooter: stream.FOOTER.encode,
    messages.Eof: stream.EOF.encode,
    messages.VmDescription: stream.VMDESCRIPTION.encode,
    messages.DeviceState: stream.encode_device_state,
    messages.OpenReturnPath: commands.encode_simple,
    messages.Ping: commands.encode_simple,
    messages.PostcopyAdvise: commands.encode_advise,
    messages.PostcopyListen: commands.encode_simple,
    messages.PostcopyRun: commands.encode_simple,
    messages.PostcopyRamDiscard: commands.encode_ram_discard,
    messages.Packaged: commands.encode_packaged,
    messages.EnableColo: commands.encode_simple,
    messages.PostcopyResume: commands.encode_simple,
    messages.RecvBitmap: commands.encode_simple,
    messages.SwitchoverStart: commands.encode_simple,
    messages.UnknownCommand: commands.encode_unknown,
    messages.RamBlockList: block_list.encode_block_list,
    messages.Pages: pages.encode_batch,
    messages.XbzrlePage: pages.encode_xbzrle,
    messages.CompressedPage: pages.encode_compressed,
    messages.MultifdFlush: pages.encode_multifd_flush,
    messages.RamEos: pages.encode_eos,
    messages.Shut: return_path.encode_simple,
    messages.Pong: return_path.encode_simple,
    messages.ReqPagesId: return_path.encode_req_pages_id,
    messages.ReqPages: return_path.encode_req_pages,
    messages.ReceivedBitmap: return_path.encode_recv_bitmap,
    messages.ResumeAck: return_path.encode_resume_ack,
    messages.SwitchoverAck: return_path.encode_simple,
    messages.UnknownReturnPathMessage: return_path.encode_unknown,
}


def encode(message: Message) -> bytes:
    """The bytes of one message, whole: envelope, body, and what follows outside its length.

    ValueError, naming value and bound, for a value that does not fit its field, and for what is
    not on the wire (`EndOfStream`). Footers are messages of their own; names in REQ_PAGES_ID and
    in pages are written as the message says, never left out because a block repeats.
    """
    encoder = _ENCODERS.get(type(message))
    if encoder is None:
        raise ValueError(f"{message!r} is not on the wire")
    return encoder(message)
