"""Files that leave open how long a sequence is, take what is the same in every run, and give what
nobody reads."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

import moeware
from moeware import cli
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.interface import Interface
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.reference import evaluate
from moeware.hw.arch.program import Program
from tests.compiler import genai, language_models
from tests.compiler.exports import export_module, run_onnx
from tests.compiler.fused import operators_of
from tests.compiler.genai import Sizes
from tests.compiler.test_language_models import EXPORTS, LOOKUP

TOKENS, EXAMPLE = 11, 9  # of the program; of the example that is exported
ROUNDING = 1e-5  # of float32 sums in another order, relative to the largest value
CONFIG = Path(__file__).parents[2] / "examples" / "pydoc" / "config.json"
FIXED = {"attention_mask": 1, "position_ids": "range"}


class Positioned(nn.Module):
    """``forward(input_ids, attention_mask, position_ids)``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids):
        return self.model(input_ids=input_ids, attention_mask=attention_mask,
                          position_ids=position_ids, use_cache=False).logits


class Cached(Positioned):
    """Also takes the keys and values of earlier tokens, and gives those of all, as files for
    generation do."""

    def forward(self, input_ids, attention_mask, position_ids, key, value):
        cache = DynamicCache()
        cache.update(key, value, 0)
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True,
                            position_ids=position_ids, past_key_values=cache)
        return result.logits, cache.layers[0].keys, cache.layers[0].values


def write(path, name, attention, dynamo, cached=False):
    """A model of one layer with axes of any length, exported for a batch of 2."""
    model = language_models.build(name, attention=attention).model
    model.config.use_cache = cached
    past = 4 if cached else 0
    inputs = [torch.randint(0, language_models.VOCABULARY, (2, EXAMPLE)),
              torch.ones(2, past + EXAMPLE, dtype=torch.int64),
              torch.arange(past, past + EXAMPLE)[None].repeat(2, 1)]
    names = ["input_ids", "attention_mask", "position_ids"]
    axes = {each: {0: "batch_size", 1: "sequence_length"} for each in names}
    if cached:
        names += ["past_key_values.0.key", "past_key_values.0.value"]
        inputs += [torch.randn(2, 2, past, 8)] * 2
        axes |= {each: {0: "batch_size", 2: "past_sequence_length"} for each in names[3:]}
        axes["attention_mask"] = {0: "batch_size", 1: "past_sequence_length + sequence_length"}
    outputs = ["logits", "present.0.key", "present.0.value"][:3 if cached else 1]
    options = {"input_names": names, "output_names": outputs}
    if dynamo:
        batch, length = Dim("batch_size"), Dim("sequence_length", min=2, max=64)
        options["dynamic_shapes"] = ({0: batch, 1: length},) * 3
    else:
        options["dynamic_axes"] = axes
    return export_module((Cached if cached else Positioned)(model), tuple(inputs), path, 20, dynamo,
                         **options)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cached") / "m.onnx", "llama", "sdpa", False, True)


CACHED = {"axes": {"sequence_length": TOKENS, "past_sequence_length": 0}, "fixed": FIXED,
          "outputs": ["logits"]}


def ids(count=1, seed=1):
    return np.random.default_rng(seed).integers(0, language_models.VOCABULARY, (count, TOKENS))


def feeds(sequence):
    """What ONNX Runtime takes for a sequence [1, tokens]."""
    return {"input_ids": sequence, "attention_mask": np.ones_like(sequence),
            "position_ids": np.arange(TOKENS)[None]}


@pytest.mark.parametrize("name, attention, dynamo", [
    ("mixtral", "sdpa", False), ("olmoe", "eager", True), ("qwen3-moe", "sdpa", True)])
