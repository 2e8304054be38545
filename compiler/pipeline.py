"""From a model to a program: the stages, one after the other.

``load -> fuse -> partition -> calibrate -> quantise -> tile -> schedule -> allocate -> emit``.
Partition stands before calibrate because grids are chosen for what runs on the accelerator.
"""

import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from moeware.compiler import canonical
from moeware.compiler.allocate import allocate
from moeware.compiler.calibrate import Calibration, calibrate, check_samples, merged
from moeware.compiler.choices import Choices, check_choices, combinations, require_alike
from moeware.compiler.emit import emit
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.interface import Interface
from moeware.compiler.kept import Kept
from moeware.compiler.load import load
from moeware.compiler.lowered import Lowered
from moeware.compiler.mixed_precision import Allocation, allocate_bits
from moeware.compiler.partition import OPTIONS, partition
from moeware.compiler.placement import describe, report
from moeware.compiler.precision import Precision
from moeware.compiler.quantise import QuantisedStep, quantise
from moeware.compiler.schedule import schedule
from moeware.compiler.tile import PLANS, tile
from moeware.compiler.verify import verify_addresses, verify_order, verify_quantised
from moeware.hw.arch.config import Config
from moeware.hw.arch.program import HostStep, Program

__all__ = ["STAGES", "compile_model", "model_ports"]

Ports = list[tuple[str, tuple[int, ...], str]]
Progress = Callable[[str, int, int], None]  # stage, number from 1, stages in all

TYPES = {"FLOAT": "tensor(float)", "DOUBLE": "tensor(double)", "INT8": "tensor(int8)",
         "UINT8": "tensor(uint8)", "INT32": "tensor(int32)", "INT64": "tensor(int64)",
         "BOOL": "tensor(bool)"}


@dataclass
class State:
    """What the stages hand on; every stage fills in what it makes.

    models : one for each of `combinations(choices)`; quantised : the steps of all of them; upper : the
    same with the upper halves of nested weights.
    """

    path: Path
    config: Config
    samples: dict[str, np.ndarray]
    trace: bool = False
    frames: int = 1
    bits: Mapping[str, int] = field(default_factory=dict)
    expert_bits: float | None = None
    nested: bool = False
    choices: dict[str, list[int]] = field(default_factory=dict)
    interface: Interface = field(default_factory=Interface)
    models: list[ir.Model] = field(default_factory=list)
    inputs: Ports = field(default_factory=list)
    outputs: Ports = field(default_factory=list)
    placement: str = ""
    report: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)  # what `Kept.report` says
    calibration: Calibration | None = None
    allocation: Allocation | None = None
    quantised: list[QuantisedStep | HostStep] = field(default_factory=list)
    upper: list[QuantisedStep | HostStep] = field(default_factory=list)
    lowered: list[Lowered] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)  # by device step
    program: Program | None = None


def _load(state: State) -> None:
    state.models = [load(state.path, choice, state.interface)
                    for choice in combinations(state.choices)]


def _fuse(state: State) -> None:
    state.models = [fuse(model) for model in state.models]
    for model in state.models:
        canonical.verify(model)
    require_alike(state.models, combinations(state.choices))
    state.inputs, state.outputs = model_ports(state.models[0])


def _partition(state: State) -> None:
    parts = partition(state.models[0], state.config)
    state.placement, state.report = describe(parts), report(parts)


def _calibrate(state: State) -> None:
    if not state.samples:
        raise CompileError("Calibration data must hold real inputs of the model, not nothing: give "
                           "an .npz file or a folder (--calibration)")
    samples = check_samples(state.samples, state.inputs)
    state.calibration = merged([calibrate(model, samples) for model in state.models])


def _quantise(state: State) -> None:
    state.quantised = []
    precision, layers = Precision(state.bits, state.expert_bits, state.nested), []
    kept = Kept.joined([Kept.of(model) for model in state.models])
    variants = [partition(model, state.config).steps for model in state.models]
    for choice, parts in zip(combinations(state.choices), variants):
        for part, *alike in zip(parts, *variants, strict=True):
            if part.kind == "host":
                step = HostStep(model=part.model, inputs=list(part.inputs),
                                outputs=list(part.outputs),
                                reasons={name: f"{reason.rule}; {reason.remedy}"
                                         for name, reason in part.reasons.items()})
            else:
                step = quantise(part.nodes, part.inputs, part.outputs, state.calibration, precision,
                                [each.nodes for each in alike], kept)
                layers += step.layers
            step.choice = choice
            state.quantised.append(step)
    precision.check()
    if state.expert_bits is not None:
        state.allocation = allocate_bits(
            layers, state.expert_bits, state.config, state.calibration.frames * len(state.models))
    if state.nested:
        if not layers:
            raise CompileError("Experts must be on the accelerator for nested weights: this model has "
                               "none there (`moeware check` says why)")
        state.upper = [step.settle_nested() if isinstance(step, QuantisedStep) else step
                       for step in state.quantised]
    for step in _device(state):
        step.settle(state.allocation.bits if state.allocation else {})
    for step in [*state.quantised, *state.upper]:
        if isinstance(step, QuantisedStep):
            verify_quantised(step)
    kept.settle(variants[0])
    state.kept = kept.report()


