"""The bundled model's cycles as estimated by the compiler, against simulated gateware."""

import numpy as np
from record import ROOT, record

import moeware
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT

MEMORIES = {"ideal": IDEAL, "16-bit SDRAM at 133 MHz": SDRAM_16BIT, "64-bit DDR4-2400": DDR}


def main(board: str = "ulx3s-85f") -> None:
    folder = ROOT / "examples" / "digits"
    samples = folder / "digits_samples.npz"
    program = moeware.compile(folder / "digits.onnx", board, samples)
    with np.load(samples) as archive:
        feeds = {program.inputs[0][0]: archive["images"][:1]}
    rows = [["memory", "gateware, cycles", "estimate, cycles", "error",
             "largest error of a layer, share of the run", "estimate, equal shares for experts"]]
    errors = []
    for name, dram in MEMORIES.items():
        found, = moeware.profile(program, feeds, dram=dram)
        expected, = moeware.estimate(program, dram=dram, feeds=feeds)
        balanced, = moeware.estimate(program, dram=dram)
        cycles = found.timeline.cycles
        errors.append(expected.cycles / cycles - 1)
        layers = found.timeline.layer_cycles()
        worst = max(abs(taken - layers[layer])
                    for layer, taken in expected.layer_cycles().items())
        rows.append([name, cycles, expected.cycles, f"{errors[-1]:+.2%}", f"{worst / cycles:.2%}",
                     balanced.cycles])
    record("estimate", "Estimated cycles", f"One image of the bundled model, {board}, 100 MHz.",
           {"largest error": f"{max(map(abs, errors)):.2%}"},
           tables={"Cycles": rows}, config=program.config.to_dict())


if __name__ == "__main__":
    main()
