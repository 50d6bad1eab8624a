"""What a decoder believes a peer at most: every length is checked against these before use."""

from __future__ import annotations

from dataclasses import dataclass

from postcopy_proto.ramblock import IDSTR_MAX

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of what a peer may announce; a larger value is refused as ErrorKind.LIMIT.

    A decoder holds at most one record that has not arrived whole, so these also bound its memory.
    QEMU's own bound is said where it has one.
    """

    idstr: int = IDSTR_MAX
    """bytes of a name; the wire can't count more than 255"""
    blocks: int = 4096
    """RAMBlocks in the block list; QEMU has no bound"""
    block_length: int = 1 << 50
    """bytes of one RAMBlock, and the end of all offsets where no block list is known"""
    capabilities: int = 64
    """names in configuration/capabilities; QEMU validates two"""
    package_bytes: int = 256 * MIB
    """bytes of one package; QEMU believes up to 4 GiB (MAX_VM_CMD_PACKAGED_SIZE)"""
    device_state_bytes: int = 256 * MIB
    """bytes of device sections in the main stream, which have no length of their own"""
    description_bytes: int = 8 * MIB
    """bytes of the JSON behind EOF"""
    return_path_bytes: int = 512
    """bytes of a return path message without its bitmap; QEMU's bound as well"""
    bitmap_bytes: int = 64 * MIB
    """bytes of one received bitmap: 2 TiB of RAM in pages of 4 KiB"""
