"""The streaming attention unit."""

from .unit import AttentionUnit

__all__ = ["AttentionUnit"]
