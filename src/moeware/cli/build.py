"""Build a bitstream of the accelerator for a board."""

from pathlib import Path

HELP = "build a bitstream for a board"


def configure(parser) -> None:
    parser.add_argument("board", help="name of the board")
    parser.add_argument("--config", help="JSON file of a Config (default: the board's)")
    parser.add_argument("--out", default="build", help="folder for the result (default: build)")
    parser.add_argument("--seed", type=int, default=0, help="seed of place and route")


def run(arguments) -> dict:
    import moeware
    from moeware.boards.build import build
    from moeware.cli.progress import stages_bar
    config = moeware.find_config(arguments.config or arguments.board)
    with stages_bar(f"build {arguments.board}") as progress:
        return build(arguments.board, config, Path(arguments.out), seed=arguments.seed,
                     progress=progress)


def text(facts: dict) -> str:
    from moeware.cli.tables import table
    return table([(name, value) for name, value in facts.items()])
