"""Which experts the routers of a model choose."""

import numpy as np

from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.quantised import Route

from .device import Progress, runs
from .torch_path import TorchDevice

__all__ = ["Chooser", "chosen_experts"]

# Of a run, the frames that it works on one after another: by the name of the router, int64
# [frames * rows, chosen].
Choices = dict[str, np.ndarray]


def chosen_experts(program: Program, step: DeviceStep,
                   inputs: dict[str, np.ndarray]) -> list[Choices]:
    """The chosen experts of each run, which are the same on every device.

    inputs : as `moeware.runtime.device.Device.run` takes them.
    """
    chooser = Chooser()
    chooser.run(program, step, inputs)
    return [choices for _, choices in chooser.choices]


class Chooser(TorchDevice):
    """PyTorch, as a device that also keeps, in `choices`, each step that it ran and the chosen
    experts, run by run."""

    def __init__(self, **options):
        super().__init__(**options)
        self.choices: list[tuple[DeviceStep, Choices]] = []

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
            probes: bool = False, progress: Progress | None = None) -> dict[str, np.ndarray]:
        results = super().run(program, step, inputs, probes=True, progress=progress)
        routes = {op.name: np.asarray(results[op.output])[..., 0] for op in step.operations
                  if isinstance(op, Route)}
        frames = len(next(iter(inputs.values())))
        self.choices += [(step, {name: np.concatenate(chosen[batch])
                                 for name, chosen in routes.items()})
                         for batch in runs(frames, step.frames)]
        return results
