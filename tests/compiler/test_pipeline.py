"""Exported models to programs: exact against the quantised graph, close to the float model."""

import dataclasses

import numpy as np
import pytest
from torch import nn

from moeware.compiler.errors import CompileError
from moeware.compiler.pipeline import STAGES, compile_model
from moeware.hw.arch.isa import Engine, Memory
from moeware.hw.arch.program import DeviceStep
from moeware.hw.arch.work import works
from moeware.sim.golden import GoldenDevice

from ..hw.arch.configs import CONFIGS
from ..runtime.reference import evaluate
from . import exports

MODELS = {
    "packed-dense": lambda: exports.vit(),
    "separate-loop": lambda: exports.vit(exports.SeparateAttention(), exports.Moe("loop")),
    "torch-scatter-mean": lambda: exports.vit(exports.TorchAttention(), exports.Moe("scatter"),
                                              pool="mean"),
    "gather-all": lambda: exports.vit(mixer=exports.Moe("gather", order="all"), embed="rearrange"),
    "relu-top-first": lambda: exports.vit(mixer=exports.Moe("onehot", "top_first",
                                                            function=nn.ReLU())),
    "layer-scale": lambda: exports.vit(layer_scale=True),
}
CALIBRATION = {"image": exports.example(64, seed=1)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """ONNX files of `MODELS`, exported when first asked for."""
    folder, paths = tmp_path_factory.mktemp("models"), {}

    def path(name: str):
        if name not in paths:
            paths[name] = exports.export(MODELS[name](), folder / f"{name}.onnx")
        return paths[name]
    return path


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=["even", "ragged"])
@pytest.mark.parametrize("name", MODELS)
def test_programs_are_exact_and_close_to_float(files, name, config):
    program = compile_model(files(name), config, CALIBRATION, trace=True)
    step, = program.steps
    assert isinstance(step, DeviceStep)
    image = exports.example(6, seed=2)
    inputs = {port.tensor: port.quantise(image).astype(np.int64) for port in step.inputs}
    found = GoldenDevice().run(program, step, inputs, probes=True)
    expected = evaluate(step.operations, inputs)
    for probe in step.probes:
        np.testing.assert_array_equal(found[probe.tensor], expected[probe.tensor], probe.name)
    logits = step.outputs[0].dequantise(found[step.outputs[0].tensor])
    real = np.concatenate([exports.run_onnx(files(name), image=frame[None])[0] for frame in image])
    # Int8 in a random network without training: a few per cent of the logits' spread. A wrong scale,
    # a lost bias or a missing layer gives 50 % and more.
    error = np.sqrt(np.square(logits - real).mean()) / real.std()
    assert error < 0.15, error


@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize("bits, packed", [(4, 1), (2, 2)])
def test_experts_of_few_bits_are_exact(files, bits, packed, narrow):
    config = dataclasses.replace(CONFIGS[0], narrow=narrow)
    program = compile_model(files("separate-loop"), config, CALIBRATION, bits={"experts": bits})
    step, = program.steps
    inputs = {port.tensor: port.quantise(exports.example(3, seed=2)).astype(np.int64)
              for port in step.inputs}
    found = GoldenDevice().run(program, step, inputs)
    expected = evaluate(step.operations, inputs)
    for port in step.outputs:
        np.testing.assert_array_equal(found[port.tensor], expected[port.tensor])
    loads = {(work.instruction.packed, "/expert" in work.layer[1:])
             for work in works(program, step) if work.engine is Engine.LOAD
             and work.instruction.memory == Memory.WEIGHT}
    assert loads == {(0, False), (0 if narrow else packed, True)}


def test_stages_can_be_dumped_and_resumed(files, tmp_path):
    path, whole = files("separate-loop"), []
    direct = compile_model(path, CONFIGS[0], CALIBRATION,
                           progress=lambda stage, number, total: whole.append(stage))
    assert whole == list(STAGES)
    for stop, start in zip(STAGES, list(STAGES)[1:]):
        folder = tmp_path / stop
        assert compile_model(path, CONFIGS[0], CALIBRATION, dump=folder, stop=stop) is None
        resumed = compile_model(path, CONFIGS[0], CALIBRATION, dump=folder, start=start)
        assert resumed.image == direct.image
        assert resumed.steps[0].outputs == direct.steps[0].outputs


@pytest.mark.parametrize("options, message", [
    (dict(start="tile"), "must have a dump folder to resume from"),
    (dict(start="tile", dump="nowhere"), "must hold the stage 'quantise'"),
    (dict(start="emit", stop="load"), "Stage 'emit' must not come after 'load'"),
    (dict(start="parse"), "Stage must be one of load, .*, not 'parse'"),
])
def test_wrong_stages_are_named(files, tmp_path, options, message):
    if "dump" in options:
        options = options | {"dump": tmp_path / options["dump"]}
    with pytest.raises(CompileError, match=message):
        compile_model(files("packed-dense"), CONFIGS[0], CALIBRATION, **options)


def test_a_dump_of_another_configuration_is_refused(files, tmp_path):
    path = files("packed-dense")
    compile_model(path, CONFIGS[0], CALIBRATION, dump=tmp_path, stop="tile")
    with pytest.raises(CompileError, match="must be of the configuration .*: start at tile"):
        compile_model(path, CONFIGS[-1], CALIBRATION, dump=tmp_path, start="schedule")
    compile_model(path, CONFIGS[-1], CALIBRATION, dump=tmp_path, start="tile")


def test_a_dump_of_other_gateware_is_refused(files, tmp_path):
    path, rotary = files("packed-dense"), dataclasses.replace(CONFIGS[0], rotary=1)
    compile_model(path, CONFIGS[0], CALIBRATION, dump=tmp_path, stop="partition")
    with pytest.raises(CompileError, match="with rotary = 1, not 0: start at partition"):
        compile_model(path, rotary, CALIBRATION, dump=tmp_path, start="calibrate")
    compile_model(path, rotary, CALIBRATION, dump=tmp_path, start="partition", stop="partition")


def test_no_calibration_is_refused(files):
    with pytest.raises(CompileError, match="Calibration data must hold real inputs"):
        compile_model(files("packed-dense"), CONFIGS[0], {})