def _tile(state: State) -> None:
    state.lowered = [tile(step, state.config, trace=state.trace, frames=state.frames)
                     for step in _device(state)]
    for lowered in state.lowered:
        verify_order(lowered)


def _schedule(state: State) -> None:
    for lowered in state.lowered:
        schedule(lowered, state.config)
        verify_order(lowered)


def _allocate(state: State) -> None:
    state.plans = []
    for number, step in enumerate(_device(state)):
        for plan, leaner in zip(PLANS, [*PLANS[1:], None]):
            try:
                allocate(state.lowered[number], state.config)
                break
            except CompileError:
                if leaner is None:
                    raise
                state.lowered[number] = schedule(
                    tile(step, state.config, trace=state.trace, frames=state.frames, plan=leaner),
                    state.config)
        state.plans.append(str(plan))
        verify_addresses(state.lowered[number], state.config)


def _emit(state: State) -> None:
    image, dram_bytes, steps = emit(state.lowered, state.config,
                                    [step.choice for step in _device(state)])
    for step, source in zip(steps, _device(state), strict=True):
        step.grids = source.grids
    device = iter(steps)
    state.program = Program(
        config=state.config, image=image, dram_bytes=dram_bytes, placement=state.placement,
        steps=[step if isinstance(step, HostStep) else next(device) for step in state.quantised],
        inputs=state.inputs, outputs=state.outputs, choices=state.choices,
        metadata={"model": state.path.name, "partition": state.report,
                  "calibration_frames": state.calibration.frames,
                  "starved_experts": state.calibration.starved, "plans": state.plans,
                  "kept": state.kept, "interface": state.interface.to_dict(),
                  "expert_bits": state.allocation and state.allocation.to_dict()})
    if state.upper:
        half = replace(state, quantised=state.upper, upper=[])
        for name in ("tile", "schedule", "allocate", "emit"):
            STAGES[name](half)
        state.program.upper = half.program


def _device(state: State) -> list[QuantisedStep]:
    return [step for step in state.quantised if isinstance(step, QuantisedStep)]


STAGES: dict[str, Callable[[State], None]] = {
    "load": _load, "fuse": _fuse, "partition": _partition, "calibrate": _calibrate,
    "quantise": _quantise, "tile": _tile, "schedule": _schedule, "allocate": _allocate,
    "emit": _emit,
}


def compile_model(path: str | os.PathLike, config: Config, samples: dict[str, np.ndarray], *,
                  trace: bool = False, frames: int = 1, bits: Mapping[str, int] | None = None,
                  expert_bits: float | None = None, nested: bool = False,
                  choices: Choices | None = None, interface: Interface | None = None, dump: str | os.PathLike | None = None,
                  start: str = "load", stop: str = "emit",
                  progress: Progress | None = None) -> Program | None:
    """Compile an ONNX model.

    Parameters
    ----------
    path : the ONNX file.
    config : the accelerator that the program is for.
    samples : real inputs [frames, ...] by input name (see `calibrate.load_samples`).
    trace : the program stores every layer's result, so that devices can be compared.
    frames : that a run works on at once: weights cross the bus once for all of them, and attention
        of one is at work beside the products of another. Its latency is that of all.
    bits : of weights, by layer or kind, as `compiler.precision.Precision` takes them:
        ``{"experts": 4}`` halves the bytes that experts' weights move.
    expert_bits : average bits of all experts' weights, from 2 to 8: each expert gets 8, 4 or 2 of them
        such that the outputs lose least (see `mixed_precision`). Experts named in `bits` keep theirs.
    nested : experts have 8 bits of which the upper 4 are good weights, too: `Program.upper` is the
        program with these, and a file holds them once.
    choices : integer inputs of shape [] or [1] that are the same for a whole run, such as the task
        of a multi-task model, and the values that each may have: ``{"task": [0, 1]}``. A run takes
        one of them; they share all constants that are equal. Samples are calibrated with each.
    interface : sizes of axes that the file leaves open, inputs that are always the same, outputs to
        leave out.
    dump : folder that gets each stage's result; needed to resume.
    start, stop : first and last stage (names of `STAGES`); from a later `start` on, the stage
        before is read from `dump`.
    progress : called before each stage.

    Returns
    -------
    The program, or None where `stop` is before the last stage.

    Raises
    ------
    CompileError
        The model, the data or the configuration does not allow it.
    """
    names = list(STAGES)
    for name in (start, stop):
        if name not in STAGES:
            raise CompileError(f"Stage must be one of {', '.join(names)}, not {name!r}")
    first, last = names.index(start), names.index(stop)
    if first > last:
        raise CompileError(f"Stage {start!r} must not come after {stop!r}")
    state = State(Path(path), config, samples, trace, frames, bits or {}, expert_bits,
                  nested, check_choices(choices or {}), interface or Interface())
    if first:
        if dump is None:
            raise CompileError(f"Starting at {start!r} must have a dump folder to resume from")
        state = _resume(Path(dump), names[first - 1], state)
    for number in range(first, last + 1):
        if progress:
            progress(names[number], number + 1, len(names))
        STAGES[names[number]](state)
        if dump is not None:
            _dump(Path(dump), names[number], state)
    return state.program


