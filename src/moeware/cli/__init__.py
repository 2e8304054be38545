"""The command line: ``moeware check``, ``compile``, ``run`` and so on: one of `COMMANDS`.

Each command is a module with ``HELP`` (a line), ``configure(parser)``, ``run(arguments)``, which
returns JSON-able facts, and ``text(facts)``, which says them to people. Facts with ``"ok": False``
end with exit status 1.
"""

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS = ("check", "compile", "compare", "run", "simulate", "profile", "build", "deploy", "doctor",
            "demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 1 for errors, 2 for wrong usage, 130 if stopped."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="moeware: %(message)s", level=logging.WARNING)
    command = importlib.import_module(f"moeware.cli.{options.command}")
    try:
        facts = command.run(options)
        print(json.dumps(facts, indent=2) if options.json else command.text(facts), flush=True)
        return 0 if facts.get("ok", True) else 1
    except KeyboardInterrupt:
        print("moeware: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 1
    except Exception as error:
        if options.traceback or not _is_expected(error):
            raise
        first, *more = str(error).splitlines() or [type(error).__name__]
        print(f"moeware: error: {first}", *more, sep="\n  ", file=sys.stderr)
        return 1


def _is_expected(error: Exception) -> bool:
    """Whether an error says by itself what is wrong: all but faults of moeware."""
    return (isinstance(error, (ValueError, OSError))
            or isinstance(error, RuntimeError) and type(error).__module__.startswith("moeware."))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moeware", description="ONNX mixture-of-experts transformers on FPGAs.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"moeware.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        module.configure(command)
        command.add_argument("--json", action="store_true", help="print facts for machines")
        command.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        import moeware
        print(f"moeware {moeware.__version__}")
        parser.exit()
