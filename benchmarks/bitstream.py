"""Utilisation and clock of a board's whole bitstream.

`--recorded` takes the report of the last `moeware build` in place of building again, if it is of the
board's configuration.
"""

import argparse
import json
import sys
from pathlib import Path

from record import ROOT, record

from moeware.boards import BOARDS
from moeware.boards.build import build


def main(name: str, recorded: bool) -> None:
    board = BOARDS[name]
    if recorded:
        report = json.loads((ROOT / "build" / name / "report.json").read_text())
        if report["digest"] != board.config.digest:
            sys.exit(f"Report must be of configuration {board.config.digest}, not "
                     f"{report['digest']}: build again")
    else:
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("board", nargs="?", default="ulx3s-85f", choices=BOARDS)
    parser.add_argument("--recorded", action="store_true")
    arguments = parser.parse_args()
    main(arguments.board, arguments.recorded)