def test_sequences_of_any_length_are_of_one(tmp_path, name, attention, dynamo):
    path = write(tmp_path / "m.onnx", name, attention, dynamo)
    model = fuse(load(path, None, Interface({"sequence_length": TOKENS}, FIXED)))
    (operators,) = {each for (other, *_), each in EXPORTS.items() if other == name}
    assert Counter(operators_of(model)) == Counter([LOOKUP, *operators.split()])
    assert [tuple(value.shape) for value in model.graph.inputs] == [(1, TOKENS)]
    found, = evaluate(model, {"input_ids": ids()}).values()
    wanted, = run_onnx(path, **feeds(ids()))
    assert np.abs(found - wanted).max() <= ROUNDING * np.abs(wanted).max()


def test_a_file_for_generation_becomes_a_program(cached, tmp_path):
    """Its past is empty; `compare` and a saved program know how the file was read."""
    program = moeware.compile(cached, CONFIG, {"input_ids": ids(24, 2)}, **CACHED)
    program.save(tmp_path / "m.moe")
    program = Program.load(tmp_path / "m.moe")
    answers = [moeware.Session(program, device).run(None, {"input_ids": ids(2)})
               for device in ("torch", "golden")]
    np.testing.assert_array_equal(*np.asarray(answers))
    past = np.zeros((1, 2, 0, 8), np.float32)
    for answer, sequence in zip(answers[0][0], ids(2)):
        wanted = run_onnx(cached, **feeds(sequence[None]), **{
            f"past_key_values.0.{each}": past for each in ("key", "value")})[0]
        assert np.abs(answer - wanted).max() < 0.1 * np.abs(wanted).max()  # of 8 bits
    accuracy = moeware.compare(cached, program, {"input_ids": ids(4, 3)})
    assert accuracy.tensors[-1].operator == "Linear" and accuracy.tensors[-1].snr_db > 20


@pytest.mark.parametrize("sizes", [
    Sizes(layers=2, presents=True), Sizes(layers=1, experts=4, expert_bits=4, block=16, bits=4),
    Sizes(layers=1, attention="multi", kv_heads=4, rotary="apart", packed=False, presents=True)])
def test_a_file_of_the_model_builder_for_generation(tmp_path, sizes):
    """Its mask and past are inputs, as those that are found are."""
    proto = onnx.load(str(genai.write(tmp_path / "m.onnx", sizes)))
    dims = {"input_ids": ["batch_size", "sequence_length"],
            "attention_mask": ["batch_size", "total_sequence_length"]}
    past = ["batch_size", sizes.kv_heads, "past_sequence_length", sizes.dim]
    dims |= {tensor.name: past for tensor in proto.graph.initializer if "past_key" in tensor.name}
    for tensor in [each for each in proto.graph.initializer if each.name in dims]:
        proto.graph.initializer.remove(tensor)
    del proto.graph.input[:]
    proto.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT if "past" in name else TensorProto.INT64,
                                      shape) for name, shape in dims.items())
    onnx.save(proto, str(tmp_path / "m.onnx"))
    axes = {"sequence_length": sizes.tokens, "total_sequence_length": sizes.tokens,
            "past_sequence_length": 0}
    model = fuse(load(tmp_path / "m.onnx", None, Interface(axes, {"attention_mask": 1}, ["logits"])))
    host = [node for part in partition(model).steps if part.kind == "host" for node in part.nodes]
    assert [node.op_type for node in host if node.op_type != "GatherBlockQuantized"] in ([], ["Gather"])
    tokens = ids()[:, :sizes.tokens]
    empty = np.zeros((1, sizes.kv_heads, 0, sizes.dim), np.float32)
    found, = evaluate(model, {"input_ids": tokens}).values()
    wanted, *_ = run_onnx(tmp_path / "m.onnx", input_ids=tokens, attention_mask=np.ones_like(tokens),
                          **dict.fromkeys([name for name in dims if "past" in name], empty))
    assert np.abs(found - wanted).max() <= ROUNDING * np.abs(wanted).max()


