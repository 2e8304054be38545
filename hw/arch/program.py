"""The program file: everything that a device or the PyTorch path needs to answer a model's inputs."""

import dataclasses
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import layout, nested, quantised
from .config import Config
from .grid import Grid
from .isa import Memory

__all__ = ["DeviceStep", "HostStep", "Port", "Probe", "Program", "ProgramError", "Region"]

FORMAT = b"moeware program 1\n"


class ProgramError(ValueError):
    """A program file that is not one, is damaged, or is of another version."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where rows of integers lie in DRAM: the words of an on-chip memory, row after row.

    memory : ACTIVATION (int8) or RESIDUAL (int16); a row has `groups` equal groups of channels (the
    heads of attention, else 1), and each group takes whole words: side by side in the residual
    memory as many channels as in the activation memory; room : channels that it takes words for, where
    they are more than it has. What fills up a group's last words is arbitrary. split : the rows of one group lie together, then those of the next, each from
    a multiple of `layout.ALIGNMENT` on. address : byte address, such a multiple, too.
    """

    memory: Memory
    rows: int
    channels: int
    address: int
    groups: int = 1
    split: bool = False
    room: int = 0

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.memory is Memory.ACTIVATION else "<i2")

    def words_per_row(self, config: Config) -> int:
        channels = max(self.channels // self.groups, self.room)
        if self.groups > 1 and not self.split:
            channels = -(-channels // config.depth) * config.depth
        group_bytes = channels * self.dtype.itemsize
        return self.groups * -(-group_bytes // layout.word_bytes(config, self.memory))

    @property
    def parts(self) -> int:
        """Pieces that are packed each for itself."""
        return self.groups if self.split else 1

    def part_bytes(self, config: Config) -> int:
        """Bytes in DRAM from one part to the next."""
        words = self.rows * self.words_per_row(config) // self.parts
        size = layout.beats(config, self.memory, words) * config.bus_bytes
        return size if self.parts == 1 else layout.aligned(size)

    def bytes(self, config: Config) -> int:
        """Bytes in DRAM."""
        return self.parts * self.part_bytes(config)

    def of_frame(self, config: Config, frame: int) -> "Region":
        """The same of a later frame of a run: frames lie one after another."""
        return dataclasses.replace(
            self, address=self.address + frame * layout.aligned(self.bytes(config)))

    def pack(self, config: Config, values: np.ndarray) -> bytes:
        """DRAM image of integers [rows, channels]."""
        words = self.words_per_row(config) * layout.word_bytes(config, self.memory)
        padded = np.zeros((self.rows, self.groups, words // self.groups // self.dtype.itemsize),
                          self.dtype)
        padded[:, :, :self.channels // self.groups] = values.reshape(self.rows, self.groups, -1)
        if self.split:
            padded = np.ascontiguousarray(padded.swapaxes(0, 1))
        pieces = padded.view(np.uint8).reshape(self.parts, -1)
        size = self.part_bytes(config)
        return b"".join(layout.pack(config, self.memory, piece).ljust(size, b"\0")
                        for piece in pieces)

    def unpack(self, config: Config, image: bytes) -> np.ndarray:
        """Inverse of `pack`: int64 [rows, channels]."""
        size, words = self.part_bytes(config), self.rows * self.words_per_row(config) // self.parts
        pieces = [layout.unpack(config, self.memory, image[size * part:], words)
                  for part in range(self.parts)]
        shape = (self.groups, self.rows, -1) if self.split else (self.rows, self.groups, -1)
        padded = np.stack(pieces).reshape(shape).view(self.dtype)
        if self.split:
            padded = padded.swapaxes(0, 1)
        values = padded[:, :, :self.channels // self.groups].astype(np.int64)
        return values.reshape(self.rows, self.channels)


@dataclass(frozen=True, kw_only=True)
class Port:
    """A tensor that enters or leaves a device step.

    name : in the model; tensor : in the quantised graph; shape : of the float tensor without its
    batch axis; scale, offset : an integer stands for ``scale * integer + offset``; split, order : how the float tensor becomes rows
    and channels: reshape to `split`, transpose by `order`, reshape to [rows, channels].
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    scale: float
    split: tuple[int, ...]
    order: tuple[int, ...]
    region: Region
    offset: float = 0.0

    def quantise(self, values: np.ndarray) -> np.ndarray:
        """Integers [frames, rows, channels] of float [frames, *shape]: nearest, ties to even.

        Raises
        ------
        ValueError
            A value that is NaN or infinite.
        """
        region = self.region
        info = np.iinfo(region.dtype)
        frames = len(values)
        axes = (0, *(1 + axis for axis in self.order))
        rows = np.asarray(values, np.float32).reshape(frames, *self.split).transpose(axes)
        rows = rows.reshape(frames, region.rows, region.channels)
        if not np.isfinite(rows).all():
            raise ValueError(f"Tensor {self.name!r} must be finite where it enters the accelerator, "
                             "but it holds NaN or infinity: look at what computes it")
        steps = np.rint((rows.astype(np.float64) - self.offset) / self.scale)
        return np.clip(steps, info.min, info.max).astype(region.dtype)

    def dequantise(self, integers: np.ndarray) -> np.ndarray:
        """Float32 [frames, *shape] of integers [frames, rows, channels]."""
        frames = len(integers)
        real = (np.asarray(integers, np.float64) * self.scale + self.offset).astype(np.float32)
        real = real.reshape(frames, *(self.split[axis] for axis in self.order))
        back = np.argsort(self.order)
        return real.transpose(0, *(1 + back)).reshape(frames, *self.shape)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A layer's result, stored in DRAM by a traced program, to be compared between devices."""

    name: str
    tensor: str
    region: Region


@dataclass(kw_only=True)
class DeviceStep:
    """A part of the model that the accelerator runs.

    frames : that a run works on, each with its own region of every port and probe (see
    `Region.of_frame`); entry : byte address of its first instruction; operations : the same in the
    quantised graph; macs : multiply-accumulates of a frame, experts counted as often as they are
    chosen; layers : names, as reports give them; layer_of : uint16 [instructions but END], the
    number of the layer that an instruction is of; choice : the values of the program's choices that
    the step is for; grids : what the integers stand for, by the name of the canonical value.
    """

    entry: int
    inputs: list[Port]
    outputs: list[Port]
    operations: list[quantised.Operation]
    probes: list[Probe] = field(default_factory=list)
    macs: int = 0
    frames: int = 1
    layers: list[str] = field(default_factory=list)
    layer_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    choice: dict[str, int] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)


@dataclass(kw_only=True)
class HostStep:
    """A part of the model that the host runs: an ONNX model with float inputs and outputs, and why
    each of its nodes is not on the accelerator. choice : as of `DeviceStep`."""

    model: bytes
    inputs: list[str]
    outputs: list[str]
    reasons: dict[str, str]
    choice: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Program:
    """A compiled model.

    image : the DRAM's contents from address 0: instructions, weights, parameters, constants;
    dram_bytes : what the program needs in all, with inputs, outputs and probes behind the image;
    inputs, outputs : (name, shape without the batch axis, onnx type) of the model; placement : the
    line that says what runs where; metadata : JSON-able facts for reports. choices : inputs of the
    model that are one integer for a whole run, such as its task, and the values that they may have;
    every combination of values has its own steps. upper : the same model with experts of 4 bits, the
    upper halves of those here, where they are nested.
    """

    config: Config
    image: bytes
    dram_bytes: int
    steps: list[DeviceStep | HostStep]
    inputs: list[tuple[str, tuple[int, ...], str]]
    outputs: list[tuple[str, tuple[int, ...], str]]
    placement: str
    metadata: dict = field(default_factory=dict)
    choices: dict[str, list[int]] = field(default_factory=dict)
    upper: "Program | None" = None

    def with_expert_bits(self, bits: int) -> "Program":
        """The program with all bits of nested experts, 8, or with their upper 4.

        Raises
        ------
        ProgramError
            Experts are not nested, or have no such number of bits.
        """
        if self.upper is None or bits not in (8, 4):
            raise ProgramError(f"Bits of experts must be 8 or 4, of a program that was compiled with "
                               f"nested experts, not {bits!r}"
                               + ("" if self.upper else ": compile it so (--nested)"))
        return self if bits == 8 else self.upper

    def steps_of(self, choice: Mapping[str, int] | None = None) -> list[DeviceStep | HostStep]:
        """The steps of a run, in order. choice : a value for each of `choices`; None: the first."""
        if choice is None:
            choice = {name: values[0] for name, values in self.choices.items()}
        return [step for step in self.steps if step.choice == choice]

    def save(self, path: str | os.PathLike) -> None:
        """Write the file; an existing one is replaced only by a complete new one."""
        arrays: dict[str, np.ndarray] = {}
        manifest = self._to_arrays("image", arrays)
        arrays["manifest"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
        payload = io.BytesIO()
        np.savez_compressed(payload, **arrays)
        body = payload.getvalue()
        path = Path(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(FORMAT + hashlib.sha256(body).digest() + body)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def _to_arrays(self, image: str, arrays: dict[str, np.ndarray],
                   known: Mapping[str, str] | None = None) -> dict:
        """The program as JSON-able facts; its image, and its other arrays that are not `known` (see
        `quantised.to_arrays`), are added to `arrays`."""
        arrays[image] = np.frombuffer(self.image, np.uint8)
        steps = []
        for step in self.steps:
            if isinstance(step, HostStep):
                steps.append({
                    "kind": "host", "choice": step.choice,
                    "model": quantised.keep(np.frombuffer(step.model, np.uint8), arrays),
                    "inputs": step.inputs, "outputs": step.outputs, "reasons": step.reasons})
            else:
                steps.append({
                    "kind": "device", "choice": step.choice, "entry": step.entry,
                    "macs": step.macs, "frames": step.frames, "layers": step.layers,
                    "layer_of": quantised.keep(step.layer_of, arrays),
                    "inputs": [dataclasses.asdict(port) for port in step.inputs],
                    "outputs": [dataclasses.asdict(port) for port in step.outputs],
                    "probes": [dataclasses.asdict(probe) for probe in step.probes],
                    "grids": {name: _kept(grid, arrays) for name, grid in step.grids.items()},
                    "operations": quantised.to_arrays(step.operations, arrays, known)})
        manifest = {
            "config": self.config.to_dict(), "digest": self.config.digest,
            "dram_bytes": self.dram_bytes, "steps": steps, "inputs": self.inputs,
            "outputs": self.outputs, "placement": self.placement, "choices": self.choices,
            "metadata": self.metadata}
        if self.upper is not None:
            operations = [op for step in self._device_steps for op in step.operations]
            manifest["upper"] = self.upper._to_arrays("upper_image", arrays,
                                                      quantised.halves(operations))
            entries, upper_entries = ([step.entry for step in program._device_steps]
                                      for program in (self, self.upper))
            common = nested.common_weights(self.config, self.image, entries, self.upper.image,
                                           upper_entries)
            arrays["common_weights"] = common
            arrays["upper_image"] = nested.left_out(self.config, self.upper.image, common)
        return manifest

    @property
    def _device_steps(self) -> list[DeviceStep]:
        return [step for step in self.steps if isinstance(step, DeviceStep)]

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Program":
        """Read a program file.

        Raises
        ------
        ProgramError
            Not a program, truncated or altered, or written by another version.
        OSError
            The file cannot be read.
        """
        raw = Path(path).read_bytes()
        if not raw.startswith(FORMAT):
            raise ProgramError(f"{path} must start with {FORMAT!r}, not {raw[:len(FORMAT)]!r}: "
                               "compile the model with this version of moeware")
        digest, body = raw[len(FORMAT):len(FORMAT) + 32], raw[len(FORMAT) + 32:]
        if hashlib.sha256(body).digest() != digest:
            raise ProgramError(f"{path} is truncated or damaged (its checksum does not match): "
                               "compile the model again or copy the file again")
        try:
            with np.load(io.BytesIO(body), allow_pickle=False) as archive:
                arrays = dict(archive)
            manifest = json.loads(arrays["manifest"].tobytes())
            return cls._from_arrays(manifest, arrays["image"].tobytes(), arrays)
        except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ProgramError(f"{path} was written by another version of moeware ({error}): "
                               "compile the model again") from error

    @classmethod
    def _from_arrays(cls, manifest: dict, image: bytes, arrays: dict[str, np.ndarray]) -> "Program":
        config = Config.from_dict(manifest["config"])
        if config.digest != manifest["digest"]:
            raise ProgramError(f"its configuration has the digest {config.digest:#010x} here and "
                               f"{manifest['digest']:#010x} where it was compiled")
        steps: list[DeviceStep | HostStep] = []
        for entry in manifest["steps"]:
            if entry["kind"] == "host":
                steps.append(HostStep(model=arrays[entry["model"]].tobytes(), inputs=entry["inputs"],
                                      outputs=entry["outputs"], reasons=entry["reasons"],
                                      choice=entry["choice"]))
            else:
                steps.append(DeviceStep(
                    entry=entry["entry"], macs=entry["macs"], frames=entry["frames"],
                    layers=entry["layers"], layer_of=arrays[entry["layer_of"]],
                    choice=entry["choice"],
                    inputs=[_port(port) for port in entry["inputs"]],
                    outputs=[_port(port) for port in entry["outputs"]],
                    probes=[Probe(**probe | {"region": _region(probe["region"])})
                            for probe in entry["probes"]],
                    grids={name: Grid(**fields | {
                        part: arrays[fields[part]] for part in _GRID_ARRAYS if fields[part]})
                        for name, fields in entry["grids"].items()},
                    operations=quantised.from_arrays(entry["operations"], arrays)))
        tensors = {side: [(name, tuple(shape), kind) for name, shape, kind in manifest[side]]
                   for side in ("inputs", "outputs")}
        upper = None
        if "upper" in manifest:
            upper = cls._from_arrays(manifest["upper"], nested.made_again(
                config, image, arrays["upper_image"].tobytes(), arrays["common_weights"]), arrays)
        return cls(config=config, image=image, dram_bytes=manifest["dram_bytes"], steps=steps,
                   placement=manifest["placement"], metadata=manifest["metadata"],
                   choices=manifest["choices"], upper=upper, **tensors)


_GRID_ARRAYS = ("gain", "shift", "columns")


def _kept(grid: Grid, arrays: dict[str, np.ndarray]) -> dict:
    """JSON-able fields of a grid; its arrays are added to `arrays`."""
    fields = {field.name: getattr(grid, field.name) for field in dataclasses.fields(grid)}
    return fields | {name: quantised.keep(fields[name], arrays) for name in _GRID_ARRAYS
                     if fields[name] is not None}


def _region(fields: dict) -> Region:
    return Region(**fields | {"memory": Memory(fields["memory"])})


def _port(fields: dict) -> Port:
    lists = {name: tuple(fields[name]) for name in ("shape", "split", "order")}
    return Port(**fields | lists | {"region": _region(fields["region"])})
