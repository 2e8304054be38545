"""Build a bitstream of the accelerator for a board."""

import sys
from pathlib import Path

HELP = "build a bitstream for a board"


def configure(parser) -> None:
    parser.add_argument("board", help="name of the board")
    parser.add_argument("--config", help="JSON file of a Config (default: the board's)")
    parser.add_argument("--out", default="build", help="folder for the result (default: build)")
    parser.add_argument("--seed", type=int, default=1, help="first seed of place and route")


def run(arguments) -> dict:
    import moeware
    from moeware.boards.build import build
    board = moeware.find_board(arguments.board)
    config = moeware.find_config(arguments.config or arguments.board)
    return build(board, config, Path(arguments.out), seed=arguments.seed,
                 progress=lambda line: print(line, file=sys.stderr, flush=True))


def text(facts: dict) -> str:
    from moeware.cli.tables import table
    rows = [[name, use["used"], use["available"], f"{use['used'] / use['available']:.0%}"]
            for name, use in facts["utilisation"].items() if use["available"]]
    return (f"{facts['bitstream']}: {facts['clock_hz'] / 1e6:g} MHz on {facts['board']}, "
            f"configuration {facts['digest']}\n{table(rows, right=(1, 2, 3))}")
