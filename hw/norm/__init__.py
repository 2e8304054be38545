"""The NORM engine: rows of the residual memory to normalised, perhaps turned, requantised int8."""

from .unit import NormUnit

__all__ = ["NormUnit"]
