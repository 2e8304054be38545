"""Moving words between DRAM and the on-chip memories."""

from .load import LoadEngine
from .share import ReadShare
from .store import StoreEngine

__all__ = ["LoadEngine", "ReadShare", "StoreEngine"]