def model_ports(model: ir.Model) -> tuple[Ports, Ports]:
    """Inputs and outputs of a canonical model: name, shape without the batch axis, type.

    Raises `CompileError` for a type that a session does not take.
    """
    def port(value: ir.Value) -> tuple[str, tuple[int, ...], str]:
        if value.dtype.name not in TYPES:
            raise CompileError(f"Type of {value.name!r} must be one of {', '.join(TYPES)}, not "
                               f"{value.dtype.name}: cast it in the model")
        if canonical.shape(value)[:1] != (1,):
            raise CompileError(f"First axis of {value.name!r} must be the batch, not one of the shape "
                               f"{list(canonical.shape(value))}: reshape it in the model")
        return str(value.name), canonical.shape(value)[1:], TYPES[value.dtype.name]
    return [port(v) for v in model.graph.inputs], [port(v) for v in model.graph.outputs]


def _dump(folder: Path, stage: str, state: State) -> None:
    """The models as ONNX, all else as a pickle beside them; complete files only."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        names = _model_names(state)
        for name, model in zip(names, state.models, strict=True):
            ir.save(model, Path(temporary) / name)
        rest = replace(state, models=[])
        (Path(temporary) / "state.pickle").write_bytes(pickle.dumps(rest))
        for name in (*names, "state.pickle"):
            os.replace(Path(temporary) / name, folder / f"{stage}.{name}")


def _model_names(state: State) -> list[str]:
    """Of the models in a dump: ``model.onnx``, those of further choices ``model1.onnx``, …"""
    return [f"model{number or ''}.onnx" for number in range(len(combinations(state.choices)))]


def _resume(folder: Path, stage: str, wanted: State) -> State:
    """The state after `stage`; a dump is the user's own file, like a pickle of theirs."""
    try:
        state = pickle.loads((folder / f"{stage}.state.pickle").read_bytes())
        state.models = [ir.load(folder / f"{stage}.{name}") for name in _model_names(state)]
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise CompileError(f"Dump folder {folder} must hold the stage {stage!r}: run the stages up "
                           f"to it with the same folder first ({error})") from error
    if state.config != wanted.config and list(STAGES).index(stage) >= list(STAGES).index("tile"):
        raise CompileError(f"Dump folder {folder} must be of the configuration "
                           f"{wanted.config.digest:#010x}, not {state.config.digest:#010x}: start "
                           "at tile")
    for option in sorted(set(OPTIONS.values())):
        had, has = getattr(state.config, option), getattr(wanted.config, option)
        if had != has and list(STAGES).index(stage) >= list(STAGES).index("partition"):
            raise CompileError(f"Dump folder {folder} must be of a configuration with {option} = "
                               f"{has}, not {had}: start at partition")
    for what in ("choices", "interface"):
        had, has = getattr(state, what), getattr(wanted, what)
        if had != has:
            raise CompileError(f"Dump folder {folder} must be of the {what} {has}, not {had}: start at "
                               "load")
    state.config, state.trace, state.path = wanted.config, wanted.trace, wanted.path
    state.frames, state.bits = wanted.frames, wanted.bits
    state.expert_bits, state.nested = wanted.expert_bits, wanted.nested
    return state
