"""The profile of a run adds up to what the hardware counts."""

import json
from itertools import pairwise

import numpy as np
import pytest

import moeware
from moeware.hw.arch.isa import Engine
from moeware.hw.arch.quantised import Route
from moeware.hw.arch.registers import ENGINE_COUNTERS
from moeware.runtime.chosen import chosen_experts
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT
from moeware.sim.profile import ProfilingDevice, profile
from moeware.sim.profile_plot import roofline
from moeware.sim.profile_trace import trace
from moeware.sim.rtl import RtlDevice

from ..compiler.lowering import program, transformer
from ..hw.arch.configs import CONFIGS

SIZES = {"tokens": 9, "depth": 10, "width": 6, "heads": 2, "hidden": 17, "experts": 7, "chosen": 2}


def made(config, frames=2, **changes):
    """A program and inputs; with seven experts and few tokens, some experts have none."""
    graph = transformer(1, **SIZES | changes)
    compiled = program(graph, config, trace=False)
    return compiled, compiled.steps[0], graph.integers(frames)


@pytest.fixture(scope="module")
def device():
    return ProfilingDevice(CONFIGS[0], fast=False, dram=SDRAM_16BIT)


@pytest.mark.parametrize("number, options", [
    (0, {"dram": SDRAM_16BIT}), (0, {"dram": IDEAL, "stall_seed": 3}), (2, {"dram": DDR})])
def test_tables_add_up_to_the_hardware_counters(number, options):
    config = CONFIGS[number]
    compiled, step, inputs = made(config)
    device = ProfilingDevice(config, fast=False, **options)
    device.run(compiled, step, inputs)
    assert len(device.profiles) == len(device.counters) == 2
    for found, counters in zip(device.profiles, device.counters):
        table = found.timeline.table()
        for engine in Engine:
            rows = [row for row in table if row.engine == engine]
            for state in ENGINE_COUNTERS:
                assert (sum(getattr(row, state) for row in rows)
                        == counters[f"{engine.name.lower()}_{state}"]), (engine, state)
            assert all(sum(row.waits_for.values()) == row.waiting for row in rows)
            # Between two starts an engine can do no more than be busy and wait.
            assert all(row.busy + row.waiting <= row.last + 1 for row in rows)
        assert sum(row.instructions for row in table) == counters["instructions"] - 1  # END
        assert any(row.skipped for row in table)
        stored = sum(row.bytes for row in table if row.engine == Engine.STORE)
        assert stored == counters["write_beats"] * config.bus_bytes
        loaded = sum(row.bytes for row in table if row.engine == Engine.LOAD) // config.bus_bytes
        fetched = 32 * counters["instructions"] // config.bus_bytes
        assert 0 <= counters["read_beats"] - loaded - fetched <= 512 // config.bus_bytes
        cycles = counters["cycles"]
        assert sum(found.working.values()) == cycles
        shares = {what: round(found.share(what) * cycles) for what in ("bus", "linear")}
        assert shares == {"bus": counters["read_beats"] + counters["write_beats"],
                          "linear": counters["linear_busy"] - counters["linear_stalled"]}
        assert sum(found.idle.values()) == found.working["nothing"] + found.working["bus"]
        assert 0 <= cycles - sum(found.timeline.layer_cycles().values()) < 20


def test_slices_of_an_engine_are_in_order(device):
    compiled, step, inputs = made(device.config)
    device.run(compiled, step, inputs)
    timeline = device.profiles[-1].timeline
    assert {work.layer for work in timeline.works} == set(step.layers)
    for engine in Engine:
        own = np.flatnonzero((timeline.engines == engine) & ~timeline.skipped)
        assert len(own) > 1
        for values in (timeline.start, timeline.done, timeline.since):
            assert (np.diff(values[own]) > 0).all()
        assert (timeline.done[own] > timeline.start[own]).all()
    assert timeline.stalled[timeline.engines == Engine.LOAD].sum() > 0
    assert timeline.done.max() < timeline.cycles


def test_rows_of_an_expert_are_its_tokens(device):
    compiled, step, inputs = made(device.config)
    device.run(compiled, step, inputs)
    route = next(op for op in step.operations if isinstance(op, Route))
    for number, found in enumerate(device.profiles[-2:]):
        choice = chosen_experts(compiled, step, inputs)[number][route.name]
        for expert in range(SIZES["experts"]):
            rows = {work.rows for work in found.timeline.works if work.engine == Engine.LINEAR
                    and work.instruction.queued and work.instruction.expert == expert}
            assert rows == {int((choice == expert).sum())}


def test_a_log_of_another_step_or_choice_is_refused(device):
    compiled, step, inputs = made(device.config, frames=1)
    rtl = RtlDevice(device.config, fast=False, log_events=True)
    rtl.run(compiled, step, inputs)
    (log,), (counters,) = rtl.logs, rtl.counters
    other, _, _ = made(device.config, experts=3)
    with pytest.raises(ValueError, match="Log of a run must have"):
        profile(other, other.steps[0], log, counters)
    choice = {name: np.zeros_like(value) for name, value in
              chosen_experts(compiled, step, inputs)[0].items()}
    with pytest.raises(ValueError, match="Chosen experts must be those"):
        profile(compiled, step, log, counters, choice)
    step.layer_of = step.layer_of[1:]
    with pytest.raises(ValueError, match="layer_of must have"):
        profile(compiled, step, log, counters)


def test_nothing_is_logged_unless_asked_for(device):
    compiled, step, inputs = made(device.config, frames=1)
    rtl = RtlDevice(device.config, fast=False)
    rtl.run(compiled, step, inputs)
    assert rtl.logs == []


def test_trace_is_what_perfetto_reads(device, tmp_path):
    compiled, step, inputs = made(device.config)
    device.run(compiled, step, inputs)
    timelines = [found.timeline for found in device.profiles[-2:]]
    events = json.loads(json.dumps(trace(timelines)))["traceEvents"]
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events
             if event["name"] == "thread_name"}
    assert len(names) == 2 * len(Engine)
    for (process, thread), name in names.items():
        own = [event for event in events if (event["pid"], event["tid"]) == (process, thread)]
        slices = [event for event in own if event["ph"] == "X"]
        assert all(event["dur"] > 0 and {"ts", "name", "cat", "args"} <= set(event)
                   for event in slices)
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(slices)), name
        counters = device.counters[process - 1]
        for category, state in (("instruction", "busy"), ("waiting", "waiting")):
            assert (sum(event["dur"] for event in slices if event["cat"] == category)
                    == counters[f"{name}_{state}"])
    linear = next(event for event in events if event.get("args", {}).get("target") == "residual")
    assert linear["args"]["layer"] in step.layers and linear["args"]["macs"] > 0
    assert any(event["ph"] == "i" and event["cat"] == "skipped" for event in events)
    roofline(tmp_path / "roofline.png", timelines, SDRAM_16BIT, 100e6)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    points = timelines[0].roofline()
    assert 0 < points["whole run"][1] < device.config.linear_macs + device.config.attention_macs
    assert points["/attention6"][0] is None


def test_the_api_profiles_files(tmp_path):
    compiled, step, inputs = made(CONFIGS[0], frames=1)
    compiled.save(tmp_path / "small.moe")
    feeds = {port.name: inputs[port.tensor].astype(np.float32) / 64 for port in step.inputs}
    found, = moeware.profile(tmp_path / "small.moe", feeds, fast=False)
    assert found.timeline.cycles == found.counters["cycles"]
    assert json.loads(json.dumps(found.to_dict()))["cycles"] == found.timeline.cycles
