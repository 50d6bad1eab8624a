"""Errors can be copied and sent to other processes, with all that they say."""

from __future__ import annotations

import copy
import errno
import pickle
from collections.abc import Callable

import pytest

from postcopy_proto import errors
from postcopy_proto.errors import (
    Channel,
    ErrorKind,
    HostUnsupportedError,
    PostcopyError,
    ProtocolError,
    UserfaultError,
)
from postcopy_proto.userfault import ResolveError, descriptor


def classes() -> list[type[PostcopyError]]:
    """Every error of the two modules."""
    found = [*vars(errors).values(), *vars(descriptor).values()]
    kinds = {kind for kind in found if isinstance(kind, type) and issubclass(kind, PostcopyError)}
    return sorted(kinds, key=lambda kind: kind.__name__)


def instance(kind: type[PostcopyError]) -> PostcopyError:
    """One with every field set."""
    if issubclass(kind, ProtocolError):
        return kind(
            "bad",
            kind=ErrorKind.RANGE,
            channel=Channel.RETURN,
            offset=7,
            state="LISTEN",
            message="PAGE",
        )
    if issubclass(kind, HostUnsupportedError):
        return kind(["no userfaultfd", "no memory"])
    if issubclass(kind, UserfaultError):
        error = kind("UFFDIO_COPY", errno.ENOENT, "No such file", "at 0x1000", "map it")
        if isinstance(error, ResolveError):
            error.done = 8192
        return error
    return kind("plain")


COPIES: dict[str, Callable[[PostcopyError], PostcopyError]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", classes())
def test_a_copy_says_the_same(kind: type[PostcopyError], way: str) -> None:
    error = instance(kind)
    error.add_note("while migrating")
    other = COPIES[way](error)
    assert type(other) is kind
    assert str(other) == str(error)
    assert other.args == error.args
    assert vars(other) == vars(error)
    if isinstance(error, OSError):
        assert isinstance(other, OSError)
        assert (other.errno, other.strerror) == (errno.ENOENT, "No such file")


def test_every_class_is_looked_at() -> None:
    assert {"UserfaultPermissionError", "NoMemoryLeftError", "RemoteProtocolError"} <= {
        kind.__name__ for kind in classes()
    }
