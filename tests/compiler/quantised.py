"""Models quantised by onnxruntime's static quantiser, and what ONNX Runtime makes of them."""

import logging

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from moeware.compiler.calibrate import calibrate
from moeware.compiler.fuse import fuse
from moeware.compiler.kept import Kept
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.quantise import QuantisedStep, quantise
from moeware.compiler.verify import verify_quantised

__all__ = ["quantise_file", "quantised_step", "values"]


class Reader(CalibrationDataReader):
    def __init__(self, name: str, images: np.ndarray):
        self.feeds = iter([{name: image[None]} for image in images])

    def get_next(self):
        return next(self.feeds, None)


def quantise_file(path, images, *, per_channel=False, symmetric=False, activation=QuantType.QInt8,
                  form=QuantFormat.QDQ, types=None, name="image", prepare=True, **options):
    """The model at `path` quantised on `images`, in a file beside it; prepare : optimised before."""
    logging.getLogger().setLevel(logging.ERROR)
    prepared, result = path.with_suffix(".pre.onnx"), path.with_suffix(".quantised.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True,
                      skip_optimization=not prepare)
    quantize_static(str(prepared), str(result), Reader(name, images), quant_format=form,
                    op_types_to_quantize=types, per_channel=per_channel, activation_type=activation,
                    weight_type=QuantType.QInt8,
                    extra_options={"ActivationSymmetric": symmetric, **options})
    return result


def values(path, names, feeds) -> list[np.ndarray]:
    """Values inside of the model at `path`, for each frame of the feeds, without optimisation."""
    model = onnx.load(str(path))
    for name in names:
        if name not in {output.name for output in model.graph.output}:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    frames = len(next(iter(feeds.values())))
    found = [session.run(list(names), {name: array[frame:frame + 1] for name, array in feeds.items()})
             for frame in range(frames)]
    return [np.stack(each) for each in zip(*found)]


def quantised_step(path, images) -> tuple[QuantisedStep, Kept]:
    """The first device step of the model at `path`, and what became of its scales."""
    canonical = fuse(load(path))
    kept = Kept.of(canonical)
    part, *rest = partition(canonical).steps
    statistics = calibrate(canonical, {"image": images})
    step = quantise(part.nodes, part.inputs, part.outputs, statistics, kept=kept)
    verify_quantised(step)
    kept.settle([part, *rest])
    return step, kept
