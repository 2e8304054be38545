"""From a PyTorch module to an ONNX file of the form that compiles, proved against the module.

An exporter records what one input does. Where that depends on the input (how many tokens an expert
gets), the file can be wrong for every other input without a word; so it is run on others, too.
"""

import contextlib
import inspect
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.utils import _pytree as pytree

from moeware.hugging_face import good_form, input_name, is_hugging_face, output_of, vocabulary

__all__ = ["ExportError", "Exported", "export"]

# 23 has attention and RMS normalisation as operators; at 24 the exporter takes the latter apart again.
OPSETS = (23, 20, 18)
TRACED_OPSET = 17  # the first with LayerNormalization
# Relative to the largest result. Sums of float32 in another order differ by some 1e-6; a token with
# another expert, by as much as the results themselves.
TOLERANCE = 1e-4
DRAWN = 3  # inputs beside the example
_REMEDY = ("write it without decisions that depend on data, such as the number of tokens of an expert: "
           "experts as a loop over all of them with a mask weight, as an einsum over stacked weights, or "
           "as a gather of them (transformers 5: experts_implementation='batched_mm')")
LARGEST_FILE_BYTES = 1_900_000_000  # beyond, weights go into a file beside it: protobuf ends at 2 GiB

Inputs = tuple[torch.Tensor, ...]


class ExportError(ValueError):
    """A module that cannot be exported, or whose file gives other results than itself."""


@dataclass(frozen=True)
class Exported:
    """A file that gives the module's results.

    exporter : "dynamo" or "TorchScript"; difference : largest to the module's results, relative to the
    largest of these, over all inputs tried; failures : what did not work before, a line each.
    """

    path: Path
    exporter: str
    opset: int
    difference: float
    failures: tuple[str, ...]


def export(model: nn.Module, example_inputs, path: str | os.PathLike, *,
           input_names: Sequence[str] | None = None,
           output_names: Sequence[str] | None = None) -> Exported:
    """Write `model` as an ONNX file for frames one at a time, and run both on several inputs.

    Parameters
    ----------
    model : in float32; it is exported in evaluation mode, and left as it was. Models of transformers
        get the forms of experts and attention that export, and one output, the logits.
    example_inputs : a tensor, a sequence of tensors in the order of `forward`, or tensors by its names.
        Where they hold several frames, the first one counts.
    path : of the file; weights beyond 2 GB are in another one beside it. Existing files are replaced
        only by complete and proved ones.
    input_names, output_names : in the file; by default those of `forward`, and ``logits`` or
        ``output``.

    The inputs that both run on are the example and others of its shape: integers drawn from the range
    of the example's (of the vocabulary, for ``input_ids``) and all alike, floats of the example's mean
    and deviation.

    Raises
    ------
    ExportError
        No exporter takes the model, or the file gives other results; the message says which, by how
        much and what to do.
    """
    call, names, example = _call(model, example_inputs)
    _check_precision(model)
    path = Path(path)
    with _evaluating(model), torch.no_grad():
        inputs = [example, *_drawn(model, names, example)]
        wanted = [call(*each) for each in inputs]
        _check_repeatable(call, example, wanted[0])
        ends = {"input_names": list(input_names or names),
                "output_names": list(output_names or _output_names(model, wanted[0]))}
        failures: list[str] = []
        wrong: list[str] = []
        with good_form(model), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            for exporter, opset, write in _attempts(_Callable(model, call), example, ends, failures):
                file = Path(folder, f"{exporter}{opset}", path.name)
                file.parent.mkdir()
                try:
                    with _quiet():
                        write(file)
                    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
                except Exception as error:  # noqa: BLE001 - exporters raise many types
                    failures.append(f"{exporter}, opset {opset}: {_first_line(error)}")
                    continue
                difference, fault = _compare(session, ends["input_names"], inputs, wanted)
                if fault is None:
                    opset = _opset(file)  # an exporter may choose another than it was asked for
                    for part in sorted(file.parent.iterdir(), key=lambda part: part == file):
                        os.replace(part, path.with_name(part.name))
                    return Exported(path, exporter, opset, difference, tuple(failures))
                wrong.append(f"{exporter}, opset {opset}: {fault}")
    if wrong:
        raise ExportError("Exported file must give the module's results, but does not ("
                          + "; ".join([*failures, *wrong]) + "). Where only the example is right, the "
                          f"export has recorded what the example did: {_REMEDY}")
    raise ExportError("Module must be one that an exporter takes, but none does ("
                      + "; ".join(failures) + f"): {_REMEDY}")


class _Callable(nn.Module):
    """The model as a function of tensors that returns tensors, for the exporters."""

    def __init__(self, model: nn.Module, call: Callable[..., Inputs]):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: torch.Tensor) -> Inputs:
        return self.call(*inputs)


