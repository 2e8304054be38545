"""A program against the float model that it was compiled from, layer by layer.

Both run freely: each layer reads what the layers before it made, so errors add up as they do in use.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeware.hw.arch.grid import Grid
from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.quantised import Route
from moeware.runtime.device import open_device
from moeware.runtime.feeds import check_feeds, take_choice
from moeware.runtime.session import Session

__all__ = ["Accuracy", "RouterAccuracy", "TensorAccuracy", "compare"]

BATCH = 32  # frames at once


@dataclass(frozen=True)
class TensorAccuracy:
    """A value of the model, over all frames.

    layer : the canonical node that computes it; operator; source : the first node of the user's file
    that this is; rms : root mean square of the float value, less what its channels have in common
    where the integers leave that out (see `Grid`); rms_error : of the difference to it.
    """

    layer: str
    operator: str
    source: str
    rms: float
    rms_error: float

    @property
    def snr_db(self) -> float:
        """Signal to noise, 20 log10(rms / rms_error); infinite without an error."""
        if not self.rms_error:
            return math.inf
        return 20 * math.log10(self.rms / self.rms_error) if self.rms else -math.inf

    def is_bad(self, least_snr_db: float, least_agreement: float) -> bool:
        return self.snr_db < least_snr_db


@dataclass(frozen=True)
class RouterAccuracy:
    """A router, over all tokens of all frames.

    layer, operator, source : as of `TensorAccuracy`; tokens : share of those with the same set of
    chosen experts as in float; choices : share of the single choices that float makes, too.
    """

    layer: str
    operator: str
    source: str
    tokens: float
    choices: float

    def is_bad(self, least_snr_db: float, least_agreement: float) -> bool:
        return self.tokens < least_agreement


@dataclass(frozen=True)
class Accuracy:
    """Every layer in order of computation; outputs that the host computes come last.

    least_snr_db, least_agreement : below which a layer counts as degraded.
    """

    layers: tuple[TensorAccuracy | RouterAccuracy, ...]
    frames: int
    least_snr_db: float
    least_agreement: float

    @property
    def tensors(self) -> list[TensorAccuracy]:
        return [layer for layer in self.layers if isinstance(layer, TensorAccuracy)]

    @property
    def routers(self) -> list[RouterAccuracy]:
        return [layer for layer in self.layers if isinstance(layer, RouterAccuracy)]

    @property
    def degraded(self) -> TensorAccuracy | RouterAccuracy | None:
        """The first layer below a limit; None where there is none."""
        return next((layer for layer in self.layers
                     if layer.is_bad(self.least_snr_db, self.least_agreement)), None)

    def to_dict(self) -> dict:
        """As a value that ``json.dumps`` takes; an infinite signal to noise is None."""
        layers = []
        for layer in self.layers:
            facts = vars(layer).copy()
            if isinstance(layer, TensorAccuracy):
                facts["snr_db"] = layer.snr_db if math.isfinite(layer.snr_db) else None
            layers.append(facts)
        return {"frames": self.frames, "least_snr_db": self.least_snr_db,
                "least_agreement": self.least_agreement, "layers": layers,
                "degraded": self.degraded and self.degraded.layer}


def compare(model: str | os.PathLike, program: Program | str | os.PathLike,
            feeds: Mapping[str, np.ndarray | int], *, least_snr_db: float = 20.0,
            least_agreement: float = 0.9,
            progress: Callable[[int, int], None] | None = None) -> Accuracy:
    """Run a program's integers and the float model that it was compiled from on the same inputs.

    Parameters
    ----------
    model : the ONNX file.
    program : what it was compiled to, or that program's file.
    feeds : real inputs [frames, ...] by name, and the program's choices.
    least_snr_db, least_agreement : a layer below counts as degraded: noise of a tenth of the signal,
        and a token in ten with other experts.
    progress : called with frames done and frames in all.

    Raises
    ------
    FeedError
        Inputs that the program does not take.
    CompileError
        The ONNX file cannot be read.
    ValueError
        The program was not compiled from this model.
    """
    from moeware.compiler.canonical import sources
    from moeware.compiler.fuse import fuse
    from moeware.compiler.interface import Interface
    from moeware.compiler.load import load
    from moeware.compiler.reference import evaluate
    if not isinstance(program, Program):
        program = Program.load(program)
    choice, inputs = take_choice(program, feeds)
    frames = check_feeds(program, inputs)
    graph = fuse(load(Path(model), choice, Interface(**program.metadata.get("interface", {}))))
    sums = _Sums(program, choice)
    _check_model(graph, sums, program, str(model))
    for start in range(0, frames, BATCH):
        batch = {name: array[start:start + BATCH] for name, array in inputs.items()}
        real: dict[str, np.ndarray] = {}
        real |= evaluate(graph, batch, real.__setitem__)
        sums.add(real, batch | choice)
        if progress is not None:
            progress(min(start + BATCH, frames), frames)
    layers = [sums.result(str(value.name), (str(node.name), node.op_type,
                                            next(iter(sources(node)), str(node.name))))
              for node in graph.graph for value in node.outputs]
    order = [layer for layer in layers if layer is not None]
    return Accuracy(tuple(order), frames, least_snr_db, least_agreement)


def _check_model(graph, sums: "_Sums", program: Program, model: str) -> None:
    known = {str(value.name): value for node in graph.graph for value in node.outputs}
    for name in sums.names():
        if name not in known:
            raise ValueError(f"Program must be compiled from {model}, not from "
                             f"{program.metadata.get('model', 'another model')}: the model has no "
                             f"value {name!r}")
    for name, shape, _ in program.outputs:
        found = tuple(known[name].shape)[1:] if name in known else None
        if found != tuple(shape):
            raise ValueError(f"Program must be compiled from {model}: its output {name!r} has the "
                             f"shape {list(shape)}, the model's {found}")


class _Probed:
    """PyTorch, as a device that keeps every tensor of the steps that it ran."""

    def __init__(self):
        self._device = open_device("torch", None)
        self.name, self.config, self.counters = self._device.name, None, []
        self.values: dict[str, np.ndarray] = {}

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray],
            **options) -> dict[str, np.ndarray]:
        found = self._device.run(program, step, inputs, **options | {"probes": True})
        self.values |= inputs | found
        return found


class _Sums:
    """Powers of signals and errors, and counts of equal choices, batch by batch."""

    def __init__(self, program: Program, choice: dict[str, int]):
        steps = [step for step in program.steps_of(choice) if isinstance(step, DeviceStep)]
        self.grids: dict[str, Grid] = {name: grid for step in steps
                                       for name, grid in step.grids.items()}
        self.routes = {op.output for step in steps for op in step.operations
                       if isinstance(op, Route)}
        self.outputs = {name for name, _, kind in program.outputs
                        if name not in self.grids and kind == "tensor(float)"}
        self.device = _Probed()
        self.session = Session(program, self.device)
        self.totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))

    def names(self) -> set[str]:
        """Values that are compared."""
        return {*self.grids, *self.routes, *self.outputs}

    def add(self, real: dict[str, np.ndarray], feeds: Mapping[str, np.ndarray | int]) -> None:
        """A batch: the float model's values by name, and its inputs."""
        results = self.session.run(None, feeds)
        outputs = dict(zip([name for name, _, _ in self.session.program.outputs], results))
        for name, grid in self.grids.items():
            found = grid.varying(self.device.values)
            self._add_powers(name, grid.wanted(real[name].reshape(*found.shape[:2], -1)), found)
        for name in self.outputs:
            self._add_powers(name, real[name].astype(np.float64), outputs[name])
        for name in self.routes:
            found = self.device.values[name][..., 0]
            wanted = real[name].reshape(found.shape)
            same = (found[..., :, None] == wanted[..., None, :]).any(-1)
            self.totals[name] += same.all(-1).sum(), same.mean(-1).sum(), found[..., 0].size

    def _add_powers(self, name: str, wanted: np.ndarray, found: np.ndarray) -> None:
        self.totals[name] += (np.square(wanted).sum(), np.square(found - wanted).sum(),
                              wanted.size)

    def result(self, name: str, place: tuple[str, str, str]
               ) -> TensorAccuracy | RouterAccuracy | None:
        """Of a value; None where it is not compared."""
        if name not in self.totals:
            return None
        first, second, count = self.totals[name].tolist()
        if name in self.routes:
            return RouterAccuracy(*place, tokens=first / count, choices=second / count)
        return TensorAccuracy(*place, rms=math.sqrt(first / count),
                              rms_error=math.sqrt(second / count))
