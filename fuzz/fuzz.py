"""One target under atheris: `python fuzz/fuzz.py TARGET [libFuzzer's options] [corpus…]`."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))

# Atheris tells of every module that it instruments: nobody wants to know.
with (
    contextlib.redirect_stderr(io.StringIO()),
    atheris.instrument_imports(include=["postcopy_proto"]),
):
    from fuzz.targets import TARGETS


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py {{{','.join(TARGETS)}}} [libFuzzer's options] [corpus…]")
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
