"""Saved VMs: page stores over what QEMU and libvirt wrote, and the writer of such a file.

`open_saved_vm` finds out what a file is:

    QEMU's save stream       stream.py, with its index in index.py and pages.py
    QEMU's mapped-ram file   mapped_ram.py
    libvirt's save image     libvirt.py: one of the above behind a header, perhaps compressed

`FlatRam` serves raw memory without a VM around it; `SaveFileSink` writes what a destination
receives as a save stream. A save file is opened for reading only, and never changed.
"""

from postcopy_proto.savefile.flat import FlatRam
from postcopy_proto.savefile.libvirt import LibvirtImage
from postcopy_proto.savefile.mapped_ram import MappedRam
from postcopy_proto.savefile.opening import open_saved_vm
from postcopy_proto.savefile.source import Progress, ReadOnlyFile, SavedVm
from postcopy_proto.savefile.stream import SaveStream
from postcopy_proto.savefile.writer import SaveFileSink

__all__ = [
    "FlatRam",
    "LibvirtImage",
    "MappedRam",
    "Progress",
    "ReadOnlyFile",
    "SaveFileSink",
    "SaveStream",
    "SavedVm",
    "open_saved_vm",
]
