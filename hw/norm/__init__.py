"""The NORM engine: rows of the residual stream to normalised, requantised int8."""

from .unit import NormUnit

__all__ = ["NormUnit"]
