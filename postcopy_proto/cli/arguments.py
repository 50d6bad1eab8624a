"""Argument types that several subcommands share."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d+|0x[0-9a-f]+)([KMGT]?)(?:iB|B)?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes, as in `4096`, `0x1000`, `64K`, `256M`, `2G`, `1GiB`: units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 4096, 256M or 2G")
    number, unit = match.groups()
    return int(number, 0) << _UNITS[unit.upper()]


def block_page_size(text: str) -> tuple[str, int]:
    """`BLOCK=SIZE`: the name of a RAMBlock and its host page size in bytes."""
    block, equals, number = text.rpartition("=")
    if not equals or not block:
        raise argparse.ArgumentTypeError(f"{text!r}: expected BLOCK=SIZE, like m0=2M")
    value = size(number)
    if value < 4096 or value & (value - 1):
        raise argparse.ArgumentTypeError(f"{number!r} is no power of two of at least 4096")
    return block, value


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)
