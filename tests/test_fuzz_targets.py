"""The fuzzers' targets hold on their whole first corpus, and notice what they are there for."""

from __future__ import annotations

import pytest

from fuzz import corpus, targets
from postcopy_proto import messages as m
from postcopy_proto.errors import RemoteProtocolError
from postcopy_proto.wire import scatter


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    directory = tmp_path_factory.mktemp("seeds")
    assert set(corpus.write(directory)) == set(targets.TARGETS)
    return directory


@pytest.mark.parametrize("target", targets.TARGETS)
def test_first_corpus(target, seeds):
    inputs = list((seeds / target).iterdir())
    assert len(inputs) >= 60
    for path in inputs:
        targets.TARGETS[target](path.read_bytes())
    targets.TARGETS[target](b"")


@pytest.mark.parametrize("length", [0, 1, 2, 23, 24, 25, 1000])
@pytest.mark.parametrize("seed", [0, 1, 7, 255])
def test_pieces_are_the_whole(length, seed):
    data = bytes(i & 0xFF for i in range(length))
    pieces = list(targets.pieces(data, seed))
    assert b"".join(pieces) == data
    assert all(pieces)
    assert len(pieces) <= targets.PIECES + 16


class Broken:
    """A reader that gets one thing wrong."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.chunks: list[bytes] = []
        self.done = False

    def receive_data(self, data: bytes) -> None:
        self.chunks.append(data)

    def next_event(self) -> m.Message | m.NeedData:
        if self.fault == "raises another error":
            raise IndexError
        if self.fault == "forgets its error":
            self.done, was_done = True, self.done
            if was_done:
                return m.NEED_DATA
            raise RemoteProtocolError("once", channel="forward", offset=0)
        if self.fault == "says nowhere":
            raise RemoteProtocolError("somewhere")
        if self.chunks and self.chunks[-1] == b"" and not self.done:
            self.done = True
            if self.fault == "never ends":
                return m.Eof()
            return m.EndOfStream(len(self.chunks), clean=True)
        return m.NEED_DATA


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("raises another error", IndexError),
        ("forgets its error", AssertionError),
        ("says nowhere", AssertionError),
        ("never ends", AssertionError),
        ("depends on how its input was cut", AssertionError),
    ],
)
def test_faults_are_noticed(fault, error):
    with pytest.raises(error):
        targets.same_either_way(lambda: Broken(fault), b"some bytes", 3)


def test_encoding_that_differs_is_noticed():
    outcome = targets.Outcome([m.Ping(1), m.EndOfStream(9, clean=True)], None)
    targets.check_encoding(outcome, bytes.fromhex("080002000400000001"), page_size=0)
    with pytest.raises(AssertionError):
        targets.check_encoding(outcome, bytes.fromhex("080002000400000002"), page_size=0)


@pytest.mark.parametrize("program", corpus.programs()[3:5])
def test_framing_that_is_believed_unseen_is_noticed(program, monkeypatch):
    targets.push(b"\x40" + program)
    monkeypatch.setattr(scatter._Run, "right", lambda run, whole: whole)
    with pytest.raises(AssertionError):
        targets.push(b"\x40" + program)
