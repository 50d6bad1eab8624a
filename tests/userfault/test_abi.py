"""Numbers and layouts against the kernel's own header, by way of the C compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from postcopy_proto.userfault import abi
from tests.userfault.support import compile_c

HEADER = Path("/usr/include/linux/userfaultfd.h")

# What newer kernels added; an older header lacks them, and then so does the comparison.
NUMBERS = {
    "USERFAULTFD_IOC_NEW": abi.USERFAULTFD_IOC_NEW,
    "UFFD_API": abi.UFFD_API,
    "UFFDIO_API": abi.UFFDIO_API,
    "UFFDIO_REGISTER": abi.UFFDIO_REGISTER,
    "UFFDIO_UNREGISTER": abi.UFFDIO_UNREGISTER,
    "UFFDIO_WAKE": abi.UFFDIO_WAKE,
    "UFFDIO_COPY": abi.UFFDIO_COPY,
    "UFFDIO_ZEROPAGE": abi.UFFDIO_ZEROPAGE,
    "UFFDIO_MOVE": abi.UFFDIO_MOVE,
    "UFFDIO_WRITEPROTECT": abi.UFFDIO_WRITEPROTECT,
    "UFFDIO_CONTINUE": abi.UFFDIO_CONTINUE,
    "UFFDIO_POISON": abi.UFFDIO_POISON,
    "UFFD_USER_MODE_ONLY": abi.USER_MODE_ONLY,
    "UFFDIO_COPY_MODE_DONTWAKE": abi.COPY_MODE_DONTWAKE,
    "UFFDIO_COPY_MODE_WP": abi.COPY_MODE_WP,
    "UFFDIO_ZEROPAGE_MODE_DONTWAKE": abi.ZEROPAGE_MODE_DONTWAKE,
    "UFFDIO_WRITEPROTECT_MODE_WP": abi.WRITEPROTECT_MODE_WP,
    "UFFDIO_WRITEPROTECT_MODE_DONTWAKE": abi.WRITEPROTECT_MODE_DONTWAKE,
    "UFFDIO_CONTINUE_MODE_DONTWAKE": abi.CONTINUE_MODE_DONTWAKE,
    "UFFDIO_CONTINUE_MODE_WP": abi.CONTINUE_MODE_WP,
    "UFFDIO_POISON_MODE_DONTWAKE": abi.POISON_MODE_DONTWAKE,
    "UFFDIO_MOVE_MODE_DONTWAKE": abi.MOVE_MODE_DONTWAKE,
    "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES": abi.MOVE_MODE_ALLOW_SRC_HOLES,
    **{f"UFFD_FEATURE_{feature.name}": int(feature) for feature in abi.Features},
    **{f"UFFDIO_REGISTER_MODE_{mode.name}": int(mode) for mode in abi.RegisterMode},
    **{f"UFFD_EVENT_{event.name}": int(event) for event in abi.Event},
    **{f"UFFD_PAGEFAULT_FLAG_{flag.name}": int(flag) for flag in abi.FaultFlags},
}
IOCTL_BITS = {f"_UFFDIO_{ioctl.name}": int(ioctl) for ioctl in abi.Ioctls}
STRUCTS = {
    "uffd_msg": abi.UFFD_MSG,
    "uffdio_api": abi.UFFDIO_API_STRUCT,
    "uffdio_range": abi.UFFDIO_RANGE_STRUCT,
    "uffdio_register": abi.UFFDIO_REGISTER_STRUCT,
    "uffdio_copy": abi.UFFDIO_COPY_STRUCT,
    "uffdio_zeropage": abi.UFFDIO_ZEROPAGE_STRUCT,
    "uffdio_writeprotect": abi.UFFDIO_WRITEPROTECT_STRUCT,
    "uffdio_continue": abi.UFFDIO_CONTINUE_STRUCT,
}
# Where the members of a page fault message are, and of the resolvers' results.
OFFSETS = {
    ("uffd_msg", "arg.pagefault.flags"): 8,
    ("uffd_msg", "arg.pagefault.address"): 16,
    ("uffd_msg", "arg.pagefault.feat.ptid"): 24,
    ("uffd_msg", "arg.fork.ufd"): 8,
    ("uffd_msg", "arg.remap.to"): 16,
    ("uffd_msg", "arg.remap.len"): 24,
    ("uffd_msg", "arg.remove.end"): 16,
    ("uffdio_api", "ioctls"): 16,
    ("uffdio_register", "ioctls"): 24,
    ("uffdio_copy", "mode"): 24,
    ("uffdio_copy", "copy"): 32,
    ("uffdio_zeropage", "zeropage"): 24,
    ("uffdio_continue", "mapped"): 24,
}


def _program() -> str:
    headers = ("stdio.h", "stddef.h", "sys/ioctl.h", "linux/userfaultfd.h")
    lines = [f"#include <{header}>" for header in headers]
    lines.append("int main(void) {")
    for name in NUMBERS:
        # Events' names have the prefix of a flag too; all are macros or absent.
        lines += [f"#ifdef {name}", f'printf("{name} %llu\\n", (unsigned long long){name});']
        lines.append("#endif")
    for name in IOCTL_BITS:
        lines += [f"#ifdef {name}", f'printf("{name} %llu\\n", 1ULL << {name});', "#endif"]
    for name in STRUCTS:
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
    for name, member in OFFSETS:
        lines.append(f'printf("{name}.{member} %zu\\n", offsetof(struct {name}, {member}));')
    return "\n".join([*lines, "return 0; }"])


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    if not HEADER.exists():
        pytest.skip(f"{HEADER} is not installed")
    program = compile_c(_program(), tmp_path_factory.mktemp("abi"))
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in map(str.split, output.splitlines())}


def test_every_number_is_the_kernels(kernel: dict[str, int]) -> None:
    ours = {**NUMBERS, **IOCTL_BITS}
    known = {name: value for name, value in ours.items() if name in kernel}
    assert known == {name: kernel[name] for name in known}
    # Whatever the header's age, what Linux 5.7 had must have been compared.
    newer = ("POISON", "MOVE", "CONTINUE", "MINOR", "EXACT", "WP_", "IOC_NEW", "USER_MODE")
    assert all(any(part in name for part in newer) for name in set(ours) - set(kernel))


def test_every_structure_is_the_kernels(kernel: dict[str, int]) -> None:
    assert {name: layout.size for name, layout in STRUCTS.items()} == {
        name: kernel[name] for name in STRUCTS
    }
    assert {(name, member): kernel[f"{name}.{member}"] for name, member in OFFSETS} == OFFSETS


def test_numbers_recomputed_from_their_parts() -> None:
    assert abi.ioctl_number(3, 0xAA, 0x03, 40) == 0xC028AA03
    assert abi.ioctl_number(2, 0xAA, 0x01, 16) == 0x8010AA01


def test_packing_of_a_page_fault() -> None:
    raw = abi.UFFD_MSG_PAGEFAULT.pack(0x12, 1, 0x7F0000001000, 4711)
    assert raw[0] == 0x12
    assert int.from_bytes(raw[16:24], "little") == 0x7F0000001000
    assert int.from_bytes(raw[24:28], "little") == 4711
