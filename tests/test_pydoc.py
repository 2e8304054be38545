"""The bundled language model: where it runs, what it loses to integers, the same integers everywhere."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import moeware
from moeware.cli.simulate import compare
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.golden import GoldenDevice
from moeware.sim.rtl import RtlDevice

FOLDER = Path(__file__).parents[1] / "examples" / "pydoc"
MODEL, SAMPLES = FOLDER / "pydoc.onnx", FOLDER / "pydoc_samples.npz"


@pytest.fixture(scope="module")
def samples():
    with np.load(SAMPLES) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def program():
    return moeware.compile(MODEL, FOLDER / "config.json", SAMPLES)


def nats(logits: np.ndarray, following: np.ndarray) -> float:
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(np.take_along_axis(log, following[..., None], -1).mean())


def test_all_products_are_on_the_accelerator(program):
    partition = program.metadata["partition"]
    assert partition["fpga_mac_share"] == 1.0
    assert [node["operator"] for node in partition["host"]] == ["Gather"]


def test_integers_cost_little(program, samples):
    """Half a per cent of 1.1 nats: what int8 may cost."""
    real = onnxruntime.InferenceSession(MODEL).run(None, {"ids": samples["ids"]})[0]
    integer, = moeware.Session(program, "torch").run(None, {"ids": samples["ids"]})
    assert nats(real, samples["next"]) < 1.2  # it has learned something
    assert nats(integer, samples["next"]) - nats(real, samples["next"]) < 0.006


def test_every_layer_is_equal_on_gateware(samples):
    """Turned queries and gated experts on one accelerator, sequences back to back."""
    traced = moeware.compile(MODEL, FOLDER / "config.json", SAMPLES, trace=True)
    devices = {"RTL": RtlDevice(traced.config), "golden": GoldenDevice(), "PyTorch": TorchDevice()}
    found = compare(traced, devices, {"ids": samples["ids"][:2]})
    assert found["equal"], found["text"]
    assert found["values"] > 2 * 100_000


def test_a_character_hears_nothing_of_later_ones(program, samples):
    session, ids = moeware.Session(program, "torch"), samples["ids"][:2].copy()
    before, = session.run(None, {"ids": ids})
    ids[:, 40:] = ids[:, 40:][:, ::-1]
    after, = session.run(None, {"ids": ids})
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert (before[:, 40:] != after[:, 40:]).any()
