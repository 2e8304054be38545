"""Run something in a process of its own that is measured, and ended where it takes too much."""

import faulthandler
import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["ENDS", "forked"]

# Of processor. A process that waits for nothing is ended after the seconds of a clock, which are
# many because others may have the processor.
SECONDS, WALL_SECONDS, MEGABYTES = 10, 300, 1024

ENDS = "ends the process"  # what a case that ends it is left with, as it says nothing later

Outcome = tuple[str, str]


def forked(work: Callable[[], Iterator[Outcome]]) -> tuple[str, str, float, float]:
    """(outcome, message, seconds, megabytes) when the last that `work` gave was given.

    seconds : of processor, all threads; megabytes : most resident memory, what this process had
    when it forked included. More than `SECONDS` or `MEGABYTES` are the outcome "failed".
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        faulthandler.disable()  # its end is told by its status, not on the terminal
        with os.fdopen(writing, "w", buffering=1) as file:
            try:
                _limit()
                for outcome, message in work():
                    _say(file, outcome, message)
            except BaseException:  # noqa: BLE001 - whatever comes is a failure
                _say(file, "failed", traceback.format_exc()[-2000:])
        os._exit(0)
    os.close(writing)
    lines, ended = _read(reading)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    outcome, message, seconds, megabytes = json.loads(lines[-1])
    if outcome == "failed" and message == ENDS:
        seconds, megabytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
        message = f"{ENDS} with status {status}"
    if not ended:
        outcome, message = "failed", f"takes more than {WALL_SECONDS} s ({message})"
    elif seconds > SECONDS or megabytes > MEGABYTES:
        outcome, message = "failed", f"takes {seconds:.1f} s, {megabytes:.0f} MB ({message})"
    return outcome, message, seconds, megabytes


def _say(file: TextIO, outcome: str, message: str) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    line = outcome, message[:2000], usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    file.write(json.dumps(line) + "\n")


def _read(reading: int) -> tuple[list[str], bool]:
    """Lines until the pipe closes, and whether it did in time."""
    parts, deadline = [], time.monotonic() + WALL_SECONDS
    while select.select([reading], [], [], max(deadline - time.monotonic(), 0))[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            os.close(reading)
            return b"".join(parts).decode().splitlines(), True
        parts.append(part)
    os.close(reading)
    return b"".join(parts).decode().splitlines(), False


def _limit() -> None:
    """Bounds beyond those that are judged, so that what takes more does not take it from others."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 2, SECONDS + 2))
