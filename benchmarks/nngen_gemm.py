"""An int8 matrix product in NNgen's gateware, simulated with Icarus Verilog; for `gemm.py`.

Runs in an interpreter that has NNgen (`pip install nngen veriloggen`), which needs no moeware there,
and needs `iverilog` on PATH. Prints one line of JSON. The memory answers at once and moves a
bus word a cycle; inputs, weights and outputs cross the AXI bus.
"""

import argparse
import json
import math
import os
import re
import tempfile

import nngen
import numpy as np
import veriloggen as vg
from nngen import sim
from veriloggen import simulation
from veriloggen.types import axi

ROOM = 64  # bytes that every region's start is a multiple of
SAMPLE = 37  # every so many elements of the result are compared


def main(m: int, k: int, n: int, depth: int, outputs: int, rows: int, bus_bits: int) -> dict:
    generator = np.random.default_rng(0)
    left = generator.integers(-127, 128, (m, k))
    right = generator.integers(-127, 128, (n, k))
    a = nngen.placeholder(nngen.int8, shape=(m, k), name="a")
    b = nngen.variable(nngen.int8, shape=(n, k), name="b")
    b.set_value(right)
    c = nngen.matmul(a, b, transposed_b=True, dtype=nngen.int8, sum_dtype=nngen.int32)
    shift = 12  # brings sums of 128 products into 8 bits, about
    c.attribute(par_left_col=depth, par_out_col=outputs, par_left_row=rows, cshamt_out=shift)
    top = nngen.to_veriloggen([c], "matmul", silent=True, config={
        "maxi_datawidth": bus_bits, "offchipram_chunk_bytes": ROOM})
    wanted = nngen.eval([c], a=left)[0]

    parameters = nngen.export_ndarray([c], ROOM)

    def room(size: int) -> int:
        return -(-size // ROOM) * ROOM
    parameters_at = room(a.addr + a.memory_size)
    wanted_at = room(parameters_at + len(parameters))
    spare_at = room(wanted_at + wanted.size)
    image = np.zeros(1 << 18, np.int64)
    axi.set_memory(image, left, 32, 8, a.addr, max(math.ceil(bus_bits / 8), depth))
    axi.set_memory(image, parameters, 32, 8, parameters_at)
    axi.set_memory(image, wanted, 32, 8, wanted_at, max(math.ceil(bus_bits / 8), outputs))
    cycles, errors = simulate(top, image, bus_bits, c, wanted_at, spare_at, m, n)
    return {"cycles": cycles, "errors": errors, "multipliers": depth * outputs * rows,
            "shape": f"{depth} deep, {outputs} outputs, {rows} rows", "bus_bits": bus_bits}


def simulate(top, image, bus_bits: int, c, wanted_at: int, spare_at: int, m: int,
             n: int) -> tuple[int, int]:
    """Cycles from start to done, and how many of the elements that were looked at are wrong."""
    bench = vg.Module("bench")
    bench.copy_params(top)
    ports = bench.copy_sim_ports(top)
    clock, reset_n = ports["CLK"], ports["RESETN"]
    reset = bench.Wire("RST")
    reset.assign(vg.Not(reset_n))
    memory = axi.AxiMemoryModel(
        bench, "memory", clock, reset, datawidth=bus_bits, mem_datawidth=bus_bits,
        memimg=image, memimg_datawidth=32, memimg_name="image.out", write_delay=0, read_delay=0,
        sleep_interval=0)
    memory.connect(ports, "maxi")
    control = vg.thread.AXIMLite(bench, "control", clock, reset, noio=True)
    control.connect(ports, "saxi")
    counter = bench.Reg("counter", 32, initval=0)
    vg.Seq(bench, "seq", clock, reset)(counter.inc())
    over = bench.Reg("over", initval=0)
    bench.Always(vg.Posedge(clock))(vg.If(over)(vg.Systask("finish")))
    aligned = c.aligned_shape[-1]

    def run():
        for _ in range(100):
            pass
        sim.set_global_addrs(control, spare_at)
        began = counter.value
        sim.start(control)
        sim.wait(control)
        print("cycles %d" % (counter.value - began))  # noqa: UP031
        equal = 0
        for place in range(0, m * n, SAMPLE):
            row = place // n
            at = row * aligned + place - row * n
            found = memory.read_word(at, c.addr, 8)
            right = memory.read_word(at, wanted_at, 8)
            if found == right:
                equal += 1
        print("equal %d" % equal)  # noqa: UP031
        over.value = 1

    thread = vg.thread.Thread(bench, "run", clock, reset, run)
    thread.start()
    bench.Instance(top, "top", params=bench.connect_params(top), ports=bench.connect_ports(top))
    simulation.setup_reset(bench, reset_n, bench.make_reset(), period=100, polarity="low")
    simulation.setup_clock(bench, clock, hperiod=5)
    output = simulation.Simulator(bench, sim="iverilog").run(outputfile="bench.vvp")
    cycles, equal = (int(re.search(rf"{name} +(\d+)", output)[1]) for name in ("cycles", "equal"))
    return cycles, len(range(0, m * n, SAMPLE)) - equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("m", "k", "n", "depth", "outputs", "rows", "bus_bits"):
        parser.add_argument(name, type=int)
    arguments = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the simulation reads and writes files where it runs
        answer = main(**arguments)
        os.chdir("/")
    print(json.dumps(answer))
