"""What is dirty, and how a destination is told to forget it.

`DirtyBitmap` holds one bit a target page. `DiscardEncoder` takes its runs one by one, as QEMU
does; `iter_discards` and `encode_discards` take the whole bitmap at once; `plan_discards` takes a
whole VM.

    bitmap.py    DirtyBitmap
    words.py     a bitmap as 64-bit words, counted from the block's first page; host pages widened
    edges.py     the places where runs begin and end, many at a time
    discards.py  runs to commands
    plan.py      the discard phase of a whole VM
"""

from postcopy_proto.dirty.bitmap import DirtyBitmap
from postcopy_proto.dirty.discards import DiscardEncoder, encode_discards, iter_discards
from postcopy_proto.dirty.plan import DiscardPlan, plan_discards

__all__ = [
    "DirtyBitmap",
    "DiscardEncoder",
    "DiscardPlan",
    "encode_discards",
    "iter_discards",
    "plan_discards",
]
