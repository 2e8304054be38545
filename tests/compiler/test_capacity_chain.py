"""Experts of limited capacity from an exported file to the answer."""

import numpy as np
import pytest
import torch

from moeware.compiler.calibrate import calibrate
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import compile_model
from moeware.compiler.reference import evaluate
from moeware.hw.arch import quantised as q
from moeware.runtime.chosen import Chooser
from moeware.runtime.session import Session
from moeware.sim.golden import GoldenDevice

from .capacity_modules import CapacityMoe
from .exports import CHANNELS, HEIGHT, WIDTH, export, run_onnx, vit
from .test_models import EVEN, error
from .test_router_forms import FORMS, Fused, fused  # noqa: F401 - a fixture

CASES = {
    "token by token": ({"capacity": 2}, 0),
    "first choices first": ({"capacity": 2, "order": "choice"}, 0),
    "one place": ({"capacity": 1, "order": "choice", "normalise": "all"}, 0),
    "all but one": ({"capacity": 3}, 0),
    "of corrected sigmoids": ({"capacity": 2, "score": "sigmoid", "order": "choice", "groups": 4,
                               "chosen_groups": 2, "group_score": "pair"}, 1),
}


def images(count, seed):
    return np.random.default_rng(seed).normal(size=(count, CHANNELS, HEIGHT, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("frames", [1, 2])
def test_a_capacity_ends_in_its_answer(fused: Fused, case, frames):  # noqa: F811
    changes, corrections = CASES[case]
    model = fused.reformed(corrections, **changes)
    program = fused.compile(FORMS, start="partition", frames=frames)
    assert program.placement.endswith("100.0 % of MACs")
    (route,) = [op for op in program.steps[0].operations if isinstance(op, q.Route)]
    assert (route.capacity, route.by_rank) == (changes["capacity"], changes.get("order") == "choice")
    pictures, record = fused.example.images(25, 2), {}
    (real,) = evaluate(model, {"image": pictures}, record.__setitem__).values()
    (found,) = Session(program, GoldenDevice()).run(None, {"image": pictures})
    np.testing.assert_array_equal(found, Session(program, "torch").run(None, {"image": pictures})[0])
    chooser = Chooser()
    Session(program, chooser).run(None, {"image": pictures})
    chosen = np.concatenate([each["Route_0"] for _, each in chooser.choices])
    # Where all choose as in float, as many do as int8 is near, all tokens that are dropped are the same.
    wanted = record["Route_0.indices"]
    same = (chosen[:wanted[..., 0].size].reshape(wanted.shape) == wanted).all((1, 2))
    assert same.mean() > 0.3
    assert error(found[same], real[same]) < 0.15
    assert (record["Route_0.weights"] == 0).any()


@pytest.mark.parametrize("places, form", [("ranks", "einsum"), ("slots", "scatter")])
def test_an_exported_model_runs_on_the_accelerator(tmp_path, places, form):
    """From the file that a user brings; as near as int8 is where no choice differs."""
    made = vit(mixer=CapacityMoe(form, places, "chosen", capacity=2))
    with torch.no_grad():
        made.blocks[0].mixer.gate.weight.mul_(4)  # far apart, so that int8 chooses as float does
    path = export(made, tmp_path / "m.onnx", dynamic=False)
    program = compile_model(path, FORMS, {"image": images(48, 1)})
    assert program.placement.endswith("100.0 % of MACs")
    pictures = images(16, 2)
    real = np.concatenate([run_onnx(path, image=picture[None])[0] for picture in pictures])
    (found,) = Session(program, "golden").run(None, {"image": pictures})
    assert error(found, real) < 0.3


def test_calibration_sees_what_reaches_the_experts(fused: Fused):  # noqa: F811
    model = fused.reformed(capacity=1)
    record = {}
    pictures = fused.example.images(8, 3)
    evaluate(model, {"image": pictures}, record.__setitem__)
    result = calibrate(model, {"image": pictures})
    (name,) = [node.name for node in model.graph if node.op_type == "Experts"]
    kept = record["Route_0.weights"] != 0
    counts = np.bincount(record["Route_0.indices"][kept], minlength=len(result.tokens[name]))
    assert counts.tolist() == result.tokens[name].tolist() and counts.max() <= 8
    for expert, count in enumerate(counts):
        rows = record.get(f"{name}/expert{expert}/rows", np.zeros(0))
        assert len(rows) == count
        if count:
            assert len(result.samples[f"{name}/expert{expert}/input"]) == count


def test_without_gateware_the_router_is_on_the_host(fused: Fused):  # noqa: F811
    model = fused.reformed(capacity=2, order="choice")
    program = fused.compile(EVEN, start="partition")
    assert "Route" in program.placement
    pictures = fused.example.images(3, 2)
    (real,) = evaluate(model, {"image": pictures}).values()
    (found,) = Session(program, "torch").run(None, {"image": pictures})
    assert error(found, real) < 0.15


@pytest.mark.parametrize("changes, reason", [
    ({"order": "priority"}, "batch priority"),
    ({"normalise": "kept"}, "divides weights by the sum of those that are not dropped")])
def test_what_no_gateware_does_has_a_reason(fused: Fused, changes, reason):  # noqa: F811
    model = fused.reformed(**{"capacity": 2} | changes)
    parts = partition(model, FORMS)
    assert any(reason in str(text) for step in parts.steps for text in step.reasons.values())
    program = fused.compile(FORMS, start="partition")
    pictures = fused.example.images(3, 2)
    (real,) = evaluate(model, {"image": pictures}).values()
    (found,) = Session(program, "torch").run(None, {"image": pictures})
    assert error(found, real) < 0.15
