"""Run a program on simulated devices, count cycles, compare devices layer by layer."""

import time

from moeware.cli.input_options import add_input_options, read_program

HELP = "run a program on the golden device or on simulated gateware; compare devices"
DEVICES = {"RTL": "rtl", "golden": "golden", "PyTorch": "torch"}  # as people know them


def configure(parser) -> None:
    add_input_options(parser)
    parser.add_argument("--frames", type=int, default=1, help="run so many (default: 1)")
    parser.add_argument("--device", action="append", choices=list(DEVICES.values()),
                        help="repeatable (default: rtl; with --compare: all)")
    parser.add_argument("--compare", action="store_true",
                        help="compare all layers that the program stores (compile --trace), and "
                        "name the first value that differs")


def run(arguments) -> dict:
    from moeware.cli.inputs import read_inputs
    from moeware.runtime.device import open_device
    program = read_program(arguments)
    feeds = read_inputs(arguments.inputs, program, array=arguments.array, frames=arguments.frames,
                        choice=dict(arguments.choose))
    wanted = arguments.device or (DEVICES.values() if arguments.compare else ["rtl"])
    devices = {name: open_device(device, program.config) for name, device in DEVICES.items()
               if device in wanted}
    facts: dict = {"ok": True, "placement": program.placement, "comparison": None,
                   "devices": _run_each(program, devices, feeds)}
    if arguments.compare:
        facts["comparison"] = comparison = compare(program, devices, feeds)
        facts["ok"] = comparison["equal"]
    return facts


def compare(program, devices: dict, feeds: dict) -> dict:
    """`moeware.sim.compare.compare` of every device step, JSON-able: equal, values, text."""
    from moeware.runtime.device import open_device
    from moeware.runtime.session import Session
    from moeware.sim import compare as comparison
    recorder = _Recorder(open_device("torch", program.config))
    Session(program, recorder).run(None, feeds)
    found = [comparison.compare(program, step, devices, inputs) for step, inputs in recorder.runs]
    return {"equal": all(each.equal for each in found),
            "values": sum(each.values for each in found),
            "text": "\n".join(map(str, found))}


class _Recorder:
    """A device that notes the integers that each step is run with."""

    def __init__(self, device):
        self.name, self.config, self.counters = device.name, device.config, []
        self.runs: list[tuple] = []
        self._device = device

    def run(self, program, step, inputs, **options):
        self.runs.append((step, inputs))
        return self._device.run(program, step, inputs, **options)


def _run_each(program, devices: dict, feeds: dict) -> dict:
    """Seconds and counters of an average frame, by device."""
    from moeware.cli.inputs import mean_counters
    from moeware.cli.progress import frames_bar
    from moeware.runtime.session import Session
    facts = {}
    for name, device in devices.items():
        session = Session(program, device)
        began = time.perf_counter()
        with frames_bar(f"simulate {name}") as progress:
            results = session.run(None, feeds, progress=progress)
        facts[name] = {"frames": len(results[0]), "seconds": time.perf_counter() - began,
                       "counters": mean_counters(session.last_counters)}
    return facts


def text(facts: dict) -> str:
    from moeware.cli.tables import counter_table
    lines = [facts["placement"]]
    for name, device in facts["devices"].items():
        lines.append(f"{name}: {device['frames']} frames in {device['seconds']:.3f} s")
        if device["counters"]:
            lines.append("average frame: " + counter_table(device["counters"]))
    if facts["comparison"]:
        lines.append(facts["comparison"]["text"])
    return "\n".join(lines)
