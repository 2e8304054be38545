"""Models of the transformers library in the form that exports well: which is not their default."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

__all__ = ["good_form", "input_name", "is_hugging_face", "output_of", "vocabulary"]

EXPERTS = "batched_mm"  # gathers each token's weights; the default loops over the experts that were hit
ATTENTION = "sdpa"  # one operator
# While it exports, transformers makes causality a mask, for other lengths and for sequences packed
# behind each other. A frame is one sequence of fixed length.
_WITHOUT_MASKS: dict[str, Callable] = {"is_torchdynamo_exporting": lambda: False,
                                       "find_packed_sequence_indices": lambda position_ids: None}


def is_hugging_face(model: nn.Module) -> bool:
    """Whether a module is a model of transformers, which need not be installed."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def input_name(model) -> str:
    """The input that a model of transformers takes first: ``input_ids``, ``pixel_values``, …"""
    return model.main_input_name


def vocabulary(model, name: str) -> int | None:
    """How many values the integers of an input may have, where the model says so."""
    config = model.config.get_text_config() if is_hugging_face(model) else None
    return getattr(config, "vocab_size", None) if name == "input_ids" else None


def output_of(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or the first output of a model that has none; without a cache of keys and values."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = inputs | {"use_cache": False}
    result = model(**inputs, return_dict=True)
    return result.logits if "logits" in result else next(iter(result.values()))


@contextmanager
def good_form(module: nn.Module) -> Iterator[None]:
    """Within it, models of transformers in `module` gather the weights of experts, compute attention as
    one operator without a mask tensor and turn by real numbers; afterwards they are as they were."""
    with ExitStack() as stack:
        models = [model for model in module.modules() if is_hugging_face(model)]
        for model in models:
            stack.enter_context(_set(model, "attn", ATTENTION))
            stack.enter_context(_set(model, "experts", EXPERTS))
            code = sys.modules[type(model).__module__]
            if _turns_complex_numbers(code):
                stack.enter_context(_replaced(code, "apply_rotary_emb", _turned))
        masks = sys.modules.get("transformers.masking_utils")
        for name, function in _WITHOUT_MASKS.items():
            if models and hasattr(masks, name):
                stack.enter_context(_replaced(masks, name, function))
        yield



@contextmanager
def _set(model, part: str, wanted: str) -> Iterator[None]:
    """Another implementation of `part`, where the model has a choice."""
    set_to: Callable | None = getattr(model, f"set_{part}_implementation", None)
    can_set: Callable | None = getattr(model, f"_can_set_{part}_implementation", None)
    if set_to is None or can_set is None or not can_set():
        yield
        return
    before = getattr(model.config, f"_{part}_implementation")
    try:
        set_to(wanted)
    except (ImportError, ValueError):  # this model has no such implementation
        yield
        return
    try:
        yield
    finally:
        set_to(before)


@contextmanager
def _replaced(module, name: str, function: Callable) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def _turns_complex_numbers(module) -> bool:
    """Whether a rotary embedding multiplies complex numbers, which ONNX does not have, as
    DeepSeek-V2's does."""
    function = getattr(module, "apply_rotary_emb", None)
    source = inspect.getsource(function) if inspect.isfunction(function) else ""
    return "view_as_complex(" in source and "freqs_cis.unsqueeze(1)" in source


def _turned(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor
            ) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbouring channels of queries and keys [batch, heads, tokens, dim] as complex numbers, times
    complex factors [batch, tokens, dim/2]."""
    cos, sin = torch.view_as_real(freqs_cis).unsqueeze(1).unbind(-1)

    def turn(x: torch.Tensor) -> torch.Tensor:
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        pair = real * cos - imaginary * sin, real * sin + imaginary * cos
        return torch.stack(pair, -1).flatten(3).type_as(x)
    return turn(xq), turn(xk)
