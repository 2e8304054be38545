"""Load a bitstream into a board."""

from pathlib import Path

HELP = "load a bitstream into a board"


def configure(parser) -> None:
    parser.add_argument("bitstream", help="bitstream file from `moeware build`")
    parser.add_argument("board", help="name of the board")


def run(arguments) -> dict:
    import moeware
    from moeware.boards.deploy import deploy
    deploy(Path(arguments.bitstream), moeware.find_board(arguments.board))
    return {"board": arguments.board, "bitstream": arguments.bitstream}


def text(facts: dict) -> str:
    return f"{facts['bitstream']} runs on {facts['board']}"
