"""Telling a capture event by event: what `postcopy decode` prints when it isn't asked to count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from postcopy_proto import messages as m
from postcopy_proto.cli import output
from postcopy_proto.cli.capture.describe import json_fields, meaning, plural, text_fields
from postcopy_proto.savefile.description import split_device_state
from postcopy_proto.wire import encode, parse_package

_ENVELOPE_AND_LENGTH = 9  # bytes of PACKAGED before its content
_ZERO_RECORD = 9
_WORD = 8


@dataclass(slots=True)
class PageRun:
    """Consecutive records of pages of one kind that follow each other in their block."""

    offset: int
    """of the first record in the stream"""
    block: str
    start: int
    """byte offset in the block"""
    count: int
    """target pages"""
    page_size: int
    zero: bool

    @property
    def end(self) -> int:
        """The first byte behind the run in the block."""
        return self.start + self.count * self.page_size

    def continues(self, other: PageRun) -> bool:
        """Whether `other` follows this run."""
        return (other.block, other.zero, other.start) == (self.block, self.zero, self.end)


class Printer(Protocol):
    """Where a listing's lines go."""

    def message(self, offset: int, message: m.Message, *, inside: bool = False) -> None:
        """One message; `inside` says that it stands in a package."""

    def pages(self, run: PageRun) -> None:
        """A run of pages, or one page."""

    def section(self, offset: int, fields: dict[str, Any]) -> None:
        """A device section that the stream's description tells apart."""


class Listing:
    """Prints events as they come; runs of pages as one line, or each page by itself."""

    def __init__(self, printer: Printer, *, each_page: bool) -> None:
        self._printer = printer
        self._each_page = each_page
        self._run: PageRun | None = None
        self._device_state: tuple[int, m.DeviceState] | None = None
        self._behind_devices: list[tuple[int, m.Message]] = []
        self._requested: str | None = None

    def add(self, offset: int, message: m.Message) -> None:
        """Print one event."""
        if isinstance(message, m.Pages):
            self._add_pages(offset, message)
            return
        self._end_run()
        if isinstance(message, m.DeviceState):
            self._device_state = offset, message  # until its description has come
        elif self._device_state is not None and isinstance(message, m.Eof):
            self._behind_devices.append((offset, message))
        elif self._device_state is not None:
            description = message.text if isinstance(message, m.VmDescription) else None
            self._print_device_state(description)
            self._print(offset, message)
        else:
            self._print(offset, message)

    def finish(self) -> None:
        """Print what was held back."""
        self._end_run()
        self._print_device_state(None)

    def _print(self, offset: int, message: m.Message) -> None:
        self._printer.message(offset, message)
        if isinstance(message, m.Packaged):
            at = offset + _ENVELOPE_AND_LENGTH
            for item in parse_package(message.payload):
                self._printer.message(at, item, inside=True)
                at += len(encode(item))

    # ---- pages

    def _add_pages(self, offset: int, pages: m.Pages) -> None:
        for run in page_runs(offset, pages, each_page=self._each_page):
            if self._each_page:
                self._printer.pages(run)
            elif self._run is not None and self._run.continues(run):
                self._run.count += run.count
            else:
                self._end_run()
                self._run = run

    def _end_run(self) -> None:
        if self._run is not None:
            self._printer.pages(self._run)
            self._run = None

    # ---- device state

    def _print_device_state(self, description: bytes | None) -> None:
        if self._device_state is None:
            return
        (offset, state), self._device_state = self._device_state, None
        self._printer.message(offset, state)
        try:
            if description is not None:
                self._print_sections(offset, state.data, description)
        finally:
            for event in self._behind_devices:
                self._print(*event)
            self._behind_devices = []

    def _print_sections(self, offset: int, state: bytes, description: bytes) -> None:
        for section in split_device_state(state, description, offset=offset):
            fields = {
                "idstr": section.idstr,
                "instance_id": section.instance_id,
                "version_id": section.version_id,
                "section_id": section.section_id,
                "length": section.length,
            }
            self._printer.section(offset + section.offset, fields)


