"""M3ViT-tiny on simulated gateware: latency, efficiency, and the chain of equality on all layers.

One program for each task and target. The traced program runs on the gateware, the golden device and
PyTorch, and all layers are compared; cycles are those of the program without trace.
"""

import argparse
import dataclasses
from pathlib import Path

from configs import TARGETS, in_flight
from m3vit_model import DATA, EXPERTS_NOTE, export, load
from measure import Model, counter_table, measure
from record import ROOT, record


def main(arguments: argparse.Namespace) -> None:
    for name in arguments.target or TARGETS:
        target = TARGETS[name]
        if arguments.clock_mhz:
            target = dataclasses.replace(target, clock_hz=arguments.clock_mhz * 1e6)
        runs = {}
        for task in arguments.task or (0, 1):
            module, image = load(arguments.data, task)
            path = export(module, image, ROOT / "build" / "m3vit" / f"m3vit_task{task}.onnx")
            model = Model(path, {"image": image})
            for frames in sorted({1, arguments.frames}):
                label = f"task {task}" + (f", {frames} frames" if frames > 1 else "")
                where = target if frames == 1 else in_flight(target)
                runs[label] = measure(model, where, {"image": image}, frames=frames,
                                      compared=not arguments.cycles_only)
        first = next(iter(runs.values()))
        suffix = "" if target.clock_hz == TARGETS[name].clock_hz else f"-{arguments.clock_mhz:g}mhz"
        record(f"m3vit-{name}{suffix}", f"M3ViT-tiny, {name} configuration",
               f"Cycle-accurate simulation of the whole accelerator's RTL; {target.text}; clock "
               f"{target.clock}, {target.clock_hz / 1e6:g} MHz. One real street scene, which also calibrated "
               f"the number grids. {EXPERTS_NOTE} Int8 but for what is said otherwise."
               + (" With frames in flight, memories are larger where they must hold all of them."
                  if arguments.frames > 1 else ""),
               {f"{label}: {figure}": value for label, each in runs.items()
                for figure, value in each.figures().items()},
               tables={"Blocks of the first run: work, least cycles of each resource":
                       first.block_table(),
                       "Engines, share of the cycles": counter_table(runs)},
               config=target.config.to_dict(), dram=dataclasses.asdict(target.dram),
               runs={label: each.to_json() for label, each in runs.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA,
                        help="the .npz file, below the repository's root (default: %(default)s)")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--task", action="append", type=int, choices=(0, 1))
    parser.add_argument("--clock-mhz", type=float, help="instead of the target's")
    parser.add_argument("--frames", type=int, default=1, help="also with so many in flight")
    parser.add_argument("--cycles-only", action="store_true", help="compare outputs, not all layers")
    main(parser.parse_args())
