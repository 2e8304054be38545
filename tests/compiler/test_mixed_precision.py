"""Bits of experts under a budget: the least sum there is, and what it is worth on a trained model."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import moeware
from moeware.compiler.errors import CompileError
from moeware.compiler.mixed_precision import WIDTHS, allocate_bits
from moeware.hw.arch.config import Config
from moeware.hw.arch.quantised import Experts
from moeware.runtime.session import Session
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.golden import GoldenDevice

from ..hw.arch.configs import CONFIGS
from . import exports

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
MODEL, SAMPLES = FOLDER / "digits.onnx", FOLDER / "digits_samples.npz"
WIDE = replace(CONFIGS[0], narrow=0)


@dataclass
class Layer:
    """What `allocate_bits` asks an `ExpertLayer`. errors : [experts, widths]."""

    name: str
    errors: np.ndarray
    tokens: np.ndarray
    expert_weights: int = 100
    fixed: list = None

    def __post_init__(self):
        self.fixed = self.fixed or [None] * len(self.tokens)

    def error(self, expert: int, bits: int) -> float:
        return float(self.errors[expert, WIDTHS.index(bits)])


def drawn(seed: int, experts=(3, 2), **fields) -> list[Layer]:
    draw = np.random.default_rng(seed)
    return [Layer(f"Experts_{n}", np.sort(draw.lognormal(size=(count, 3)), 1),
                  draw.integers(0, 50, count), int(draw.integers(50, 500)), **fields)
            for n, count in enumerate(experts)]


def lost(layers: list[Layer], bits: dict[str, list[int]]) -> float:
    return sum(layer.error(e, b) * (layer.tokens[e] + 1) for layer in layers
               for e, b in enumerate(bits[layer.name]))


def average(layers: list[Layer], bits: dict[str, list[int]]) -> float:
    sizes = {layer.name: layer.expert_weights for layer in layers}
    return (sum(sizes[name] * sum(each) for name, each in bits.items())
            / sum(sizes[name] * len(each) for name, each in bits.items()))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [2, 2.3, 3, 4.7, 8])
def test_no_other_choice_within_the_budget_loses_less(seed, budget):
    layers = drawn(seed)
    found = allocate_bits(layers, budget, WIDE, 1)
    assert average(layers, found.bits) <= budget * (1 + 1e-9)
    assert found.average == pytest.approx(average(layers, found.bits))
    assert found.error**2 == pytest.approx(lost(layers, found.bits))
    every = ({"Experts_0": bits[:3], "Experts_1": bits[3:]}
             for bits in itertools.product(WIDTHS, repeat=5))
    least = min(lost(layers, bits) for bits in every if average(layers, bits) <= budget * (1 + 1e-9))
    assert lost(layers, found.bits) <= least * (1 + 1e-4)  # the solver's own tolerance
    again = allocate_bits(drawn(seed), budget, WIDE, 1)
    assert again == found


def test_frequent_and_sensitive_experts_get_more():
    errors = np.array([[0, 1, 10.0]] * 4)
    found = allocate_bits([Layer("a", errors, np.array([100, 0, 5, 50]))], 3, WIDE, 10)
    assert found.bits == {"a": [4, 2, 2, 4]}
    errors[1] *= 1000
    found = allocate_bits([Layer("a", errors, np.array([100, 0, 5, 50]))], 3, WIDE, 10)
    assert found.bits == {"a": [4, 4, 2, 2]}


def test_experts_without_any_difference():
    found = allocate_bits([Layer("a", np.zeros((4, 3)), np.zeros(4, int))], 3, WIDE, 1)
    assert found.average <= 3 and found.error == 0
    found = allocate_bits([Layer("a", np.array([[1, 2, 3.0]]), np.array([7]))], 7.9, WIDE, 1)
    assert found.bits == {"a": [4]}  # one expert alone


def test_bits_of_single_experts_stay():
    layers = drawn(1, experts=(4,), fixed=[8, None, None, 2])
    found = allocate_bits(layers, 4, WIDE, 1)
    assert found.bits["Experts_0"][::3] == [8, 2] and found.average <= 4
    with pytest.raises(CompileError, match="must be 3.5 or more beside the bits that are given"):
        allocate_bits(layers, 3, WIDE, 1)


def test_variants_of_a_layer_get_one_choice():
    first, = drawn(2, experts=(5,))
    second = replace(first, errors=first.errors[::-1], tokens=first.tokens[::-1])
    found = allocate_bits([first, second], 3, WIDE, 1)
    assert list(found.bits) == ["Experts_0"] and len(found.bits["Experts_0"]) == 5
    both = replace(first, errors=(first.errors * (first.tokens + 1)[:, None]
                                  + second.errors * (second.tokens + 1)[:, None]) / 2,
                   tokens=np.zeros(5, int))
    assert allocate_bits([both], 3, WIDE, 1).bits == found.bits


@pytest.mark.parametrize("budget", [1.99, 8.01, -3, float("nan"), float("inf")])
def test_budgets_that_cannot_be(budget):
    with pytest.raises(CompileError, match="must be between 2 and 8, not"):
        allocate_bits(drawn(0), budget, WIDE, 1)


def test_ternary_weights_that_stay_two_to_a_byte_save_nothing():
    narrow = replace(WIDE, narrow=1)
    with pytest.raises(CompileError, match="must be between 4 and 8, as Config.narrow stores"):
        allocate_bits(drawn(0), 3, narrow, 1)
    found = allocate_bits(drawn(0), 5, narrow, 1)
    assert all(bits in (4, 8) for each in found.bits.values() for bits in each)


def test_a_model_without_experts():
    with pytest.raises(CompileError, match="must be given for a model with experts"):
        allocate_bits([], 3, WIDE, 1)


@pytest.mark.parametrize(("options", "message"), [
    (dict(expert_bits=3, bits={"experts": 4}), "as 4 of each or as 3 on average, not both"),
    (dict(expert_bits="3"), "must be a number, not '3'"),
    (dict(expert_bits=3, bits={"Experts_9": 4}), "must name layers of the model"),
])
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(CompileError, match=message):
        moeware.compile(MODEL, WIDE, SAMPLES, **options)


@pytest.fixture(scope="module")
def config() -> Config:
    return replace(moeware.find_config("ulx3s-85f"), narrow=0)


@pytest.fixture(scope="module")
def logits(config):
    """(program, logits of the held-out images) by the compiler's options; compiled once."""
    known = {}

    def run(**options):
        key = repr(options)
        if key not in known:
            program = moeware.compile(MODEL, config, SAMPLES, **options)
            known[key] = program, Session(program, TorchDevice()).run(None, {"image": images()})[0]
        return known[key]
    return run


