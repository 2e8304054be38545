"""A whole inference on the simulated board: the program loads through the serial line's wires, runs
from the SDRAM chip's pins, and the answer comes back the same way."""

import numpy as np
import pytest

from moeware.runtime.board_device import BoardDevice
from moeware.runtime.serial_link import SerialLink
from moeware.runtime.session import Session
from moeware.sim.board_device import SimulatedBoard
from moeware.sim.golden import GoldenDevice

from ..compiler.lowering import program, transformer
from ..hw.arch.configs import config

CONFIG = config(2, 4, 4, 1, 2, 8, activation_words=512, residual_words=512, weight_words=256,
                param_words=256, row_words=32, max_rows=16, max_experts=4, max_chosen=2, queue=2)


@pytest.fixture(scope="module")
def linked():
    board = SimulatedBoard(CONFIG)
    with SerialLink(board.transport, timeout_s=120) as link:
        yield board, link


def test_every_layer_of_two_images_is_as_in_the_golden_device(linked):
    _, link = linked
    graph = transformer(11, tokens=6, depth=10, width=6, heads=2, hidden=9, experts=4, chosen=2)
    compiled = program(graph, CONFIG)
    step, inputs = compiled.steps[0], graph.integers(2)
    device = BoardDevice(link, CONFIG, name="simulated board", timeout_s=120)
    found = device.run(compiled, step, inputs, probes=True)
    expected = GoldenDevice().run(compiled, step, inputs, probes=True)
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_array_equal(found[tensor], values, tensor)
    assert all(frame["cycles"] > 1000 for frame in device.counters)


def test_a_session_answers_floats(linked):
    _, link = linked
    graph = transformer(12, tokens=3, depth=4, width=4, heads=1, hidden=5, experts=2, chosen=1)
    compiled = program(graph, CONFIG, trace=False)
    port = compiled.steps[0].inputs[0]
    feeds = {port.name: np.random.default_rng(0).normal(size=(2, *port.shape)).astype(np.float32)}
    board = Session(compiled, BoardDevice(link, CONFIG, timeout_s=120))
    for got, expected in zip(board.run(None, feeds), Session(compiled, "golden").run(None, feeds)):
        np.testing.assert_array_equal(got, expected)
