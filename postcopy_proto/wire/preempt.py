"""The preempt channel: pages that the destination asked for, and nothing else.

QEMU: migration/postcopy-ram.c `postcopy_preempt_thread`, migration/ram.c `ram_load_postcopy`. The
stream has no header, no sections and no footers: records as in pages.py, of which only ZERO, PAGE
and EOS may occur. QEMU 7.1 and 7.2 close with one EOS; later ones just close the connection.
CONTINUE refers to the page before on this channel.
"""

from __future__ import annotations

from collections.abc import Iterable

from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.messages import EndOfStream, Message, Pages, RamEos
from postcopy_proto.ramblock import TARGET_PAGE_SIZE, RAMBlock
from postcopy_proto.wire.decoder import Decoder
from postcopy_proto.wire.fields import malformed
from postcopy_proto.wire.limits import Limits
from postcopy_proto.wire.pages import CONTINUE, EOS, PAGE, ZERO
from postcopy_proto.wire.ram import RamReader


class PreemptDecoder(Decoder):
    """The preempt channel -> `Pages`, and at most one `RamEos`.

    `blocks` is the main channel's block list; without it any name goes. A stream may end between
    any two records.
    """

    def __init__(
        self,
        *,
        blocks: Iterable[RAMBlock] | None = None,
        target_page_size: int = TARGET_PAGE_SIZE,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(Channel.PREEMPT, limits or Limits())
        known = None if blocks is None else {block.idstr: block for block in blocks}
        self._ram = RamReader(self._buffer, known, target_page_size, self._limits)
        self._allowed = {PAGE, PAGE | CONTINUE, ZERO, ZERO | CONTINUE, EOS}
        self._low = target_page_size - 1
        self._ended = False

    def _read(self) -> Message:
        if self._ended:
            byte = self._buffer.peek(1)[0]
            raise malformed(f"byte {byte:#04x} behind the channel's EOS", RamEos.NAME)
        word = self._ram.peek_word()
        flags = word & self._low
        if flags not in self._allowed:
            raise RemoteProtocolError(
                f"flags {flags:#x}; only ZERO, PAGE and EOS occur on this channel",
                kind=ErrorKind.UNKNOWN,
                message=Pages.NAME,
            )
        message = self._ram.read(word)
        self._ended = isinstance(message, RamEos)
        return message

    def _at_end(self) -> EndOfStream:
        if self._buffer.pending:
            return self._broke_off("a page record")
        return EndOfStream(self._buffer.total, clean=True)
