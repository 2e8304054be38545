"""How integers stand for the values of the float model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Grid"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A value of the float model in a device step:
    ``real = gain * (step * integer + offset) + shift`` for each channel.

    tensor : name in the quantised graph; base : the tensor that is subtracted first, where the value
    was added to the residual stream; first_row, rows : the part of the tensor that the value is.
    gain, shift : float64 [channels] of the tensor, or None for 1 and 0. shift is what a channel has
    in common over the rows and the integers leave out (a normalisation's shift, a bias that attention
    does not see). columns : int64, the value's channel that each channel of the tensor is, or None
    where they are the same.
    """

    tensor: str
    step: float
    offset: float = 0.0
    gain: np.ndarray | None = None
    shift: np.ndarray | None = None
    columns: np.ndarray | None = None
    base: str | None = None
    first_row: int = 0
    rows: int

    def varying(self, integers: Mapping[str, np.ndarray]) -> np.ndarray:
        """The value less its shift, float64 [frames, rows, channels], of the tensors' integers
        [frames, rows, channels] by name."""
        part = slice(self.first_row, self.first_row + self.rows)
        steps = integers[self.tensor][:, part].astype(np.float64)
        if self.base is not None:
            steps = steps - integers[self.base][:, part]
        real = self.step * steps + self.offset
        return real if self.gain is None else real * self.gain

    def wanted(self, real: np.ndarray) -> np.ndarray:
        """What `varying` would be if nothing were rounded, of the float value [frames, rows,
        channels]."""
        real = real.astype(np.float64)
        if self.columns is not None:
            real = real[..., self.columns]
        return real if self.shift is None else real - self.shift
