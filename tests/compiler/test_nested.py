"""Nested experts: one file, 8 bits or the upper 4 of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moeware
from moeware.compiler.errors import CompileError
from moeware.compiler.rounding import inputs_covariance, nested, rounded
from moeware.hw.arch.nested import upper_half
from moeware.hw.arch.program import Program, ProgramError
from moeware.hw.arch.quantised import Experts
from moeware.runtime.session import Session
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.golden import GoldenDevice

from ..hw.arch.configs import CONFIGS
from .test_rounding import as_wanted, correlated, error

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
MODEL, SAMPLES = FOLDER / "digits.onnx", FOLDER / "digits_samples.npz"
CONFIG = CONFIGS[0]


def images() -> np.ndarray:
    with np.load(SAMPLES) as archive:
        return archive["images"][:60]


@pytest.fixture(scope="module")
def program() -> Program:
    return moeware.compile(MODEL, CONFIG, SAMPLES, nested=True, trace=True)


def experts(program: Program) -> list[Experts]:
    return [op for op in program.steps[0].operations if isinstance(op, Experts)]


def test_upper_halves():
    every = np.arange(-128, 128).astype(np.int8)
    found = upper_half(every)
    assert found.dtype == np.int8 and found.min() == -8 and found.max() == 7
    assert (np.abs(16.0 * found - every)[:-8] <= 8).all()
    assert found[[0, 7, 8, 128 + 7, 128 + 8, 255]].tolist() == [-8, -8, -7, 0, 1, 7]


def test_both_widths_are_near_to_the_best_of_their_own():
    rows = correlated(1000, 48)
    _, covariance = inputs_covariance(rows)
    weight = np.random.default_rng(1).normal(size=(30, 48))
    integer, step = nested(weight, covariance, as_wanted)
    assert integer.min() >= -120 and integer.max() <= 119
    upper = upper_half(integer.astype(np.int8))
    assert np.abs(upper).max() <= 7
    alone = error(weight, *rounded(weight, 7, covariance, as_wanted), covariance).sum()
    half = error(weight, upper, 16 * step, covariance).sum()
    whole = error(weight, integer, step, covariance).sum()
    assert half < 2 * alone and whole < alone / 4


def test_zero_channels():
    weight = np.zeros((2, 5))
    weight[1, 2] = 1
    integer, step = nested(weight, None, as_wanted)
    assert not integer[0].any() and integer[1, 2] * step[1] == pytest.approx(1, rel=0.02)


def test_the_smaller_experts_are_the_upper_halves(program):
    for whole, half in zip(experts(program), experts(program.upper), strict=True):
        assert set(whole.bits) == {8} and set(half.bits) == {4}
        for name in ("up", "down"):
            np.testing.assert_array_equal(getattr(half, name), upper_half(getattr(whole, name)))
            assert np.abs(getattr(half, name)).max() == 7
        np.testing.assert_array_equal(whole.table, half.table)
    assert len(program.upper.image) < len(program.image)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, narrow=1, outputs=8)])
def test_a_file_holds_both_exactly_and_weights_once(program, config, tmp_path):
    if config != CONFIG:
        program = moeware.compile(MODEL, config, SAMPLES, nested=True)
    program.save(tmp_path / "nested.moe")
    loaded = Program.load(tmp_path / "nested.moe")
    for mine, theirs in ((program, loaded), (program.upper, loaded.upper)):
        assert mine.image == theirs.image and mine.steps[0].entry == theirs.steps[0].entry
        for one, other in zip(experts(mine), experts(theirs), strict=True):
            for name in ("up", "down", "bits"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            np.testing.assert_array_equal(one.up_affine.bias, other.up_affine.bias)
    if not config.narrow:  # there tiles of 4 bits are others than those of 8
        replace(program, upper=None).save(tmp_path / "whole.moe")
        program.upper.save(tmp_path / "upper.moe")
        sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.moe")}
        assert sizes["nested"] < sizes["whole"] + 0.2 * sizes["upper"]


def test_sessions_choose(program, tmp_path):
    program.save(tmp_path / "nested.moe")
    feeds, outputs = {"image": images()}, {}
    for bits in (None, 8, 4):
        session = moeware.Session(tmp_path / "nested.moe", "torch", expert_bits=bits)
        outputs[bits], = session.run(None, feeds)
    np.testing.assert_array_equal(outputs[None], outputs[8])
    separate = moeware.compile(MODEL, CONFIG, SAMPLES)
    exact, = Session(separate, TorchDevice()).run(None, feeds)
    size = np.linalg.norm(exact)
    assert np.linalg.norm(outputs[8] - exact) < np.linalg.norm(outputs[4] - exact) < 0.05 * size
    with pytest.raises(ProgramError, match="must be 8 or 4, .* not 2"):
        moeware.Session(program, "torch", expert_bits=2)
    with pytest.raises(ProgramError, match="not 4: compile it so"):
        moeware.Session(separate, "torch", expert_bits=4)


def test_both_are_exact_on_the_golden_device(program):
    for each in (program, program.upper):
        step, = each.steps
        found = compare(each, step, {"golden": GoldenDevice(), "PyTorch": TorchDevice()},
                        {port.tensor: port.quantise(images()[:2]) for port in step.inputs})
        assert found.equal, found


@pytest.mark.parametrize("options", [{"bits": {"experts": 4}}, {"bits": {"Experts_0/expert3": 4}},
                                     {"expert_bits": 3.0}])
def test_other_bits_of_experts_do_not_go_with_it(options):
    with pytest.raises(CompileError, match="leave one of them out"):
        moeware.compile(MODEL, CONFIG, SAMPLES, nested=True, **options)


def test_a_model_without_experts(tmp_path):
    from .exports import example, export, vit
    path = export(vit(), tmp_path / "dense.onnx")
    with pytest.raises(CompileError, match="must be on the accelerator for nested weights"):
        moeware.compile(path, CONFIG, {"image": example(8)}, nested=True)
