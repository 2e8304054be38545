"""Utilisation and clock of a board's whole bitstream: `python benchmarks/bitstream.py ulx3s-85f`."""

import sys
from pathlib import Path

from record import ROOT, record

from moeware.boards import BOARDS
from moeware.boards.build import build


def main(name: str) -> None:
    board = BOARDS[name]
    report = build(board, board.config, ROOT / "build" / name, progress=print)
    clocks = {f"clock `{clock}` reached, MHz": mhz for clock, mhz in report["fmax_mhz"].items()}
    used = [[resource, count["used"], count["available"], f"{count['used'] / count['available']:.0%}"]
            for resource, count in sorted(report["utilisation"].items())]
    record(f"bitstream-{name}", f"Bitstream for {name}",
           "Whole top: accelerator, SDRAM controller, host link, clocks; placed and routed by "
           "nextpnr. Not run on a board.",
           {"clock asked for, MHz": report["clock_hz"] / 1e6, "met": report["met"], **clocks,
            "multiplications per cycle, linear unit": board.config.linear_macs,
            "multiplications per cycle, attention unit": board.config.attention_macs,
            "bitstream, bytes": (Path(ROOT, "build", name) / report["bitstream"]).stat().st_size,
            "seconds to build": report["seconds"]},
           tables={"Resources": [["resource", "used", "available", "share"], *used]},
           config=report["config"], tools=report["tools"], seed=report["seed"])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "ulx3s-85f")
