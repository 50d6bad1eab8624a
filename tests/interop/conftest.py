from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.qemu import Lab, ReservedHugepages, binaries, version_of

SOAK = int(os.environ.get("POSTCOPY_SOAK", "1"))
"""How often each soak-able test runs."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = [path for path in binaries() if _fits(metafunc.definition, path)]
    if "qemu_pair" in metafunc.fixturenames:
        pairs = [(a, b) for a in found for b in found if _version(a) < _version(b)]
        ids = [f"{version_of(a)}-{version_of(b)}" for a, b in pairs]
        metafunc.parametrize("qemu_pair", pairs, ids=ids)
    if "qemu_binary" in metafunc.fixturenames:
        metafunc.parametrize("qemu_binary", found, ids=[version_of(path) for path in found])
    if "repeat" in metafunc.fixturenames:
        metafunc.parametrize("repeat", range(SOAK))


def _version(binary: str) -> tuple[int, ...]:
    return tuple(map(int, version_of(binary).split(".")))


def _fits(test: pytest.Item, binary: str) -> bool:
    """Whether a test is for QEMUs of that version: between its marker's two, both included."""
    marker = test.get_closest_marker("qemu_versions")
    first, last = marker.args if marker else ((0,), (999,))
    return first <= _version(binary) <= last


@pytest.fixture(scope="session")
def guest_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guests")


@pytest.fixture
def lab(guest_images: Path) -> Iterator[Lab]:
    with Lab(guest_images) as lab:
        yield lab


@pytest.fixture
def hugepages() -> Iterator[None]:
    with ReservedHugepages(128) as reserved:
        if not reserved.available:
            pytest.skip("the kernel has no 128 free 2 MiB pages to give")
        yield
