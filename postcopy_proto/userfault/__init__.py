"""The Linux side: guest memory, the userfaultfd that reports its faults, the backend over both.

`Userfaultfd` is of use by itself, and its names are here; it needs nothing but the standard
library, and importing it imports nothing else. What stands on it is in the modules: `mapping`,
`region`, `backend`, `loop`, `probe`.
"""

from postcopy_proto.errors import UserfaultError
from postcopy_proto.userfault.abi import Event, FaultFlags, Features, Ioctls, RegisterMode
from postcopy_proto.userfault.descriptor import (
    AgainError,
    AlreadyPresentError,
    AnyEvent,
    ForkEvent,
    NoMemoryLeftError,
    NotRegisteredError,
    OwnerGoneError,
    PageFault,
    RemapEvent,
    RemoveEvent,
    ResolveError,
    UnknownEvent,
    UnmapEvent,
    Userfaultfd,
    UserfaultPermissionError,
    available_features,
)

__all__ = [
    "AgainError",
    "AlreadyPresentError",
    "AnyEvent",
    "Event",
    "FaultFlags",
    "Features",
    "ForkEvent",
    "Ioctls",
    "NoMemoryLeftError",
    "NotRegisteredError",
    "OwnerGoneError",
    "PageFault",
    "RegisterMode",
    "RemapEvent",
    "RemoveEvent",
    "ResolveError",
    "UnknownEvent",
    "UnmapEvent",
    "UserfaultError",
    "UserfaultPermissionError",
    "Userfaultfd",
    "available_features",
]
