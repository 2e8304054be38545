"""Load a bitstream into a board."""

from pathlib import Path

HELP = "load a bitstream into a board"


def configure(parser) -> None:
    parser.add_argument("--board", default="ulx3s-85f", help="the board (default: ulx3s-85f)")
    parser.add_argument("--bitstream", help="file from `moeware build` (default: "
                        "build/BOARD/BOARD.bit)")


def run(arguments) -> dict:
    import moeware
    from moeware.boards.deploy import deploy
    board = moeware.find_board(arguments.board)
    bitstream = Path(arguments.bitstream or Path("build", board.name, f"{board.name}.bit"))
    deploy(bitstream, board)
    return {"board": board.name, "bitstream": str(bitstream)}


def text(facts: dict) -> str:
    return f"{facts['bitstream']} runs on {facts['board']}"
