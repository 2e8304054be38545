"""The bundled model: accuracy, routing, the chain of equality, and cycles on the simulated board."""

import argparse
import statistics

import numpy as np
from record import ROOT, record

import moeware
from moeware.cli.demo import accuracy, expert_agreement
from moeware.cli.simulate import compare
from moeware.hw.arch.isa import Engine
from moeware.hw.arch.registers import ENGINE_COUNTERS
from moeware.runtime.board_device import BoardDevice
from moeware.runtime.device import open_device
from moeware.runtime.serial_link import SerialLink
from moeware.runtime.session import Session
from moeware.sim.board_device import SimulatedBoard
from moeware.sim.rtl import RtlDevice

FOLDER = ROOT / "examples" / "digits"
MODEL, SAMPLES = FOLDER / "digits.onnx", FOLDER / "digits_samples.npz"


def main(board: str, frames: int) -> None:
    with np.load(SAMPLES) as archive:
        images, labels = archive["images"], archive["labels"]
    programs = {trace: moeware.compile(MODEL, board, SAMPLES, trace=trace)
                for trace in (False, True)}
    config, step = programs[False].config, programs[False].steps[0]
    figures: dict[str, object] = {}
    right = accuracy(MODEL, programs[False], images, labels)
    figures |= {"held-out images": right["images"],
                "accuracy, float (ONNX Runtime), %": round(100 * right["float"], 2),
                "accuracy, integer, %": round(100 * right["integer"], 2),
                "images with the same answer, %": round(100 * right["same_answer"], 2)}
    for name, share in expert_agreement(MODEL, programs[False], images).items():
        figures[f"expert choices as in float, {name}, %"] = round(100 * share, 2)

    # The whole board: SDRAM chip at the controller's pins, serial line at its wires. The line is
    # faster than a real one, which no figure depends on.
    clock_hz = moeware.find_board(board).clock_hz
    simulated = SimulatedBoard(config, clock_hz=clock_hz)
    with SerialLink(simulated.transport, timeout_s=3600) as link:
        whole = BoardDevice(link, config, name="simulated board", timeout_s=3600)
        devices = {"RTL": RtlDevice(config), "golden": open_device("golden", config),
                   "PyTorch": open_device("torch", config)}
        found = compare(programs[True], devices, {"image": images[:frames]})
        figures[f"all layers, {frames} images back to back"] = found["text"]
        found = compare(programs[True], {"simulated board": whole} | devices,
                        {"image": images[:2]})
        figures["all layers, 2 images, whole board"] = found["text"]
        session = Session(programs[False], whole)
        session.run(None, {"image": images[:frames]})
    counters = session.last_counters
    mean = {name: statistics.mean(frame[name] for frame in counters) for name in counters[0]}
    figures |= {
        "cycles per image, mean": round(mean["cycles"]),
        "cycles per image, least and most": f"{min(f['cycles'] for f in counters):,} to "
                                            f"{max(f['cycles'] for f in counters):,}",
        "multiply-accumulates per image": step.macs,
        "bytes read per image": round(mean["read_beats"]) * config.bus_bytes,
        f"milliseconds per image at {clock_hz / 1e6:g} MHz": round(mean["cycles"] / clock_hz * 1e3,
                                                                   3)}
    table = [["engine", *ENGINE_COUNTERS], *(
        [engine.name.lower(), *(f"{mean[f'{engine.name.lower()}_{state}'] / mean['cycles']:.1%}"
                                for state in ENGINE_COUNTERS)] for engine in Engine)]
    record("digits", f"Digits MoE-ViT on the {board} configuration",
           "Cycles are of the whole board's RTL under Verilator, from start to done, with a model of "
           f"the 16-bit SDRAM chip at the controller's pins, all at {clock_hz / 1e6:g} MHz; not of a "
           f"board. Mean of {frames} images.", figures,
           tables={"Engines, share of an image's cycles": table}, config=config.to_dict())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--board", default="ulx3s-85f")
    parser.add_argument("--frames", type=int, default=24)
    arguments = parser.parse_args()
    main(arguments.board, arguments.frames)
