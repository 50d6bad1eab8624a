"""Every vector of spec/vectors: decoded whole, in pieces, and encoded again."""

from __future__ import annotations

import pytest

from postcopy_proto import messages as m
from postcopy_proto.destination import DestinationConnection
from postcopy_proto.errors import Channel, ErrorKind, RemoteProtocolError
from postcopy_proto.examples.source import ToyVm
from postcopy_proto.source import SourceConnection
from postcopy_proto.wire import encode
from tests import vectors

VECTORS = vectors.load()
SESSIONS = vectors.load_sessions()


def test_there_are_enough_of_them_and_each_has_its_name():
    assert len(VECTORS) >= 150
    assert len({vector.name for vector in VECTORS}) == len(VECTORS)


def test_every_message_and_every_kind_of_a_decoders_error_has_one():
    described = {event["message"] for vector in VECTORS for event in vector.events}
    assert described >= set(vectors._OTHERS) - {"SECTION_FULL"} | set(vectors._RETURN)
    kinds = {vector.error for vector in VECTORS} - {None}
    of_connections = {vector.error for vector in SESSIONS} - {None} - kinds
    assert of_connections == {ErrorKind.TRUNCATED}
    # Those two are about what a peer says of itself, and about time: loops raise them.
    assert kinds | of_connections == set(ErrorKind) - {ErrorKind.REMOTE, ErrorKind.TIMEOUT}


def chunkings(data: bytes) -> dict[str, list[bytes]]:
    """The same bytes, whole and cut up; long ones are not fed byte by byte."""
    step = 1 if len(data) < 20_000 else 997
    return {
        "whole": [data] if data else [],
        "pieces": [data[i : i + step] for i in range(0, len(data), step)],
        "two": [half for half in (data[: len(data) // 2], data[len(data) // 2 :]) if half],
    }


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_decode(vector):
    for chunks in chunkings(vector.data).values():
        check(vector, chunks)


def check(vector, chunks):
    if vector.error is None:
        events, end = vectors.decode(vector, chunks)
        if end is not None:
            assert end.offset == len(vector.data)
            assert end.clean == (vector.ends == "clean")
    else:
        with pytest.raises((vectors.StoppedError, RemoteProtocolError)) as caught:
            vectors.decode(vector, chunks)
        error, events = caught.value, []
        if isinstance(error, vectors.StoppedError):
            error, events = error.error, error.events
        assert (error.kind, error.channel) == (vector.error, vector.channel)
        assert 0 <= error.offset <= len(vector.data)
    assert vectors.single_pages(events) == vectors.expected(vector)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_encode(vector):
    if vector.error is not None or vector.ends == "cut":
        # What was decoded before the stop is the beginning of the bytes.
        encoded = b"".join(encode(vectors.message(vector, event)) for event in vector.events)
        assert vector.data.startswith(encoded)
        return
    encoded = b"".join(encode(vectors.message(vector, event)) for event in vector.events)
    assert encoded == vector.data
    if vector.channel is not Channel.PACKAGE:
        assert vector.ends == "clean"


def destination(vector):
    """A destination, and how its state is called in the vectors."""
    connection = DestinationConnection()
    return connection, lambda: {"state": str(connection.state)}


def source(vector):
    """A source that has switched over and owes everything."""
    sizes = {block["idstr"]: block["used_length"] for block in vector.options["blocks"]}
    connection = SourceConnection(ToyVm(sizes), m.Configuration("toy-1"))
    connection.start()
    for _ in connection.switchover(None, ToyVm.device_state):
        pass
    return connection, lambda: {"shut_status": connection.shut_status}


@pytest.mark.parametrize("vector", SESSIONS, ids=lambda vector: vector.name)
def test_session(vector):
    for chunks in chunkings(vector.data).values():
        make = {"destination": destination, "source": source}[vector.options["role"]]
        connection, outcome = make(vector)
        if vector.error is None:
            drain(connection, chunks)
            expected = {key: vector.options[key] for key in outcome()}
            assert outcome() == expected
            continue
        with pytest.raises(RemoteProtocolError) as caught:
            drain(connection, chunks)
        assert caught.value.kind is vector.error
        assert caught.value.channel == vector.options.get("channel_of_error", vector.channel)
        assert caught.value.state
        with pytest.raises(RemoteProtocolError) as again:
            connection.next_event()
        assert again.value is caught.value


def drain(connection, chunks):
    for chunk in (*chunks, b""):
        connection.receive_data(chunk)
        while not isinstance(event := connection.next_event(), m.NeedData):
            if isinstance(event, m.EndOfStream):
                break
