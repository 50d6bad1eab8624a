"""Hypothesis strategies: any message that can be encoded, and streams of them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from postcopy_proto import messages as m
from postcopy_proto.ramblock import ByteRange
from tests.wire.helpers import P

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
blobs = st.binary(max_size=40)

names = st.binary(min_size=1, max_size=255).map(
    lambda raw: raw.replace(b"\0", b"0").decode("utf-8", "surrogateescape")
)
short_names = st.sampled_from(("pc.ram", "b", "/rom@etc/acpi/tables"))

ranges = st.builds(ByteRange, st.integers(0, 1 << 62), st.integers(0, 1 << 62))
advises = st.one_of(
    st.just(m.PostcopyAdvise()), st.builds(m.PostcopyAdvise, u64.filter(bool), st.just(P))
)
configurations = st.builds(
    m.Configuration,
    names,
    st.sampled_from((None, 12)),
    st.none() | st.lists(names, max_size=4).map(tuple),
    st.none() | st.binary(min_size=16, max_size=16),
)

commands = st.one_of(
    st.sampled_from(
        (
            m.OpenReturnPath(), m.PostcopyListen(), m.PostcopyRun(), m.EnableColo(),
            m.PostcopyResume(), m.SwitchoverStart(), m.PostcopyAdvise(),
        )
    ),
    st.builds(m.Ping, u32),
    st.builds(m.RecvBitmap, names),
    st.builds(m.Packaged, blobs),
    st.builds(
        m.PostcopyRamDiscard, names, st.lists(ranges, min_size=1, max_size=20).map(tuple)
    ),
)  # fmt: skip
unknown_commands = st.builds(m.UnknownCommand, st.integers(12, 0xFFFF), blobs)

return_path = st.one_of(
    st.builds(m.Shut, u32),
    st.builds(m.Pong, u32),
    st.builds(m.ReqPagesId, u64, u32, names),
    st.builds(m.ReqPages, u64, u32),
    st.builds(m.ReceivedBitmap, names, st.binary(min_size=1, max_size=20).map(lambda b: b * 8)),
    st.just(m.ResumeAck()),
    st.just(m.SwitchoverAck()),
)  # fmt: skip
unknown_return_path = st.builds(m.UnknownReturnPathMessage, st.integers(8, 0xFFFF), blobs)


@st.composite
def block_lists(draw: st.DrawFn, *, page_sizes: bool) -> m.RamBlockList:
    """A list whose page sizes, if any, are 2 MiB or 1 GiB."""
    sizes = st.sampled_from((None, 1 << 21, 1 << 30)) if page_sizes else st.none()
    entries = draw(
        st.lists(
            st.builds(m.RamBlockEntry, names, st.integers(1, 1 << 20).map(lambda n: n * P), sizes),
            min_size=1,
            max_size=8,
            unique_by=lambda entry: entry.idstr,
        )
    )
    return m.RamBlockList(tuple(entries))


@st.composite
def batches(draw: st.DrawFn, *, named: bool | None = None, pages: int = 1 << 28) -> m.Pages:
    """Any pages in any order; content from a few different pages."""
    kinds = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=4))
    zero = np.repeat([kind for kind, _ in kinds], [count for _, count in kinds])
    seed = draw(st.integers(0, 1 << 30))
    rng = np.random.default_rng(seed)
    offsets = rng.integers(0, pages, len(zero)).astype(np.uint64) * np.uint64(P)
    positions = np.full(len(zero), -1, np.int64)
    positions[~zero] = rng.integers(0, 2 * P, np.count_nonzero(~zero))
    return m.Pages(
        draw(short_names),
        offsets,
        positions,
        memoryview(rng.bytes(3 * P)),
        P,
        draw(st.booleans()) if named is None else named,
    )


encoded_pages = st.one_of(
    st.builds(m.XbzrlePage, short_names, st.integers(0, 99).map(lambda n: n * P), blobs),
    st.builds(m.CompressedPage, short_names, st.integers(0, 99).map(lambda n: n * P), blobs),
)
ram_bodies = st.lists(
    st.one_of(batches(named=True), encoded_pages, st.just(m.MultifdFlush())), max_size=4
)


@st.composite
def forward_streams(draw: st.DrawFn) -> list[m.Message]:
    """A stream that the decoder takes, though no source would say such things."""
    section_id = draw(u32)
    advise = draw(st.sampled_from((None, m.PostcopyAdvise(P | 1 << 21 | 1 << 30, P))))
    blocks = m.RamBlockList(
        tuple(m.RamBlockEntry(name, P << 30) for name in ("pc.ram", "b", "/rom@etc/acpi/tables"))
    )
    bare = commands.filter(lambda c: not isinstance(c, m.PostcopyRamDiscard))
    messages: list[m.Message] = [m.StreamHeader(), m.Configuration("pc")]
    messages += draw(st.lists(bare, max_size=3))
    messages += [advise] if advise else []
    messages += [m.SectionStart(section_id, "ram", 0, 4), blocks]
    messages += [m.RamEos(), m.SectionFooter(section_id)]
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from((m.SectionPart, m.SectionEnd)))
        messages += [kind(section_id), *draw(ram_bodies), m.RamEos(), m.SectionFooter(section_id)]
        messages += draw(st.lists(bare, max_size=2))
    return [*messages, m.Eof()]
