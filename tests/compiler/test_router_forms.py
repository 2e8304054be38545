"""Routes of every form from the canonical graph to the answer."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch

from moeware.compiler.errors import CompileError
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import compile_model
from moeware.compiler.reference import evaluate
from moeware.hw.arch import quantised as q
from moeware.runtime.chosen import Chooser
from moeware.runtime.session import Session
from moeware.sim.golden import GoldenDevice

from .models import Example, Moe, timm
from .test_models import EVEN, error, export

EXPERTS, CHOSEN, DIM = 8, 3, 24
FORMS = dataclasses.replace(EVEN, router_forms=1)
CORRECTION = np.linspace(-0.2, 0.3, EXPERTS).astype(np.float32)
CASES = {
    "sigmoid": ({"score": "sigmoid"}, 0),
    "sigmoid, not divided": ({"score": "sigmoid", "normalise": "all"}, 0),
    "corrected": ({"score": "sigmoid"}, 1),
    "DeepSeek-V3": ({"score": "sigmoid", "groups": 4, "chosen_groups": 2, "group_score": "pair"}, 1),
    "groups of sigmoids": ({"score": "sigmoid", "groups": 2, "chosen_groups": 1}, 0),
    "DeepSeek-V2": ({"normalise": "all", "groups": 4, "chosen_groups": 2}, 0),
    "Phi-3.5": ({"score": "sparse", "normalise": "all", "threshold": 1.0}, 0),
}


class Fused:
    """A model after `fuse`, whose Route can be given another form."""

    def __init__(self, folder):
        torch.manual_seed(3)
        made = timm(depth=1, token=False, pool="mean", mlp=lambda: Moe(DIM, 30, EXPERTS, CHOSEN))
        self.folder, self.example = folder, Example(made, (3, 8, 8))
        self.path = export(self.example, folder / "model.onnx")
        self.samples = {"image": self.example.images(48, 1)}
        self.compile(EVEN, stop="fuse")
        self.fused = folder / "fuse.model.onnx"
        self.original = self.fused.read_bytes()

    def compile(self, config, **options):
        return compile_model(self.path, config, self.samples, dump=self.folder, **options)

    def reformed(self, corrections=0, **attributes) -> ir.Model:
        """The canonical model with another router, in the dump, too."""
        self.fused.write_bytes(self.original)
        model = ir.load(self.fused)
        route = next(node for node in model.graph if node.op_type == "Route")
        for name, value in attributes.items():
            kind = {str: ir.AttrString, float: ir.AttrFloat32, int: ir.AttrInt64}[type(value)]
            route.attributes[name] = kind(name, value)
        correction = route.inputs[3]
        correction.const_value = ir.tensor(CORRECTION * np.float32(corrections), name=correction.name)
        ir.save(model, self.fused)
        return model


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return Fused(tmp_path_factory.mktemp("forms"))


def compiled(fused, case):
    attributes, corrections = CASES[case]
    model = fused.reformed(corrections, **attributes)
    return model, fused.compile(FORMS, start="partition")


@pytest.mark.parametrize("case", CASES)
def test_a_form_ends_in_its_answer(fused, case):
    """As near to the float model as a plain router is, and its choices are the float ones."""
    model, program = compiled(fused, case)
    assert program.placement.endswith("100.0 % of MACs")
    images, record = fused.example.images(24, 2), {}
    real = evaluate(model, {"image": images}, record.__setitem__)
    (output,) = real.values()
    (found,) = Session(program, GoldenDevice()).run(None, {"image": images})
    np.testing.assert_array_equal(found, Session(program, "torch").run(None, {"image": images})[0])
    assert error(found, output) < 0.15
    chooser = Chooser()
    Session(program, chooser).run(None, {"image": images})
    chosen = np.concatenate([each["Route_0"] for _, each in chooser.choices])
    wanted = np.sort(record["Route_0.indices"].reshape(chosen.shape), -1)
    assert (np.sort(chosen, -1) == wanted).mean() > 0.93  # int8 moves the logits by a per cent or two


def test_corrections_are_differences_in_units_of_a_score(fused):
    _, program = compiled(fused, "DeepSeek-V3")
    (route,) = [op for op in program.steps[0].operations if isinstance(op, q.Route)]
    assert np.abs(route.correction / 65536 - (CORRECTION - CORRECTION.min())).max() <= 0.5 / 65536
    assert (route.group, route.chosen_groups, route.pair) == (2, 2, True)


@pytest.mark.parametrize("threshold, integer", [(0.0, 0), (0.02, 655), (1.99999, 0xffff)])
def test_thresholds_have_16_bits(fused, threshold, integer):
    fused.reformed(score="sparse", normalise="all", threshold=threshold)
    program = fused.compile(FORMS, start="partition")
    (route,) = [op for op in program.steps[0].operations if isinstance(op, q.Route)]
    assert (route.sparse, route.threshold, route.correction) == (True, integer, None)


def test_plain_routes_are_as_before(fused):
    """No correction, no group: the form that needs no gateware."""
    fused.reformed()
    program = fused.compile(EVEN, start="partition")
    (route,) = [op for op in program.steps[0].operations if isinstance(op, q.Route)]
    assert route.correction is None and not (route.sigmoid or route.group or route.pair)


@pytest.mark.parametrize("case", ["corrected", "Phi-3.5"])
def test_without_gateware_the_router_is_on_the_host(fused, case):
    attributes, corrections = CASES[case]
    model = fused.reformed(corrections, **attributes)
    reasons = [str(reason) for step in partition(model, EVEN).steps for reason in step.reasons.values()]
    assert any("use one with Config.router_forms = 1" in reason for reason in reasons)
    program = fused.compile(EVEN, start="partition")
    assert "Config" not in program.placement and "Route" in program.placement
    images = fused.example.images(3, 2)
    (real,) = evaluate(model, {"image": images}).values()
    (found,) = Session(program, "torch").run(None, {"image": images})
    assert error(found, real) < 0.15


@pytest.mark.parametrize("corrections, attributes, reason", [
    (1, {}, "softmax probabilities that are corrected"),
    (0, {"groups": 2, "chosen_groups": 1, "group_score": "pair"}, "of which two are summed"),
    (1000, {"score": "sigmoid"}, "must spread over less than 63, not 500; clip them")])
def test_what_no_gateware_does_has_a_reason(fused, corrections, attributes, reason):
    parts = partition(fused.reformed(corrections, **attributes), FORMS)
    assert any(reason in str(text) for step in parts.steps for text in step.reasons.values())


def test_a_dump_for_other_gateware_is_refused(fused):
    fused.reformed(1, score="sigmoid")
    fused.compile(FORMS, start="partition", stop="quantise")
    with pytest.raises(CompileError, match="router_forms = 0, not 1: start at partition"):
        fused.compile(EVEN, start="calibrate")


def test_more_groups_than_the_router_sorts_are_refused(fused):
    fused.reformed(0, groups=8, chosen_groups=6, k=CHOSEN)
    with pytest.raises(CompileError, match="chosen groups of .* 2 more than Config.max_chosen = 4"):
        fused.compile(FORMS, start="partition")
