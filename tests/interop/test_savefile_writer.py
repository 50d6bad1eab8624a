"""Files that SaveFileSink writes, loaded by stock QEMU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from postcopy_proto import messages as m
from postcopy_proto.savefile.writer import SaveFileSink
from postcopy_proto.wire import ForwardDecoder
from tests.interop.guest import assert_same_memory, assert_unbroken
from tests.interop.qemu import Lab

pytestmark = pytest.mark.qemu


def events_of(path: Path) -> list[m.Message]:
    decoder = ForwardDecoder()
    decoder.receive_data(path.read_bytes())
    decoder.receive_data(b"")
    events: list[m.Message] = []
    while not events or not isinstance(events[-1], m.EndOfStream):
        event = decoder.next_event()
        assert isinstance(event, m.Message)
        events.append(event)
    return events


def test_rewritten_in_another_order(lab: Lab, qemu_binary: str) -> None:
    source = lab.start(qemu_binary)
    source.wait_letters(2)
    stock, ours = lab.path("stock"), lab.path("ours")
    source.save(stock)
    events = events_of(stock)
    [block_list] = [e for e in events if isinstance(e, m.RamBlockList)]
    [configuration] = [e for e in events if isinstance(e, m.Configuration)]
    [start] = [e for e in events if isinstance(e, m.SectionStart)]
    [device] = [e for e in events if isinstance(e, m.DeviceState)]
    sink = SaveFileSink(ours, configuration, block_list, section_id=start.section_id)
    random = np.random.default_rng(5)
    for batch in (e for e in events if isinstance(e, m.Pages)):
        order = random.permutation(len(batch))
        sink.place(m.Pages(batch.block, batch.offsets[order], batch.positions[order], batch.data))
    sink.finish(device.data)

    paused = lab.start(qemu_binary, incoming=f"exec:cat {ours}", paused=True)
    paused.wait_migration("completed")
    assert_same_memory(paused.memory(), source.memory())
    running = lab.start(qemu_binary, incoming=f"exec:cat {ours}")
    running.wait_letters(3)
    assert_unbroken(source.serial, running.serial)
