"""Build a bitstream of the accelerator for a board."""

import sys
from pathlib import Path

HELP = "build a bitstream for a board"


def configure(parser) -> None:
    parser.add_argument("--board", default="ulx3s-85f", help="the board (default: ulx3s-85f)")
    parser.add_argument("--config", help="JSON file of a Config (default: the board's)")
    parser.add_argument("--out", help="folder for the result (default: build/BOARD)")
    parser.add_argument("--clock-mhz", type=float, help="system clock (default: the board's)")
    parser.add_argument("--seed", type=int, help="first seed of place and route (default: the board's)")


def run(arguments) -> dict:
    import moeware
    from moeware.boards.build import build
    board = moeware.find_board(arguments.board)
    config = moeware.find_config(arguments.config or arguments.board)
    out = Path(arguments.out or Path("build", arguments.board))
    clock_hz = arguments.clock_mhz and round(1e6 * arguments.clock_mhz)
    facts = build(board, config, out, clock_hz=clock_hz, seed=arguments.seed,
                  progress=lambda line: print(line, file=sys.stderr, flush=True))
    return facts | {"folder": str(out)}


def text(facts: dict) -> str:
    from moeware.cli.tables import table
    rows = [[name, use["used"], use["available"], f"{use['used'] / use['available']:.0%}"]
            for name, use in facts["utilisation"].items() if use["available"]]
    clocks = ", ".join(f"{mhz} MHz ({name})" for name, mhz in facts["fmax_mhz"].items())
    return (f"{facts['folder']}/{facts['bitstream']}: {facts['clock_hz'] / 1e6:g} MHz on "
            f"{facts['board']}; reached {clocks}\n{table(rows, right=(1, 2, 3))}\n"
            f"report: {facts['folder']}/report.json; {facts['seconds']:.0f} s")
