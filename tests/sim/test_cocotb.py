"""The accelerator's ports under cocotb, with random stalls on every channel."""

import os

import numpy as np
from cocotb_tools.check_results import get_results
from cocotb_tools.runner import VerilatorControlFile, get_runner

from moeware.hw.accelerator import Accelerator
from moeware.hw.arch import isa
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Instruction, Memory, Opcode
from moeware.sim.golden import Machine
from moeware.sim.verilate import verilator_root
from moeware.sim.verilog import to_verilog

from ..compiler.lowering import program, transformer
from .copier import Copier

CONFIG = Config(tokens=1, outputs=2, depth=2, queries=1, lanes=1, bus_bytes=4, activation_banks=2,
                activation_words=256, residual_words=256, weight_words=128, param_words=256, tables=1,
                row_words=16, max_rows=8, max_experts=2, max_chosen=1, queue=2)

# Only the ports are visible: what is visible cannot be optimised away.
VISIBLE = """`verilator_config
public_flat_rw -module "accelerator" -var "clk"
public_flat_rw -module "accelerator" -var "rst"
public_flat_rw -module "accelerator" -var "memory__*"
public_flat_rw -module "accelerator" -var "registers__*"
"""


def run_bench(monkeypatch, folder, component, module, expected, **environment):
    """Builds `component` as `accelerator` and runs the tests of `module`, `expected` in number."""
    root = verilator_root()
    monkeypatch.setenv("VERILATOR_ROOT", str(root))
    # The first as in `moeware.sim.verilate`; the second because compiling takes longest.
    monkeypatch.setenv("MAKEFLAGS", "CFG_CXXFLAGS_PCH_I=-include OPT_FAST=-O0")
    monkeypatch.setenv("PATH", f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (folder / "top.v").write_text(to_verilog(component, "accelerator"))
    (folder / "ports.vlt").write_text(VISIBLE)
    runner = get_runner("verilator")
    runner.build(sources=[VerilatorControlFile(folder / "ports.vlt"), folder / "top.v"],
                 hdl_toplevel="accelerator", build_dir=folder / "build", always=True,
                 build_args=["--no-public-flat-rw", "-Wno-fatal", "-Wno-lint", "-O3", "--x-initial",
                             "unique", "--noassert"],
                 log_file=folder / "build.log")
    results = runner.test(hdl_toplevel="accelerator", test_module=module, test_dir=folder,
                          build_dir=folder / "build", log_file=folder / "test.log",
                          results_xml=str(folder / "results.xml"))
    assert get_results(results) == (expected, 0), (folder / "test.log").read_text()[-6000:]


def test_drivers_and_checkers(monkeypatch, tmp_path):
    run_bench(monkeypatch, tmp_path, Copier(4), "tests.sim.bench_copier", 16)


def moving():
    """LOAD to three memories and STORE from two, in and across pages."""
    draw, dram = np.random.default_rng(1), np.zeros(1 << 14, np.uint8)
    dram[4096:] = draw.integers(0, 256, len(dram) - 4096)
    tokens = {"signal": 1 << Engine.STORE}, {"wait": 1 << Engine.LOAD}
    code = [Instruction(Opcode.LOAD, {"memory": Memory.ACTIVATION, "local": 3, "words": 201,
                                      "address": 4096 + 64}),
            Instruction(Opcode.LOAD, {"memory": Memory.RESIDUAL, "local": 0, "words": 99,
                                      "address": 8192 - 64} | tokens[0]),
            Instruction(Opcode.LOAD, {"memory": Memory.WEIGHT, "local": 1, "words": 5, "address": 4096}),
            Instruction(Opcode.STORE, {"memory": Memory.ACTIVATION, "local": 5, "words": 150,
                                       "address": 12288 - 128} | tokens[1]),
            Instruction(Opcode.STORE, {"memory": Memory.RESIDUAL, "local": 7, "words": 1,
                                       "address": 10240}),
            Instruction(Opcode.END, {})]
    text = b"".join(map(isa.encode, code))
    dram[128:128 + len(text)] = np.frombuffer(text, np.uint8)
    return 128, [dram, dram]


def network():
    graph = transformer(1, tokens=2, depth=4, width=2, heads=2, hidden=3, experts=2, chosen=1)
    made = program(graph, CONFIG)
    step, inputs, frames = made.steps[0], graph.integers(2), []
    for frame in range(2):
        dram = np.zeros(-(-made.dram_bytes // 4096) * 4096, np.uint8)
        dram[:len(made.image)] = np.frombuffer(made.image, np.uint8)
        for port in step.inputs:
            raw = np.frombuffer(port.region.pack(CONFIG, inputs[port.tensor][frame]), np.uint8)
            dram[port.region.address:][:len(raw)] = raw
        frames.append(dram)
    return step.entry, frames


def test_accelerator(monkeypatch, tmp_path):
    arrays = {"bus_bytes": np.array(CONFIG.bus_bytes), "digest": np.array(CONFIG.digest)}
    for name, make in (("move", moving), ("network", network)):
        entry, frames = make()
        arrays[f"{name}_entry"] = np.array(entry)
        machine = Machine(CONFIG, np.zeros(len(frames[0]), np.uint8))
        for run, dram in enumerate(frames):
            machine.dram[:] = dram
            machine.run(entry)
            arrays |= {f"{name}_before{run}": dram, f"{name}_after{run}": machine.dram.copy()}
            assert (machine.dram != dram).any()
    np.savez(tmp_path / "cases.npz", **arrays)
    run_bench(monkeypatch, tmp_path, Accelerator(CONFIG), "tests.sim.bench_accelerator", 5,
              MOEWARE_BENCH=str(tmp_path / "cases.npz"))