def test_command_line(cached, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("inputs.npz", **feeds(ids(8, 4)) | {"position_ids": np.zeros((8, TOKENS))})
    options = ["--axis", f"sequence_length={TOKENS}", "--axis", "past_sequence_length=0", "--fix",
               "attention_mask=1", "--fix", "position_ids=range", "--outputs", "logits"]
    assert cli.main(["check", str(cached), *options]) == 0
    assert "100.0 % of MACs" in capsys.readouterr().out
    assert cli.main(["compile", str(cached), "--config", str(CONFIG), "--calibration", "inputs.npz", "-o",
                     "m.moe", *options]) == 0
    for command in (["run", "m.moe", "inputs.npz", "--device", "torch", "-o", "out.npz"],
                    ["compare", str(cached), "m.moe", "inputs.npz"]):
        assert cli.main(command) == 0
    assert np.load("out.npz")["logits"].shape == (8, TOKENS, language_models.VOCABULARY)
    with pytest.raises(SystemExit):
        cli.main(["check", str(cached), "--fix", "attention_mask=ones"])
    assert "attention_mask=1 or position_ids=range, not 'attention_mask=ones'" in capsys.readouterr().err


def test_numbers_of_numpy_are_saved_as_numbers():
    interface = Interface({"s": np.int64(3)}, {"mask": np.int64(1), "scale": np.float32(0.5)}, ["y"])
    saved = json.loads(json.dumps(interface.to_dict()))
    assert Interface(**saved) == Interface({"s": 3}, {"mask": 1, "scale": 0.5}, ["y"])


def test_an_axis_may_be_told_by_its_place(cached):
    axes = {"input_ids.1": TOKENS, "attention_mask.1": TOKENS, "position_ids.1": TOKENS,
            "past_key_values.0.key.2": 0, "past_key_values.0.value.2": 0}
    model = load(cached, None, Interface(axes, FIXED, ["logits"]))
    assert [value.name for value in model.graph.inputs] == ["input_ids"]


def test_integers_that_decide_are_named(cached):
    """Not the tokens themselves, which only choose rows of a table."""
    for fixed, named in (({}, "attention_mask"), ({"attention_mask": 1}, "position_ids")):
        parts = partition(fuse(load(cached, None, Interface(CACHED["axes"], fixed, ["logits"]))))
        causes = [reason for reason in parts.reasons.values() if not reason.follows]
        remedy = f"--fix {named}={FIXED[named]}"
        assert any(remedy in reason.remedy for reason in causes)
        assert not any("--fix input_ids" in reason.remedy for reason in causes)


@pytest.mark.parametrize("change, message", [
    ({"axes": {"past_sequence_length": 0}}, "Axis 1 of graph input 'input_ids' must be fixed, not dynamic "
     r"\(sequence_length\).*--axis sequence_length="),
    ({"axes": {"sequence_length": TOKENS}}, r"Axis 1 .* 'attention_mask' .* \(past_sequence_length \+ "
     r"sequence_length\).*--axis attention_mask.1="),
    ({"axes": {"length": 3}}, "Axis to set must be one of the model's dynamic axes .*, not 'length'"),
    ({"axes": {"sequence_length": -1}}, "Size of axis 'sequence_length' must be 0 or more, not -1"),
    ({"axes": {"sequence_length": True}}, "must be 0 or more, not True"),
    ({"axes": {"batch_size": 2}}, "Batch axis of .* must be dynamic or 1, not 2"),
    ({"fixed": {"mask": 1}}, r"Fixed input to set must be one of the model's inputs .*, not 'mask'"),
    ({"fixed": FIXED | {"attention_mask": 0.5}}, "'attention_mask' must be of its type int64, not 0.5"),
    ({"fixed": FIXED | {"attention_mask": "ones"}}, "must be a number or 'range', not 'ones'"),
    ({"outputs": ["logit"]}, "Output to set must be one of the model's outputs .*, not 'logit'"),
])
def test_what_is_not_there_is_refused(cached, change, message):
    with pytest.raises(CompileError, match=message):
        load(cached, None, Interface(**CACHED | change))