def _call(model: nn.Module, example) -> tuple[Callable[..., Inputs], list[str], Inputs]:
    """The model as a function from tensors to tensors, the names of its inputs, the first frame."""
    if isinstance(example, (torch.Tensor, np.ndarray)):
        example = (example,)
    parameters = [name for name, each in inspect.signature(model.forward).parameters.items()
                  if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if isinstance(example, Mapping):
        names, by_name = list(example), True
        example = tuple(example.values())
    else:
        known = [input_name(model)] if is_hugging_face(model) else parameters
        by_name = is_hugging_face(model)
        names = [*known, *(f"input_{n}" for n in range(len(known), len(example)))][:len(example)]
    tensors = tuple(torch.as_tensor(each) for each in example)
    if not tensors:
        raise ExportError("Example inputs must be at least one tensor, not none")

    def call(*inputs: torch.Tensor) -> Inputs:
        if is_hugging_face(model):
            result = output_of(model, dict(zip(names, inputs)))
        elif by_name:
            result = model(**dict(zip(names, inputs)))
        else:
            result = model(*inputs)
        return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
    return call, names, tuple(each[:1] if each.ndim else each for each in tensors)


def _check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ExportError(f"Parameter {name!r} must be torch.float32, not {parameter.dtype}: "
                              "export model.float()")


def _check_repeatable(call: Callable[..., Inputs], example: Inputs, first: Inputs) -> None:
    for one, other in zip(first, call(*example), strict=True):
        if not torch.isfinite(one.float()).all():
            raise ExportError("Module must give finite results for the example inputs, not NaN or "
                              "infinity: give real inputs")
        if not torch.equal(one, other):
            raise ExportError("Module must give one result for one input, but two runs differ by "
                              f"{(one - other).abs().max():.3g}: remove noise (of a router) in "
                              "evaluation mode")


def _output_names(model: nn.Module, results: Inputs) -> list[str]:
    if len(results) == 1:
        return ["logits" if is_hugging_face(model) else "output"]
    return [f"output_{number}" for number in range(len(results))]


def _drawn(model: nn.Module, names: list[str], example: Inputs) -> Iterator[Inputs]:
    """Other inputs of the example's shapes, which other experts are chosen for."""
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, tensor: torch.Tensor, alike: bool) -> torch.Tensor:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            spread = tensor.std() if tensor.numel() > 1 else tensor.abs()
            return tensor.mean() + spread * noise
        if tensor.dtype == torch.bool or not tensor.ndim:  # a mask, a choice
            return tensor
        words = vocabulary(model, name)
        low, high = (0, words) if words else (int(tensor.min()), int(tensor.max()) + 1)
        integers = torch.randint(low, high, tensor.shape, generator=generator)
        return (integers.flatten()[0].expand(tensor.shape) if alike else integers).to(tensor)

    for number in range(DRAWN):
        yield tuple(draw(name, tensor, number == DRAWN - 1)
                    for name, tensor in zip(names, example, strict=True))


def _attempts(module: nn.Module, example: Inputs, ends: dict[str, list[str]], failures: list[str]
              ) -> Iterator[tuple[str, int, Callable[[Path], object]]]:
    """Exporter, opset and what writes the file, the best form first."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())
    external = weights > LARGEST_FILE_BYTES
    try:
        with _quiet():
            captured = torch.export.export(module, example, strict=False)
    except Exception as error:  # noqa: BLE001 - what a module's code may raise, too
        failures.append(f"torch.export: {_first_line(error)}")
    else:
        for opset in OPSETS:
            yield "dynamo", opset, lambda file: torch.onnx.export(
                captured, (), file, dynamo=True, opset_version=opset, external_data=external,
                verbose=False, **ends)
    yield "TorchScript", TRACED_OPSET, lambda file: torch.onnx.export(
        module, example, str(file), dynamo=False, opset_version=TRACED_OPSET, **ends)


def _compare(session: onnxruntime.InferenceSession, names: list[str], inputs: list[Inputs],
             wanted: list[Inputs]) -> tuple[float, str | None]:
    """Largest relative difference of the file's results, and what is wrong with them."""
    read = {argument.name for argument in session.get_inputs()}  # an exporter leaves out unused ones
    largest, faults = 0.0, []
    for number, (tensors, results) in enumerate(zip(inputs, wanted, strict=True)):
        where = f"on input {number} of {DRAWN} drawn ones it" if number else "on the example it"
        feeds = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)
                 if name in read}
        try:
            found = session.run(None, feeds)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime raises many types
            faults.append(f"{where} fails with {_first_line(error)}")
            continue
        for real, array in zip([each.cpu().numpy() for each in results], found, strict=True):
            if real.shape != array.shape:
                faults.append(f"{where} has the shape {array.shape}, not {real.shape}")
                continue
            scale = float(np.abs(real).max(initial=0)) or 1.0
            difference = float(np.abs(real.astype(np.float64) - array).max(initial=0))
            largest = max(largest, difference / scale)
            if not difference <= TOLERANCE * scale:  # NaN is not
                faults.append(f"{where} differs by {difference:.3g} from results up to {scale:.3g}")
    return largest, "; ".join(faults) or None


def _opset(file: Path) -> int:
    model = onnx.load(file, load_external_data=False)
    return next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress and advice: what counts is whether the file is right."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (warnings.catch_warnings(), _without_descriptor(1),
              contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _without_descriptor(number: int) -> Iterator[None]:
    """A file descriptor that leads nowhere: PyTorch's C++ code writes its graph past Python's streams
    where the TorchScript exporter fails."""
    sys.stdout.flush()
    kept = os.dup(number)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), number)
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


def _first_line(error: Exception) -> str:
    """The first line of an error that says something, and what caused it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    cause = error.__cause__
    return f"{first} ({_first_line(cause)})" if isinstance(cause, Exception) else first
