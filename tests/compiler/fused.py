"""A fused model beside the file that it was made from."""

import numpy as np
import onnxruntime

from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.reference import evaluate
from moeware.compiler.to_onnx import to_onnx
from tests.compiler import exports


def operators_of(model):
    """Canonical operators by their names, others as ``plain Reshape``."""
    return [node.domain and node.op_type or f"plain {node.op_type}" for node in model.graph]


def check(path, operators=None, frames=2, tolerance=1e-4, seeds=(11,), ids=40):
    """Fuse the model at ``path``; compare its operators (where given) with ``operators``, and its
    values, as they are and lowered to standard ONNX, with ONNX Runtime's on the file.

    tolerance: of float32 sums in another order, relative to the largest value;
    ids: integer inputs are drawn below it.
    """
    model = fuse(load(path))
    if operators is not None:
        assert operators_of(model) == operators
    session = onnxruntime.InferenceSession(to_onnx(model).SerializeToString())
    for seed in seeds:
        generator = np.random.default_rng(seed)
        feeds = {}
        for value in model.graph.inputs:
            shape, kind = (frames, *list(value.shape)[1:]), value.dtype.numpy()
            drawn = generator.normal(size=shape) if kind.kind == "f" else (
                generator.integers(0, ids, shape))
            feeds[value.name] = drawn.astype(kind)
        wanted = exports.run_onnx(path, **feeds)
        for results in (list(evaluate(model, feeds).values()), session.run(None, feeds)):
            for value, want in zip(results, wanted, strict=True):
                assert value.shape == want.shape
                assert np.abs(value - want).max() <= tolerance * np.abs(want).max()
    return model
