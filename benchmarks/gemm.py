"""Int8 matrix products side by side with NNgen: cycles from start to done, all traffic included.

NNgen is optional. `--nngen PYTHON` names an interpreter that has it (`python -m venv nngen &&
nngen/bin/pip install nngen veriloggen 'numpy<2'`); it needs Icarus Verilog, too (Debian's package
`iverilog`). Without it, only moeware is measured.
"""

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from configs import gemm_target
from measure import lower, say
from record import record

from moeware.compiler.quantise import QuantisedStep
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import Memory
from moeware.hw.arch.program import Port, Region
from moeware.sim.rtl import RtlDevice

# Rows, depth, outputs; multipliers; bus bits; NNgen's depth x outputs x rows in parallel: of all such
# shapes with as many multipliers the one that takes the fewest cycles.
CASES = {"128 x 128 x 128, 16 multipliers": ((128, 128, 128), 16, 64, (4, 4, 1)),
         "128 x 128 x 128, 64 multipliers": ((128, 128, 128), 64, 128, (8, 8, 1)),
         "1 x 128 x 128, 16 multipliers": ((1, 128, 128), 16, 64, (4, 4, 1))}


def product(m: int, k: int, n: int) -> tuple[QuantisedStep, np.ndarray]:
    """One matrix product, int8 [m, k] by int8 [n, k] to int8 [m, n], and the left operand."""
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (n, k)).astype(np.int8)
    affine = q.Affine(bias=np.zeros(n, np.int32), multiplier=np.full(n, 1, np.uint16),
                      shift=np.full(n, 12, np.uint8))

    def port(name: str, channels: int) -> Port:
        region = Region(memory=Memory.ACTIVATION, rows=m, channels=channels, address=0)
        return Port(name=name, tensor=name, shape=(m, channels), scale=1.0, split=(m, channels),
                    order=(0, 1), region=region)
    step = QuantisedStep([q.Linear(name="product", output="y", source="x", weight=weight,
                                   affine=affine, table=None)], [port("x", k)], [port("y", n)])
    return step, generator.integers(-127, 128, (1, m, k))


def ours(shape: tuple[int, int, int], multipliers: int, bus_bits: int) -> int:
    """Cycles of moeware's gateware.

    Raises
    ------
    ValueError
        The result is not the product.
    """
    target = gemm_target(multipliers, bus_bits)
    step, left = product(*shape)
    compiled = lower(step, target)
    device = RtlDevice(target.config, dram=target.dram, clock_hz=target.clock_hz)
    found = device.run(compiled.program, compiled.step, {"x": left})["y"][0]
    sums = left[0] @ step.operations[0].weight.astype(np.int64).T
    if not np.array_equal(found, np.clip((sums + (1 << 11)) >> 12, -128, 127)):
        raise ValueError(f"Product of {shape} must be right to the last bit: the gateware is at fault")
    return device.counters[0]["cycles"]


def nngen(python: str, shape: tuple[int, int, int], bus_bits: int, parallel: tuple[int, ...]) -> dict:
    """What nngen_gemm.py prints."""
    numbers = map(str, (*shape, *parallel, bus_bits))
    done = subprocess.run([python, str(Path(__file__).with_name("nngen_gemm.py")), *numbers],
                          stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["errors"]:
        raise ValueError(f"NNgen's product must be right, but {answer['errors']} elements are not")
    return answer


def find_nngen(python: str | None) -> str | None:
    """An interpreter with NNgen, beside Icarus Verilog."""
    for candidate in (python, sys.executable):
        if candidate and not subprocess.run([candidate, "-c", "import nngen"], check=False,
                                            stderr=subprocess.DEVNULL).returncode:
            return candidate if shutil.which("iverilog") else None
    return None


def main(arguments: argparse.Namespace) -> None:
    python = find_nngen(arguments.nngen)
    if arguments.nngen and python is None:
        sys.exit(f"NNgen must be installed for {arguments.nngen}, and iverilog be on PATH: "
                 "pip install nngen veriloggen 'numpy<2'; apt-get install iverilog")
    if python is None:
        say("NNgen or iverilog is not installed: measuring moeware only")
    figures, table, cases = {}, [["product", "bus bits", "design", "cycles", "multipliers in use",
                                  "weight bandwidth in use"]], {}
    for name, (shape, multipliers, bus_bits, parallel) in CASES.items():
        with ThreadPoolExecutor(1) as pool:
            say(f"{name}: simulate")
            other = pool.submit(nngen, python, shape, bus_bits, parallel) if python else None
            cycles = {"moeware": ours(shape, multipliers, bus_bits)}
            if other:
                cycles["NNgen"] = other.result()["cycles"]
        m, k, n = shape
        for design, count in cycles.items():
            figures[f"{name}, {bus_bits}-bit bus: {design}, cycles"] = count
            table.append([name, bus_bits, design, count, f"{m * k * n / multipliers / count:.1%}",
                          f"{k * n / (bus_bits // 8) / count:.1%}"])
        cases[name] = {"shape": shape, "multipliers": multipliers, "bus_bits": bus_bits,
                       "cycles": cycles, "config": gemm_target(multipliers, bus_bits).config.to_dict()}
    without = "" if python else " NNgen was not installed for this run."
    record("gemm", "Matrix products side by side with NNgen",
           "Int8 by int8 to int8, inputs, weights and outputs over the bus; cycles of RTL simulation "
           "from start to done. moeware under Verilator with a memory that moves a bus word each "
           "cycle without latency, and an attention unit of one query row that stands still; the "
           "product is lowered as a quantised graph, with a bias and a scale for each output. NNgen "
           "under Icarus with veriloggen's AXI memory model, no delays and no pauses, without bias "
           f"and scales; its shape is the fastest of those with as many multipliers.{without}",
           figures, tables={"Cycles, and shares of their ideal": table}, cases=cases)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nngen", metavar="PYTHON", help="an interpreter that has NNgen")
    main(parser.parse_args())
