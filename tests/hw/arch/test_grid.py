"""Integers back to the values that they stand for."""

import numpy as np

from moeware.hw.arch.grid import Grid

INTEGERS = {"after": np.array([[[9, 9, 9], [1, -2, 3], [4, 5, -128]]]),
            "before": np.array([[[7, 7, 7], [1, 1, 1], [0, -1, 127]]])}
VALUE = np.array([[[10.0, 20.0], [30.0, 40.0]]])  # two rows of two channels


def test_a_part_of_a_tensor():
    grid = Grid(tensor="after", step=0.5, offset=0.25, gain=np.array([2.0, 0.0, -4.0]), first_row=1,
                rows=2)
    assert grid.varying(INTEGERS).tolist() == [[[1.5, 0, -7], [4.5, 0, 255]]]


def test_what_was_added_to_a_tensor():
    grid = Grid(tensor="after", base="before", step=0.5, rows=3)
    assert grid.varying(INTEGERS).tolist() == [[[1, 1, 1], [0, -1.5, 1], [2, 3, -127.5]]]


def test_the_wanted_value_has_the_tensors_channels_and_no_shift():
    grid = Grid(tensor="after", step=1.0, rows=2, columns=np.array([1, 1, 0]),
                shift=np.array([20.0, 40.0, 0.0]))
    assert grid.wanted(VALUE).tolist() == [[[0, -20, 10], [20, 0, 30]]]
    assert (Grid(tensor="after", step=1.0, rows=2).wanted(VALUE) == VALUE).all()
