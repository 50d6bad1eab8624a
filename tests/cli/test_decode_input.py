"""Where `postcopy decode` reads from and writes to: packed files, pipes, terminals, signals."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pty
import signal
import struct
import subprocess
import sys

import pytest
import zstandard

from postcopy_proto import messages as m
from postcopy_proto.cli import output
from postcopy_proto.cli.capture.reading import detect_channel
from postcopy_proto.wire import encode
from tests.cli.decoding import CAPTURES, EXPECTED, POSTCOPY, load, run, summary_of
from tests.savefile.test_libvirt import libvirt_header

PACKERS = [gzip.compress, bz2.compress, lzma.compress, zstandard.compress]


@pytest.mark.parametrize("pack", [bytes, *PACKERS])
def test_packed_files_are_unpacked(pack, tmp_path, capsys):
    code, document, _ = summary_of(pack(load("11.1-immediate-return")), tmp_path, capsys)
    assert (code, document) == (0, EXPECTED["11.1-immediate-return"])


@pytest.mark.parametrize("pack", PACKERS)
def test_damaged_packed_file(pack, tmp_path, capsys):
    packed = bytearray(pack(load("11.1-immediate-forward")))
    packed[len(packed) // 2 : len(packed) // 2 + 64] = bytes(64)
    code, document, errors = summary_of(bytes(packed), tmp_path, capsys)
    assert code == output.EXIT_FAILED
    assert document["channel"] == "forward"
    assert "the compressed file is damaged" in errors or "channel, offset" in errors


def test_libvirt_save_image(tmp_path, capsys):
    code, document, errors = summary_of(
        libvirt_header(3) + lzma.compress(load("11.1-precopy-forward")), tmp_path, capsys
    )
    assert (code, document) == (0, EXPECTED["11.1-precopy-forward"])
    assert errors == "a libvirt save image (xz); QEMU's bytes begin at 0x1000 of the file\n"


def test_mapped_ram_file(tmp_path, capsys):
    """One block of 20 pages, of which 0, 9 and 19 are in the file."""
    capability = m.Configuration("pc-i440fx-11.1", capabilities=("mapped-ram",))
    head = encode(m.StreamHeader()) + encode(capability) + encode(m.SectionStart(2, "ram", 0, 4))
    entry = (20 * 4096 | 4).to_bytes(8, "big") + b"\x06pc.ram" + (20 * 4096).to_bytes(8, "big")
    bitmap_at, pages_at = 0x200, 0x1000
    layout = struct.pack(">IQQQ", 1, 4096, bitmap_at, pages_at)
    data = (head + entry + layout).ljust(bitmap_at, b"\0") + bytes([1, 2, 8, 0, 0, 0, 0, 0])
    data = data.ljust(pages_at, b"\0") + bytes(20 * 4096)
    device = m.DeviceState(bytes.fromhex("0400000005 03 727463 00000000 00000003 01 7e00000005"))
    data += b"".join(map(encode, (m.RamEos(), m.SectionFooter(2), device, m.Eof())))
    code, document, errors = summary_of(data, tmp_path, capsys)
    assert (code, errors) == (0, "")
    assert (document["machine"], document["ended"]) == ("pc-i440fx-11.1", "eof")
    assert document["blocks"]["pc.ram"]["length"] == 20 * 4096
    assert (document["blocks"]["pc.ram"]["pages"]) == 3
    assert (document["blocks"]["pc.ram"]["zero_pages"]) == 17
    assert run(tmp_path / "capture.bin") == 0
    assert "a mapped-ram file" in capsys.readouterr().err


def test_progress_bar_on_a_terminal_only(tmp_path):
    """The bar is drawn on stderr's terminal and leaves stdout alone."""
    master, slave = pty.openpty()
    done = subprocess.run(
        [*POSTCOPY, "--summary", "--json", str(CAPTURES["7.2-immediate-forward"])],
        stdout=subprocess.PIPE,
        stderr=slave,
        check=True,
    )
    os.close(slave)
    drawn = os.read(master, 1 << 16)
    os.close(master)
    assert b"decoding" in drawn
    assert json.loads(done.stdout) == EXPECTED["7.2-immediate-forward"]


def test_standard_input_that_trickles_in():
    data = load("11.1-preempt-return")
    with subprocess.Popen(
        [*POSTCOPY, "--summary", "--json", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        for at in range(0, len(data), 100):
            process.stdin.write(data[at : at + 100])
            process.stdin.flush()
        out, _ = process.communicate()
    assert json.loads(out) == EXPECTED["11.1-preempt-return"]
    assert process.returncode == 0


def test_reader_that_has_seen_enough():
    command = [*POSTCOPY, "--pages", str(CAPTURES["7.2-immediate-forward"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_ctrl_c_while_waiting_for_more():
    with subprocess.Popen(
        [*POSTCOPY, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(load("7.2-immediate-forward")[:200_000])
        process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == output.EXIT_INTERRUPTED
    assert errors == b"postcopy: interrupted\n"


def test_memory_stays_constant(tmp_path):
    """128 MiB of pages from a pipe are counted in less memory than that by far."""
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from postcopy_proto.cli.main import main\n"
        "code = main(['decode', '--summary', '--json', '-'])\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', status)[1], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    pages, at_once = 1 << 15, 1 << 8
    opening = (
        m.StreamHeader(),
        m.Configuration("pc"),
        m.SectionStart(1, "ram", 0, 4),
        m.RamBlockList((m.RamBlockEntry("pc.ram", pages * 4096),)),
        m.RamEos(),
        m.SectionFooter(1),
        m.SectionPart(1),
    )
    closing = b"".join(map(encode, (m.RamEos(), m.SectionFooter(1), m.Eof())))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"".join(map(encode, opening)))
        body = bytes(4096)
        process.stdin.write((8).to_bytes(8, "big") + b"\x06pc.ram" + body)
        for first in range(0, pages, at_once):
            numbers = range(max(first, 1), first + at_once)
            records = ((page << 12 | 0x28).to_bytes(8, "big") + body for page in numbers)
            process.stdin.write(b"".join(records))
        process.stdin.write(closing)
        out, errors = process.communicate()
    assert process.returncode == 0
    assert json.loads(out)["blocks"]["pc.ram"]["pages"] == pages
    assert int(errors) < 96 << 10  # KiB


@pytest.mark.parametrize(
    ("head", "channel"),
    [
        ("", "forward"),
        ("51", "forward"),
        ("08", "forward"),
        ("08000a", "forward"),
        ("0002", "return"),
        ("000200", "return"),
        ("00030014", "return"),
        ("00080000", "forward"),
        ("0000", "preempt"),
        ("000000000016", "preempt"),
        ("0000000000162008", "preempt"),
        ("0000000000000010", "preempt"),
        ("11223344", "forward"),
        ("00020fff", "forward"),
    ],
)
def test_channels_are_told_by_their_first_bytes(head, channel):
    assert detect_channel(bytes.fromhex(head)) == channel


def test_missing_file(capsys):
    assert run("/nonexistent/capture") == output.EXIT_FAILED
    assert capsys.readouterr().err == "postcopy: /nonexistent/capture: No such file or directory\n"
