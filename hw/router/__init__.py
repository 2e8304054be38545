"""The router: logits of the gate to queues of tokens, one for each expert."""

from .unit import Router

__all__ = ["Router"]
