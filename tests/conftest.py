"""What every test of the suite shares: which machines can run what.

POSTCOPY_NO_SKIP names, comma-separated, the markers whose tests must not be skipped: a machine
that should be able to run them then fails instead of passing with less.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from typing import Any

import pytest

NO_SKIP = frozenset(filter(None, os.environ.get("POSTCOPY_NO_SKIP", "").split(",")))

# Behind `&` in a script a shell has SIGINT ignored, and every program that a test starts and then
# interrupts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        markers = {marker.name for marker in item.iter_markers()}
        forced = NO_SKIP & markers
        # Other versions of QEMU than the installed one need not be there.
        if forced and "qemu_versions" not in markers:
            report.outcome = "failed"
            report.longrepr = (
                f"skipped although {', '.join(sorted(forced))} must run here: {report.longrepr}"
            )
    return report
