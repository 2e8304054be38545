"""Run a program on a board, or on PyTorch where there is none."""

import time

from moeware.cli.input_options import add_input_options

HELP = "run a program on inputs from a file"


def configure(parser) -> None:
    add_input_options(parser)
    parser.add_argument("--frames", type=int, help="run only so many")
    parser.add_argument("-o", "--output", help=".npz file for the outputs")
    parser.add_argument("--device", default="auto",
                        help="auto, board, torch, golden or rtl (default: auto)")
    parser.add_argument("--port", help="serial port of the board")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS",
                        help="longest time for a frame (default: 10)")
    parser.add_argument("--strict", action="store_true", help="refuse the host and PyTorch")
    parser.add_argument("--no-fallback", action="store_true",
                        help="fail where the board is not there or vanishes")


def run(arguments) -> dict:
    import moeware
    from moeware.cli.inputs import mean_counters, read_inputs, write_outputs
    from moeware.cli.progress import frames_bar
    session = moeware.Session(
        arguments.program, arguments.device, strict=arguments.strict, port=arguments.port,
        fallback=not arguments.no_fallback, timeout_s=arguments.timeout,
        expert_bits=arguments.expert_bits)
    feeds = read_inputs(arguments.inputs, session.program, array=arguments.array,
                        frames=arguments.frames, choice=dict(arguments.choose))
    began = time.perf_counter()
    with frames_bar("run") as progress:
        results = session.run(None, feeds, progress=progress)
    seconds = time.perf_counter() - began
    outputs = {argument.name: value for argument, value in zip(session.get_outputs(), results)}
    if arguments.output:
        write_outputs(arguments.output, outputs)
    return {"placement": session.placement, "device": session.device_name,
            "frames": len(results[0]), "seconds": seconds, "output": arguments.output,
            "outputs": {name: list(value.shape) for name, value in outputs.items()},
            "counters": mean_counters(session.last_counters)}


def text(facts: dict) -> str:
    from moeware.cli.tables import counter_table
    lines = [facts["placement"],
             f"{facts['frames']} frames in {facts['seconds']:.3f} s; outputs " + ", ".join(
                 f"{name} {shape}" for name, shape in facts["outputs"].items())
             + (f" in {facts['output']}" if facts["output"] else "")]
    if facts["counters"]:
        lines.append("average frame: " + counter_table(facts["counters"]))
    return "\n".join(lines)
