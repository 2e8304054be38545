"""Rows of thousands of channels, as language models have them: normalised on all devices alike, and
named where instructions or the configuration have no room for them."""

import numpy as np
import pytest

from moeware.compiler.errors import CompileError
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory, NormMode, Opcode
from moeware.hw.arch.program import Program
from moeware.hw.arch.work import works
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.golden import GoldenDevice

from ..hw.arch.configs import config
from ..runtime.reference import Graph
from .decoders import Decoder, loss, quantised
from .lowering import program

# For rows of up to 4,096 channels.
LARGE = config(2, 4, 8, 2, 2, 8, activation_words=8192, residual_words=1 << 18, weight_words=4096,
               param_words=4096, row_words=512, rotary=1)


def compare(compiled: Program, inputs: dict[str, np.ndarray]) -> None:
    """Every tensor of a run of the golden device is that of PyTorch."""
    golden, pytorch = (device.run(compiled, compiled.steps[0], inputs, probes=True)
                       for device in (GoldenDevice(), TorchDevice()))
    assert golden.keys() == pytorch.keys() >= {op.output for op in compiled.steps[0].operations}
    for tensor, values in golden.items():
        np.testing.assert_array_equal(values, pytorch[tensor], err_msg=tensor)


def test_a_decoder_of_thousands_of_features():
    """2,308 features, no multiple of a word; queries and keys, normalised as a whole, of 32 heads of 66
    channels, which rows of 2,304 hold between zeros. Some channels of the stream are loud."""
    decoder = Decoder(11, tokens=4, features=2308)
    y = decoder.norm(decoder.block(decoder.x, 32, 32, 66, 24, norm="heads"))
    model = decoder.model(decoder.linear(y, 9))
    x = np.random.default_rng(12).normal(size=(2, 4, 2308)).astype(np.float32)
    x[:, :, [7, 2307]] *= 40
    step = quantised(model, x)
    compiled = program(step, LARGE, trace=True)
    norms = {(i.channels, i.counted) for i in (work.instruction for work in works(
        compiled, compiled.steps[0])) if i.opcode is Opcode.NORM and i.mode == NormMode.RMS}
    assert norms == {(2308, 0), (2304, 2112)}
    (entry,) = step.inputs
    compare(compiled, {entry.tensor: entry.quantise(x)})
    # As of narrow rows (2 % is what 8 bits cost here): no loud channel saturates.
    assert loss(model, step, compiled, x) < 0.04


@pytest.mark.parametrize("channels, changes, message", [
    (4097, {}, "A row of /norm0 takes 513, 1 more than Config.row_words = 512"),
    (16383, {}, "A row of input0 takes 8192 words, more than the 8191 .* more Config.lanes than 2"),
    (65536, {"lanes": 16, "depth": 64, "outputs": 16, "row_words": 1024},
     "A row of /norm0 must have at most 65535 channels, not 65536"),
])
def test_rows_that_are_too_wide_are_named(channels, changes, message):
    graph = Graph(1)
    graph.add_linear(graph.norm(graph.input(2, channels, Memory.RESIDUAL), NormMode.RMS), None, 3)
    with pytest.raises(CompileError, match=message):
        program(graph, Config(**LARGE.to_dict() | changes))


def test_the_widest_rows_that_a_product_takes():
    graph = Graph(2)
    x = graph.input(3, 4096, Memory.RESIDUAL)
    for mode in (NormMode.RMS, NormMode.LAYER):
        graph.add_linear(graph.norm(x, mode), None, 3)
    inputs = graph.integers(1)
    inputs[x][0, 0] = -1 << 15
    inputs[x][0, 1, ::2] = 32767
    compare(program(graph, LARGE), inputs)


def test_groups_of_thousands_of_channels():
    graph = Graph(3)
    source = graph.input(5, 12)
    q, k = (graph.norm(graph.add_linear(source, None, 2 * 2112), NormMode.RMS, groups=2) for _ in range(2))
    graph.add_linear(graph.attention(q, k, graph.linear(source, 2 * 2112), 2, 2), None, 3)
    compiled = program(graph, Config(**LARGE.to_dict() | {"depth": 64}))
    norms = [work.instruction.channels for work in works(compiled, compiled.steps[0])
             if work.instruction.opcode is Opcode.NORM]
    assert norms == 4 * [2112]
    compare(compiled, graph.integers(2))
