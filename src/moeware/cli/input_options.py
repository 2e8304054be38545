"""What a program is compiled for and run on, as options of commands: its inputs, those that are one
integer for a whole run, such as a task, and what a file leaves open."""

import argparse

__all__ = ["add_input_options", "add_model_options", "model_options", "read_program"]


def add_model_options(parser) -> None:
    """How an ONNX file is read: ``--choices task=0,1``, ``--axis sequence=128``, ``--fix
    attention_mask=1`` and ``--outputs logits``; see `model_options`."""
    parser.add_argument("--choices", action="append", type=_values, default=[],
                        metavar="INPUT=VALUES",
                        help="an integer input that is chosen per run, such as a task, and its "
                        "values (task=0,1); repeatable")
    parser.add_argument("--axis", action="append", type=_value, default=[], metavar="AXIS=SIZE",
                        help="size of a dynamic axis, by its name in the file (sequence=128) or by "
                        "input and place (ids.1=128); repeatable")
    parser.add_argument("--fix", action="append", type=_constant, default=[],
                        metavar="INPUT=VALUE",
                        help="an input that is the same in every run: a number (attention_mask=1) or "
                        "range for 0, 1, 2, ... (position_ids=range); repeatable")
    parser.add_argument("--outputs", type=lambda names: names.split(","), default=[],
                        metavar="NAME,NAME", help="outputs to compute (default: all)")


def model_options(arguments) -> dict:
    """The options of `add_model_options` as `moeware.compile` takes them."""
    return {"choices": dict(arguments.choices), "axes": dict(arguments.axis),
            "fixed": dict(arguments.fix), "outputs": arguments.outputs}


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
        raise argparse.ArgumentTypeError(f"must be a name and one value, as task=1, not {text!r}")
    return name, values[0]


def _constant(text: str) -> tuple[str, float | str]:
    name, equals, value = text.partition("=")
    try:
        if name and equals:
            return name, value if value == "range" else int(value) if value.isdecimal() else float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be an input and its value, as attention_mask=1 or "
                                     f"position_ids=range, not {text!r}")
