"""Which experts the routers of a model choose."""

import numpy as np

from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.quantised import Route

from .device import Progress
from .torch_path import TorchDevice

__all__ = ["Chooser", "chosen_experts"]

Choices = dict[str, np.ndarray]  # of a frame: by the name of the router, int64 [rows, chosen]


def chosen_experts(program: Program, step: DeviceStep,
                   inputs: dict[str, np.ndarray]) -> list[Choices]:
    """The chosen experts of each frame, which are the same on every device.

    inputs : as `moeware.runtime.device.Device.run` takes them.
    """
    chooser = Chooser()
    chooser.run(program, step, inputs)
    return [choices for _, choices in chooser.choices]


class Chooser(TorchDevice):
    """PyTorch, as a device that also keeps, in `choices`, each step that it ran and the chosen
    experts, frame by frame."""

    def __init__(self, **options):
        super().__init__(**options)
        self.choices: list[tuple[DeviceStep, Choices]] = []

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
            probes: bool = False, progress: Progress | None = None) -> dict[str, np.ndarray]:
        results = super().run(program, step, inputs, probes=True, progress=progress)
        routes = {op.name: np.asarray(results[op.output])[..., 0] for op in step.operations
                  if isinstance(op, Route)}
        frames = len(next(iter(inputs.values())))
        self.choices += [(step, {name: chosen[frame] for name, chosen in routes.items()})
                         for frame in range(frames)]
        return results
