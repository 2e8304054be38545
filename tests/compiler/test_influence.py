"""What the outputs hear of an error in the experts' results, against errors that are put there."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from moeware.compiler import reference
from moeware.compiler.canonical import ROUTED
from moeware.compiler.fuse import fuse
from moeware.compiler.influence import SPREAD, influence
from moeware.compiler.load import load
from moeware.compiler.operators import OPERATORS

from .canonical_models import gated_model
from .exports import Moe, example, export, vit
from .test_gated import images


@pytest.fixture(scope="module", params=["Experts", "GatedExperts"])
def case(request, tmp_path_factory) -> tuple[ir.Model, Callable[[int, int], np.ndarray]]:
    """A model, and its images by their number and a seed."""
    if request.param == "GatedExperts":
        return gated_model(2), images
    return fuse(load(export(vit(mixer=Moe("loop")), tmp_path_factory.mktemp("m") / "m.onnx"))), example


def disturbed(model, feeds, name: str, size: float, monkeypatch, seed: int, row=slice(None)):
    """Outputs with an error of this size, in a random direction, in the rows of one node's result."""
    def experts(inputs, attrs, node, record):
        result, = plain(inputs, attrs, node, record)
        if node == name:
            error = torch.zeros_like(result)
            error[:, row] = torch.randn(error[:, row].shape, generator=torch.manual_seed(seed))
            result = result + error * size / error.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        return (result,)
    plain = OPERATORS["Experts"]
    with monkeypatch.context() as patch:
        for operator in ROUTED:
            patch.setitem(OPERATORS, operator, experts)
        return next(iter(reference.evaluate(model, feeds).values()))


def test_it_is_what_errors_do(case, monkeypatch):
    """Means over 32 random directions there and 192 here, of spreads as large as themselves: half is
    two and a half standard deviations."""
    model, images = case
    feeds = {"image": images(8, 3)}
    exact = next(iter(reference.evaluate(model, feeds).values()))
    found = influence(model, feeds)
    names = [node.name for node in model.graph if node.op_type in ROUTED]
    assert list(found) == names and all((rows > 0).all() for rows in found.values())
    for name in names:
        for row in (slice(None), slice(0, 1)):
            wanted = []
            for seed in range(24):
                given = disturbed(model, feeds, name, 1e-3, monkeypatch, seed, row)
                axes = tuple(range(1, exact.ndim))
                wanted.append((np.square(given - exact).sum(axes)
                               / np.square(exact).sum(axes)).mean() / 1e-6)
            plain = (found[name] - SPREAD * found[name].mean()) / (1 - SPREAD)
            assert plain[row].sum() == pytest.approx(np.mean(wanted), rel=0.5)


def test_it_is_the_same_every_time(case):
    model, images = case
    feeds = {"image": images(3, 4)}
    first, second = influence(model, feeds), influence(model, feeds)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert all(np.isfinite(rows).all() for rows in influence(model, {"image": images(1, 5)}).values())


def test_outputs_that_hear_nothing_leave_all_rows_alike(tmp_path):
    made = vit(mixer=Moe("loop"))
    for parameter in made.head.parameters():
        parameter.data.zero_()
    silent = fuse(load(export(made, tmp_path / "m.onnx")))
    for rows in influence(silent, {"image": example(2, seed=1)}).values():
        np.testing.assert_array_equal(rows, 1)


def test_a_node_of_the_host_hears_for_the_outputs(tmp_path):
    """Behind a Sin nothing is differentiated: what enters it counts, and scales do not."""
    path = export(vit(mixer=Moe("loop")), tmp_path / "m.onnx")
    feeds, proto = {"image": example(4, seed=6)}, onnx.load(path)
    last = proto.graph.output[0].name
    proto.graph.node.append(onnx.helper.make_node("Sin", [last], ["sine"], name="sine"))
    proto.graph.output[0].name = "sine"
    onnx.save(proto, tmp_path / "sine.onnx")
    plain = influence(fuse(load(path)), feeds)
    found = influence(fuse(load(tmp_path / "sine.onnx")), feeds)
    for name in plain:
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-4)


def test_a_model_without_experts_has_none(tmp_path):
    assert influence(fuse(load(export(vit(), tmp_path / "m.onnx"))), {"image": example(2)}) == {}
