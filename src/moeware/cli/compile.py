"""Compile an ONNX model to a program for one configuration of the accelerator."""

import argparse
from pathlib import Path

from moeware.cli.input_options import add_model_options, model_options
from moeware.cli.memory import add_memory_options, find_dram

HELP = "compile an ONNX model to a program"


def configure(parser) -> None:
    parser.add_argument("model", help="ONNX file")
    parser.add_argument("--config", required=True, help="name of a board, or JSON file of a Config")
    parser.add_argument("--calibration", required=True,
                        help=".npz file or folder with real inputs of the model")
    parser.add_argument("-o", "--output", help="program file (default: the model's name, .moe)")
    parser.add_argument("--trace", action="store_true",
                        help="store every layer's result, to compare devices layer by layer")
    parser.add_argument("--frames", type=int, default=1,
                        help="frames that a run works on at once: more of them, each later "
                        "(default: 1)")
    parser.add_argument("--bits", action="append", type=_bits, default=[], metavar="LAYER=BITS",
                        help="bits of a layer's weights, 8, 4 or 2; LAYER is a layer's name, one of "
                        "its experts (Experts_1/expert3), or 'experts' or 'linear' for all such "
                        "layers; repeatable")
    parser.add_argument("--expert-bits", type=float, metavar="AVERAGE",
                        help="average bits of experts' weights, from 2 to 8: each expert gets 8, 4 or "
                        "2, whatever loses least")
    parser.add_argument("--nested", action="store_true",
                        help="experts of 8 bits whose upper 4 are good weights, too: compare, run, "
                        "simulate and profile take --expert-bits 4")
    add_model_options(parser)
    parser.add_argument("--dump", help="folder for each stage's result")
    parser.add_argument("--start", default="load", help="first stage; earlier ones are in --dump")
    parser.add_argument("--stop", default="emit", help="last stage")
    add_memory_options(parser, "the estimate of cycles")


def _bits(text: str) -> tuple[str, int]:
    layer, equals, bits = text.rpartition("=")
    if not (equals and bits.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be LAYER=BITS, not {text!r}")
    return layer, int(bits)


def run(arguments) -> dict:
    import moeware
    from moeware.cli.progress import stages_bar
    with stages_bar("compile") as progress:
        program = moeware.compile(
            arguments.model, arguments.config, arguments.calibration, trace=arguments.trace,
            frames=arguments.frames, bits=dict(arguments.bits),
            expert_bits=arguments.expert_bits, nested=arguments.nested,
            dump=arguments.dump, start=arguments.start, stop=arguments.stop, progress=progress,
            **model_options(arguments))
    if program is None:
        return {"program": None, "stopped": arguments.stop, "dump": arguments.dump}
    output = Path(arguments.output or Path(arguments.model).with_suffix(".moe").name)
    program.save(output)
    return {"program": str(output), "file_bytes": output.stat().st_size,
            "placement": program.placement, "config_digest": f"{program.config.digest:#010x}",
            "image_bytes": len(program.image), "dram_bytes": program.dram_bytes,
            "macs_per_frame": sum(getattr(step, "macs", 0) for step in program.steps_of()),
            "choices": program.choices,
            "estimate": _estimate(program, arguments),
            "upper_estimate": program.upper and _estimate(program.upper, arguments),
            "metadata": program.metadata}


def _estimate(program, arguments) -> dict:
    """Cycles of a frame, with as many tokens for each expert, and what they were counted for."""
    import moeware
    clock_hz = arguments.clock_mhz * 1e6
    timelines = moeware.estimate(program, clock_hz=clock_hz, dram=find_dram(arguments.dram))
    cycles = sum(timeline.cycles for timeline in timelines)
    return {"dram": arguments.dram, "clock_hz": clock_hz, "cycles": cycles,
            "seconds": cycles / clock_hz,
            "steps": [timeline.to_dict() for timeline in timelines]}


def text(facts: dict) -> str:
    if facts["program"] is None:
        return f"stopped after stage {facts['stopped']}; results in {facts['dump']}"
    from moeware.cli.tables import estimate_table, expert_bits_table, kept_lines
    lines = [facts["placement"],
             (f"{facts['program']}: {facts['file_bytes']:,} bytes, for configuration "
             f"{facts['config_digest']}; image {facts['image_bytes']:,} bytes, DRAM "
             f"{facts['dram_bytes']:,} bytes, {facts['macs_per_frame']:,} MACs a frame")]
    lines += sorted(set(facts["metadata"]["plans"]))
    lines += kept_lines(facts["metadata"]["kept"], "kept")
    if facts["metadata"]["expert_bits"]:
        lines.append(expert_bits_table(facts["metadata"]["expert_bits"]))
    lines.append(estimate_table(facts["estimate"]))
    if facts["upper_estimate"]:
        lines.append(f"with --expert-bits 4: {facts['upper_estimate']['cycles']:,} cycles a frame")
    starved = facts["metadata"].get("starved_experts", [])
    if starved:
        lines.append(f"experts that few or no calibration tokens reached: {', '.join(starved)}; their "
                     "grids and narrow weights are for the layer's average token. Calibrate with more "
                     "inputs, or with such as use them")
    return "\n".join(lines)
