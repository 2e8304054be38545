"""The reusable linear unit: the engine that executes LINEAR."""

from .unit import LinearUnit

__all__ = ["LinearUnit"]
