"""What a program is compiled for and run on, as options of commands: its inputs, and those that are
one integer for a whole run, such as a task."""

import argparse

__all__ = ["add_choices_option", "add_input_options", "read_program"]


def add_choices_option(parser) -> None:
    """``--choices task=0,1``: dictionary pairs of a name and its values."""
    parser.add_argument("--choices", action="append", type=_values, default=[],
                        metavar="INPUT=VALUES",
                        help="an integer input that is chosen per run, such as a task, and its "
                        "values (task=0,1); repeatable")


def add_input_options(parser) -> None:
    """A program, its inputs, and ``--choose task=1``: dictionary pairs of a name and its value."""
    parser.add_argument("program", help="program file from `moeware compile`")
    parser.add_argument("inputs", help=".npz or .npy file, arrays [frames, ...]")
    parser.add_argument("--array", help="array of the .npz file, for a model with one input")
    parser.add_argument("--expert-bits", type=int, choices=(8, 4), metavar="BITS",
                        help="8 or 4, of a program compiled with --nested (default: 8)")
    parser.add_argument("--choose", action="append", type=_value, default=[],
                        metavar="INPUT=VALUE",
                        help="value of an input that is chosen per run (task=1), where the inputs' "
                        "file does not hold it; repeatable")


def read_program(arguments):
    """The program of `add_input_options`, with the bits that experts are to have."""
    from moeware.hw.arch.program import Program
    program = Program.load(arguments.program)
    return (program if arguments.expert_bits is None
            else program.with_expert_bits(arguments.expert_bits))


def _values(text: str) -> tuple[str, list[int]]:
    name, equals, values = text.partition("=")
    try:
        if name and equals:
            return name, [int(value) for value in values.split(",")]
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be an input and its values, as task=0,1, not {text!r}")


def _value(text: str) -> tuple[str, int]:
    name, values = _values(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"must be an input and one value, as task=1, not {text!r}")
    return name, values[0]
