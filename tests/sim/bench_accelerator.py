"""cocotb tests of the accelerator: programs in stalling memory, against the golden device's DRAM.

``MOEWARE_BENCH`` names a file of arrays: `bus_bytes`, `digest`, and for each case `<name>_entry` and
`<name>_before0`, `<name>_after0`, `<name>_before1`...: DRAM around its runs, back to back.
"""

import os

import cocotb
import numpy as np

from moeware.hw.arch.registers import MAGIC, Register, Status
from moeware.sim.benches.bench import Bench

CASES = dict(np.load(os.environ["MOEWARE_BENCH"]))


async def execute(dut, name, stall, seed):
    contents = bytearray(CASES[f"{name}_before0"].tobytes())
    bench = Bench(dut, int(CASES["bus_bytes"]), contents, stall=stall, seed=seed)
    await bench.start()
    assert await bench.access(Register.MAGIC) == MAGIC
    assert await bench.access(Register.DIGEST) == CASES["digest"]
    for run in range(sum(key.startswith(f"{name}_after") for key in CASES)):
        contents[:] = CASES[f"{name}_before{run}"].tobytes()
        assert await bench.run(int(CASES[f"{name}_entry"])) == Status.DONE
        expected = CASES[f"{name}_after{run}"]
        wrong = np.flatnonzero(np.frombuffer(contents, np.uint8) != expected)
        assert not len(wrong), f"run {run}: {len(wrong)} bytes, the first at {wrong[0]:#x}"
        counted = await bench.access(Register.READ_BEATS)
        assert counted <= bench.memory.reads.moved
        assert await bench.access(Register.CYCLES) > 0


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.6, 0.95])
async def moves_data(dut, stall):
    await execute(dut, "move", stall, 3)


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.9])
async def runs_a_network(dut, stall):
    await execute(dut, "network", stall, 4)
