"""Where the cycles of a run go: by layer and engine, as a trace for Perfetto, as a roofline.

The program runs on simulated gateware, and the folder gets profile.json, trace.json (open it at
https://ui.perfetto.dev) and roofline.png. On a board only its counters can be had.
"""

import json
from pathlib import Path

from moeware.cli.input_options import add_input_options, read_program
from moeware.cli.memory import add_memory_options, find_dram

HELP = "show where the cycles of a run go"


def configure(parser) -> None:
    add_input_options(parser)
    parser.add_argument("--frame", type=int, default=0, help="which frame (default: 0, the first)")
    parser.add_argument("-o", "--output", default=str(Path("build", "profile")),
                        help="folder for the results (default: build/profile)")
    parser.add_argument("--device", default="rtl", choices=["rtl", "board"],
                        help="board: counters only (default: rtl)")
    parser.add_argument("--port", help="serial port of the board")
    add_memory_options(parser, "simulated gateware")


def run(arguments) -> dict:
    from moeware.cli.inputs import read_inputs
    program = read_program(arguments)
    if arguments.frame < 0:
        raise ValueError(f"Frame to profile must be 0 or more, not {arguments.frame}")
    feeds = read_inputs(arguments.inputs, program, array=arguments.array, first=arguments.frame,
                        frames=1, choice=dict(arguments.choose))
    if not all(len(feeds[name]) for name, _, _ in program.inputs):
        raise ValueError(f"Frame to profile must be one of {arguments.inputs}, not "
                         f"{arguments.frame}")
    out = Path(arguments.output)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.device == "board":
        facts = _board(program, feeds, arguments.port)
    else:
        facts = _simulated(program, feeds, out, arguments.dram, arguments.clock_mhz * 1e6)
    facts["profile"] = str(out / "profile.json")
    _write(out / "profile.json", facts)
    return facts


def _board(program, feeds: dict, port: str | None) -> dict:
    import moeware
    session = moeware.Session(program, "board", port=port, fallback=False)
    session.run(None, feeds)
    return {"placement": session.placement, "counters": session.last_counters[0]}


def _simulated(program, feeds: dict, out: Path, dram: str, clock_hz: float) -> dict:
    import moeware
    from moeware.sim.profile_plot import roofline
    from moeware.sim.profile_trace import trace
    timing = find_dram(dram)
    profiles = moeware.profile(program, feeds, dram=timing, clock_hz=clock_hz)
    timelines = [profile.timeline for profile in profiles]
    _write(out / "trace.json", trace(timelines))
    roofline(out / "roofline.png", timelines, timing, clock_hz)
    return {"placement": program.placement, "dram": dram, "clock_hz": clock_hz,
            "trace": str(out / "trace.json"), "roofline": str(out / "roofline.png"),
            "estimated_cycles": [timeline.cycles for timeline in moeware.estimate(
                program, clock_hz=clock_hz, dram=timing, feeds=feeds)],
            "steps": [profile.to_dict() for profile in profiles]}


def _write(path: Path, facts: dict) -> None:
    path.write_text(json.dumps(facts, indent=None if path.stem == "trace" else 2))


def text(facts: dict) -> str:
    from moeware.cli.tables import counter_table, idle_table, layer_table, working_line
    lines = [facts["placement"]]
    if "counters" in facts:
        lines.append(counter_table(facts["counters"]))
    for step, estimated in zip(facts.get("steps", []), facts.get("estimated_cycles", [])):
        lines += [layer_table(step), counter_table(step["counters"]), working_line(step),
                  idle_table(step), f"the estimate without gateware says {estimated:,} cycles"]
    lines += [f"{what}: {facts[what]}" for what in ("profile", "trace", "roofline")
              if what in facts]
    return "\n".join(lines)
