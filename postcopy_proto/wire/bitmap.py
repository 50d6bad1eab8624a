"""The received bitmap of recovery: what follows RECV_BITMAP on the return path.

QEMU: migration/ram.c `ramblock_recv_bitmap_send`, `ram_dirty_bitmap_reload`. All integers
big-endian but for the bitmap itself. It stands outside the message's length:

    0    8  size: bytes of the bitmap, a multiple of 8
    8    .  bitmap: page i is bit i mod 8 of byte i div 8; 1 = received
    8+.  8  0x0123456789abcdef, RAMBLOCK_RECV_BITMAP_ENDING
"""

from __future__ import annotations

from construct import Bytes, Const, Int64ub, Struct, Terminated, this

from postcopy_proto.messages import ReceivedBitmap

RAMBLOCK_RECV_BITMAP_ENDING = 0x0123456789ABCDEF

BITMAP_SCHEMA = Struct(
    "size" / Int64ub,
    "bitmap" / Bytes(this.size),
    "ending" / Const(RAMBLOCK_RECV_BITMAP_ENDING, Int64ub),
    Terminated,
)

UNIT = 8
"""The bitmap comes in multiples of so many bytes."""


def encode_bitmap(message: ReceivedBitmap) -> bytes:
    """The tail of one RECV_BITMAP; ValueError when the bitmap is no multiple of 8 bytes."""
    size = len(message.bitmap)
    if size == 0 or size % UNIT:
        raise ValueError(
            f"{message.NAME}: bitmap of {size} bytes; a multiple of {UNIT} above 0 is needed"
        )
    encoded: bytes = BITMAP_SCHEMA.build({"size": size, "bitmap": bytes(message.bitmap)})
    return encoded


def bitmap_size(page_count: int) -> int:
    """Bytes of the bitmap of a block of `page_count` target pages: a bit each, in whole units."""
    return -(-page_count // (8 * UNIT)) * UNIT
