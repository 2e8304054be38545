"""Which experts the routers of a model choose."""

import numpy as np

from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.quantised import Route

__all__ = ["chosen_experts"]


def chosen_experts(program: Program, step: DeviceStep,
                   inputs: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Of each frame, the chosen experts of every router by its name, int64 [rows, chosen].

    inputs : as `moeware.runtime.device.Device.run` takes them. The integers are PyTorch's, which are
    those of every device.
    """
    frames = len(next(iter(inputs.values())))
    routes = {op.name: op.output for op in step.operations if isinstance(op, Route)}
    if not routes:
        return [{} for _ in range(frames)]
    from .torch_path import TorchDevice  # programs without routers do without it
    found = TorchDevice().run(program, step, inputs, probes=True)
    return [{name: np.asarray(found[tensor][frame][..., 0]) for name, tensor in routes.items()}
            for frame in range(frames)]
