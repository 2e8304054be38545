"""Phi-3.5-MoE from the export to the same integers on every device."""

import dataclasses

import numpy as np
import pytest

from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import compile_model
from moeware.compiler.placement import report
from moeware.compiler.reference import evaluate
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config
from moeware.runtime.chosen import Chooser
from moeware.runtime.session import Session
from moeware.sim.dram import DDR
from moeware.sim.golden import GoldenDevice
from moeware.sim.rtl import RtlDevice

from ..sim.test_rtl import SHAPES, SMALL
from . import language_models
from .exports import run_onnx
from .test_models import EVEN

WHOLE = dataclasses.replace(EVEN, products=1, rotary=1, router_forms=1)
SIZES = {"num_hidden_layers": 2, "num_local_experts": 6, "router_jitter_noise": 0.15}


def ids(frames, seed):
    return np.random.default_rng(seed).integers(0, language_models.VOCABULARY, (frames, 9))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = language_models.build("phi-moe", seed=5, **SIZES)
    return language_models.export(model, tmp_path_factory.mktemp("phi") / "m.onnx")


@pytest.fixture(scope="module")
def program(path):
    return compile_model(path, WHOLE, {"ids": ids(48, 1)})


def routes(program):
    return [op for op in program.steps[-1].operations if isinstance(op, q.Route)]


@pytest.mark.parametrize("attention, opset", [("eager", 20), ("sdpa", 23)])
@pytest.mark.parametrize("seed, sizes", [(0, {}), (7, SIZES | {"num_local_experts": 16})],
                         ids=["as it is", "other sizes"])
def test_all_products_are_on_the_accelerator(tmp_path, attention, opset, seed, sizes):
    model = language_models.build("phi-moe", attention=attention, seed=seed, **sizes)
    path = language_models.export(model, tmp_path / "m.onnx", opset, tokens=11)
    parts = report(partition(fuse(load(path)), WHOLE))
    assert parts["fpga_mac_share"] == 1 and [entry["operator"] for entry in parts["host"]] == ["Gather"]


def test_the_threshold_reaches_the_instructions(program):
    assert [(route.sparse, route.threshold, route.over_chosen) for route in routes(program)] == [
        (True, round(0.3 * (1 << 15)), False)] * 2


def test_choices_are_those_of_the_float_model(path, program):
    """Where int8 moves the logits, by a per cent or two, another is chosen, or becomes near."""
    given, record = ids(24, 2), {}
    evaluate(fuse(load(path)), {"ids": given}, record.__setitem__)
    chooser = Chooser()
    Session(program, chooser).run(None, {"ids": given})
    for name in ("Route_0", "Route_1"):
        chosen = np.concatenate([each[name] for each in (found for _, found in chooser.choices)])
        wanted = record[f"{name}.indices"].reshape(chosen.shape)
        assert (np.sort(chosen, -1) == np.sort(wanted, -1)).mean() > 0.93


def test_gateware_equals_golden_equals_pytorch(tmp_path):
    """Two inferences, on small gateware."""
    config = Config(**SMALL | SHAPES["even"] | {"products": 1, "rotary": 1, "router_forms": 1})
    model = language_models.build("phi-moe", seed=6, hidden_size=16, intermediate_size=12,
                                  router_jitter_noise=0.1)
    path = language_models.export(model, tmp_path / "m.onnx", tokens=9)
    program = compile_model(path, config, {"ids": ids(32, 1)})
    device = RtlDevice(config, fast=False, dram=DDR, stall_seed=3)
    for seed in (2, 3):
        given = {"ids": ids(1, seed)}
        found, *others = (Session(program, each).run(None, given)[0]
                          for each in (device, GoldenDevice(), "torch"))
        for other in others:
            np.testing.assert_array_equal(found, other)


def test_the_answer_is_near_that_of_the_file(path, program):
    given = ids(8, 4)
    (found,) = Session(program, "torch").run(None, {"ids": given})
    wanted = np.concatenate([run_onnx(path, ids=each[None])[0] for each in given])
    # The median: a token of which another expert is near than in float has another answer.
    gap = np.abs(found - wanted).max(-1) / np.abs(wanted).max()
    assert np.median(gap) < 0.1


def test_without_gateware_the_mixture_is_on_the_host(path):
    config = dataclasses.replace(WHOLE, router_forms=0)
    parts = partition(fuse(load(path)), config)
    assert any("use one with Config.router_forms = 1" in str(reason)
               for step in parts.steps for reason in step.reasons.values())
    program = compile_model(path, config, {"ids": ids(8, 1)})
    given = ids(3, 2)
    (found,) = Session(program, "torch").run(None, {"ids": given})
    np.testing.assert_array_equal(found, Session(program, GoldenDevice()).run(None, {"ids": given})[0])