class TextPrinter:
    """A line an event: offset, name, fields, and what it means."""

    def message(self, offset: int, message: m.Message, *, inside: bool = False) -> None:
        """Print a message; what stands in a package is indented."""
        if isinstance(message, m.EndOfStream):
            if not message.clean:
                self._line(offset, "(cut off)", message.detail)
            return
        name = f"  {message.NAME}" if inside else message.NAME
        self._line(offset, name, text_fields(message), meaning(message))

    def pages(self, run: PageRun) -> None:
        """Print a run of pages."""
        count = "" if run.count == 1 else f", {plural(run.count, 'page')}"
        name = "ZERO" if run.zero else "PAGE"
        self._line(run.offset, name, f"{run.block} [{run.start:#x}, {run.end:#x}){count}")

    def section(self, offset: int, fields: dict[str, Any]) -> None:
        """Print a device section."""
        text = (
            f"{fields['idstr']} {fields['instance_id']}, version {fields['version_id']}, "
            f"{plural(fields['length'], 'byte')}"
        )
        self._line(offset, "  SECTION_FULL", text)

    def _line(self, offset: int, name: str, text: str, comment: str = "") -> None:
        line = f"{offset:#012x}  {name:<22}  {text}"
        output.print_line(f"{line}  # {comment}" if comment else line.rstrip())


class JsonPrinter:
    """A JSON object a line."""

    def message(self, offset: int, message: m.Message, *, inside: bool = False) -> None:
        """Print a message; `in` names the one that it stands in."""
        where = {"in": m.Packaged.NAME} if inside else {}
        document = {"offset": offset, "name": message.NAME, **where}
        output.print_json_line(document | _own(json_fields(message)))

    def pages(self, run: PageRun) -> None:
        """Print a run of pages."""
        output.print_json_line(
            {
                "offset": run.offset,
                "name": "ZERO" if run.zero else "PAGE",
                "block": run.block,
                "start": run.start,
                "length": run.end - run.start,
                "pages": run.count,
            }
        )

    def section(self, offset: int, fields: dict[str, Any]) -> None:
        """Print a device section."""
        where = {"offset": offset, "name": m.SectionFull.NAME, "in": m.DeviceState.NAME}
        output.print_json_line(where | fields)


def _own(fields: dict[str, Any]) -> dict[str, Any]:
    """A message's own fields; an offset in a block is called `start`, as it is for pages."""
    return {"start" if key == "offset" else key: value for key, value in fields.items()}


def page_runs(offset: int, pages: m.Pages, *, each_page: bool) -> Iterator[PageRun]:
    """The runs of one batch whose first record stands at `offset` in the stream."""
    zero = pages.zero
    starts = offset + record_ends(pages)[:-1]
    offsets = pages.offsets.astype(np.int64)
    breaks = np.ones(len(pages), np.bool_)
    if not each_page:
        breaks[1:] = (zero[1:] != zero[:-1]) | (np.diff(offsets) != pages.page_size)
    firsts = np.flatnonzero(breaks)
    counts = np.diff(firsts, append=len(pages))
    for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
        yield PageRun(
            offset=int(starts[first]),
            block=pages.block,
            start=int(offsets[first]),
            count=count,
            page_size=pages.page_size,
            zero=bool(zero[first]),
        )


def record_ends(pages: m.Pages) -> NDArray[np.int64]:
    """Where the records of a batch end, in bytes from its first one; shape (n + 1,), from 0."""
    ends = np.zeros(len(pages) + 1, np.int64)
    sizes = np.where(pages.zero, _ZERO_RECORD, _WORD + pages.page_size)
    np.cumsum(sizes, out=ends[1:])
    ends[1:] += len(pages.data) - ends[-1]  # the name of the first record
    return ends
