"""What tests of the golden device start from."""

import random

import numpy as np
import pytest

from moeware.sim.golden import Machine

from .golden_machine import CONFIG


@pytest.fixture
def draw():
    return random.Random(1)


@pytest.fixture
def machine():
    """A machine whose memories hold random numbers."""
    made = Machine(CONFIG, np.zeros(1 << 14, np.uint8))
    draw = np.random.default_rng(2)
    made.activation[:] = draw.integers(-128, 128, made.activation.shape)
    made.residual[:] = draw.integers(-20000, 20000, made.residual.shape)
    made.weight[:] = draw.integers(-128, 128, made.weight.shape)
    made.table[:] = draw.integers(-128, 128, made.table.shape)
    made.param["bias"] = draw.integers(-9000, 9000, made.param.shape)
    made.param["multiplier"] = draw.integers(20000, 65536, made.param.shape)
    made.param["shift"] = draw.integers(18, 24, made.param.shape)
    return made