def images() -> np.ndarray:
    with np.load(SAMPLES) as archive:
        return archive["images"]


def test_three_bits_lose_less_than_the_line_between_four_and_two(logits):
    exact = logits()[1]  # int8: what remains is from experts' weights alone
    error = {bits: np.linalg.norm(logits(bits={"experts": bits})[1] - exact) for bits in (4, 2)}
    program, mixed = logits(expert_bits=3.0)
    chosen = np.concatenate(list(program.metadata["expert_bits"]["layers"].values()))
    assert chosen.mean() <= 3
    mixed = np.linalg.norm(mixed - exact)
    assert mixed < (error[4] + error[2]) / 2
    # Against the same bits for other experts, on average over draws.
    draw, others = np.random.default_rng(0), []
    for _ in range(4):
        shuffled = draw.permutation(chosen)
        bits = {f"Experts_{n // 8}/expert{n % 8}": int(each) for n, each in enumerate(shuffled)}
        others.append(np.linalg.norm(logits(bits=bits)[1] - exact))
    assert mixed < np.mean(others)


@pytest.mark.parametrize(("bits", "points"), [(4, 1), (2, 2)])
def test_answers_with_narrow_experts(logits, bits, points):
    """The limits that the project sets itself: accuracy below that of float, in points."""
    with np.load(SAMPLES) as archive:
        labels = archive["labels"]
    model = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    real = (model.run(None, {"image": images()})[0].argmax(1) == labels).mean()
    found = (logits(bits={"experts": bits})[1].argmax(1) == labels).mean()
    assert 100 * (real - found) <= points


def test_the_expected_error_is_about_the_measured_one(logits):
    """Ternary, within a factor of three: an estimate to first order, from rows that the weights were
    fitted to, without what other choices of experts do (with 4 bits most of what there is)."""
    exact = logits()[1]
    expected = logits(expert_bits=3.0)[0].metadata["expert_bits"]["uniform_errors"]["2"]
    found = np.linalg.norm(logits(bits={"experts": 2})[1] - exact) / np.linalg.norm(exact)
    assert found / 3 < expected < 3 * found


def test_the_program_holds_the_bits_that_it_reports(logits):
    program, _ = logits(expert_bits=3.0)
    report = program.metadata["expert_bits"]
    operations = [op for op in program.steps[0].operations if isinstance(op, Experts)]
    assert {op.name: op.bits.tolist() for op in operations} == report["layers"]
    most = {8: 127, 4: 7, 2: 1}
    for op in operations:
        for expert, bits in enumerate(op.bits.tolist()):
            assert max(np.abs(op.up[expert]).max(), np.abs(op.down[expert]).max()) <= most[bits]
    weights = sum(op.up[0].size + op.down[0].size for op in operations for _ in op.bits) // 8
    assert report["bytes"] <= 3 * weights
    whole = len(logits()[0].image)
    # What leaves the image is what leaves the weights, up to padding of tiles.
    assert whole - len(program.image) == pytest.approx(8 * weights - report["bytes"], rel=0.1)


@pytest.mark.parametrize("options", [{"expert_bits": 3.0}, {"nested": True}])
def test_tasks_share_their_experts(options, tmp_path):
    """Whatever bits they get, so that the image holds them once."""
    path = exports.export(exports.Tasks("index"), tmp_path / "m.onnx", task=torch.tensor(0))
    samples = {"image": exports.example(64, seed=1)}
    sizes = []
    for tasks in ([0], [0, 1]):
        program = moeware.compile(path, WIDE, samples, choices={"task": tasks}, **options)
        for each in [program] + ([program.upper] if program.upper else []):
            found = [op for step in each.steps for op in step.operations if isinstance(op, Experts)]
            assert len(found) == len(tasks)
            for op in found:
                np.testing.assert_array_equal(op.up, found[0].up)
                np.testing.assert_array_equal(op.down, found[0].down)
            feeds = {"image": exports.example(2, seed=2), "task": tasks[-1]}
            golden, = Session(each, GoldenDevice()).run(None, feeds)
            np.testing.assert_array_equal(golden, Session(each, TorchDevice()).run(None, feeds)[0])
        sizes.append(len(program.image))
    assert sizes[1] < 1.5 * sizes[0]


def test_mixed_bits_are_exact_on_the_golden_device():
    program = moeware.compile(MODEL, WIDE, SAMPLES, expert_bits=3.2, trace=True)
    step, = program.steps
    found = compare(program, step, {"golden": GoldenDevice(), "PyTorch": TorchDevice()},
                    {port.tensor: port.quantise(images()[:3]) for port in step.inputs})
    assert found.equal, found
