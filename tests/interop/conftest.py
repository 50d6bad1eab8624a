from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.qemu import Lab, ReservedHugepages, binaries, version_of

SOAK = int(os.environ.get("POSTCOPY_SOAK", "1"))
"""How often each soak-able test runs."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "qemu_binary" in metafunc.fixturenames:
        found = binaries()
        metafunc.parametrize("qemu_binary", found, ids=[version_of(path) for path in found])
    if "repeat" in metafunc.fixturenames:
        metafunc.parametrize("repeat", range(SOAK))


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
