"""The `lowtide` command. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of the `lowtide` script; exits with 0, 2 (bad input), 130 or 143 (interrupted)."""
    signal.signal(signal.SIGTERM, _terminate)
    from lowtide.cli.app import run

    sys.exit(run(sys.argv[1:]))


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Leave by an exception, so that half-written files are removed on the way out."""
    sys.exit(128 + number)
