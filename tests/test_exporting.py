"""Exported files give the modules' results, or are not written."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import moeware
from moeware import exporting
from moeware.cli.check import placement
from moeware.exporting import ExportError

from . import hugging_face
from .compiler import exports

# Of float32 sums in another order, relative to the largest result; measured: 4e-7.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, what `export` returned), by the name of a language model; exported at first use."""
    folder, known = tmp_path_factory.mktemp("models"), {}

    def make(name: str):
        if name not in known:
            torch.manual_seed(1)
            model = hugging_face.language_model(name)
            model.model.embed_tokens.eval()
            state = _state(model)
            found = moeware.export(model, words(0, 2), folder / f"{name}.onnx")
            assert _state(model) == state
            known[name] = model, found
        return known[name]
    return make


def _state(model):
    """What an export must leave as it was."""
    masks = sys.modules["transformers.masking_utils"]
    return (model.config._attn_implementation, model.config._experts_implementation,
            [module.training for module in model.modules()],
            getattr(sys.modules[type(model).__module__], "apply_rotary_emb", None),
            masks.is_torchdynamo_exporting, masks.find_packed_sequence_indices)


def words(seed: int, frames: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, hugging_face.VOCABULARY, (frames, hugging_face.TOKENS),
                         generator=generator)


def run(path, **feeds) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("name", hugging_face.CONFIGS)
def test_language_models(made, name):
    model, found = made(name)
    assert (found.exporter, found.opset, found.failures) == ("dynamo", 23, ())
    assert found.difference < ROUNDING
    graph = onnx.load(found.path).graph
    assert [each.name for each in graph.input] == ["input_ids"]
    assert [each.name for each in graph.output] == ["logits"]
    operators = [node.op_type for node in graph.node]
    attention, = (node for node in graph.node if node.op_type == "Attention")
    assert len(attention.input) == 3  # causal without a mask
    assert operators.count("RMSNormalization") + operators.count("LayerNormalization") >= 3
    assert operators.count("GatherND") == 2 and "NonZero" not in operators
    for seed in (7, 8):  # inputs that the export did not see
        ids = words(seed)
        with torch.no_grad():
            wanted = model.eval()(input_ids=ids).logits.numpy()
        difference = np.abs(run(found.path, input_ids=ids.numpy())[0] - wanted).max()
        assert difference < ROUNDING * np.abs(wanted).max()


def test_a_model_within_a_users_module(made, tmp_path):
    class Users(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(input_ids=tokens, use_cache=False).logits.softmax(-1)

    model, _ = made("mixtral")
    state = _state(model)
    found = moeware.export(Users(model), (words(0),), tmp_path / "m.onnx", output_names=["chances"])
    assert _state(model) == state
    graph = onnx.load(found.path).graph
    assert [each.name for each in (*graph.input, *graph.output)] == ["tokens", "chances"]
    assert [node.op_type for node in graph.node].count("GatherND") == 2


def test_an_image_model_compiles_whole(tmp_path):
    torch.manual_seed(1)
    found = moeware.export(hugging_face.image_model(), torch.randn(1, 3, 8, 12), tmp_path / "m.onnx")
    facts = placement(str(found.path), strict=True)
    assert facts["ok"] and facts["fpga_mac_share"] == 1
    assert onnx.load(found.path).graph.input[0].name == "pixel_values"


@pytest.mark.parametrize("form", ["where", "gather"])
def test_plain_mixtures_compile_whole(tmp_path, form):
    model = exports.vit(mixer=exports.Moe(form)).train()
    found = moeware.export(model, torch.from_numpy(exports.example(3)), tmp_path / "m.onnx")
    assert model.training and found.difference < ROUNDING
    facts = placement(str(found.path), strict=True)
    assert facts["ok"] and [node for step in facts["steps"] for node in step["nodes"]
                            if node.startswith("Experts")]
    image = exports.example(1, seed=4)
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(image)).numpy()
    output, = run(found.path, image=image)
    assert np.abs(output - wanted).max() < ROUNDING * np.abs(wanted).max()
    assert [each.name for each in onnx.load(found.path).graph.output] == ["output"]


def test_inputs_by_name_and_a_choice(tmp_path):
    found = moeware.export(exports.Tasks(), {"image": exports.example(1), "task": torch.tensor(0)},
                           tmp_path / "m.onnx")
    assert placement(str(found.path), {"task": [0, 1]}, strict=True)["ok"]


class Mixture(nn.Module):
    """Four experts, one for a token, found by what the subclasses do with the numbers of tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        rows = x.reshape(-1, 8)
        return self.mix(rows, self.gate(rows).argmax(-1)).reshape(x.shape)


class Sorted(Mixture):
    """fastmoe: tokens sorted by expert, and cut into pieces of the experts' numbers of tokens."""

    def mix(self, rows, chosen):
        order = chosen.argsort()
        pieces = rows[order].split(torch.bincount(chosen, minlength=4).tolist())
        return torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces)])[
            order.argsort()]


class Hit(Mixture):
    """Only the experts that have a token, as transformers does by default."""

    def mix(self, rows, chosen):
        result = torch.zeros_like(rows)
        for number in chosen.unique().tolist():
            result = result + (chosen == number)[:, None] * self.experts[number](rows)
        return result


@pytest.mark.parametrize("kind", [Sorted, Hit])
def test_what_the_example_did_is_not_baked_in(tmp_path, kind):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    example = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ExportError) as error:
        moeware.export(kind(), example, path)
    text = str(error.value)
    assert "Exported file must give the module's results, but does not" in text
    assert "torch.export: GuardOnDataDependent" in text and "TorchScript, opset 17: on input" in text
    assert "differs by" in text and "loop over all of them with a mask weight" in text
    assert "on the example" not in text  # for which alone the file is right
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["m.onnx"]


def test_another_opset_where_the_first_fails(tmp_path, monkeypatch):
    def convert(*arguments, opset_version, **options):
        if opset_version > 20:
            raise NotImplementedError("no such operator\nand more")
        return write(*arguments, opset_version=opset_version, **options)
    write = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", convert)
    found = moeware.export(nn.Linear(4, 3), torch.randn(1, 4), tmp_path / "m.onnx")
    assert (found.exporter, found.opset) == ("dynamo", 20)
    assert found.failures == ("dynamo, opset 23: NotImplementedError: no such operator",)


def test_a_file_that_is_wrong_on_the_example(tmp_path, monkeypatch):
    def convert(module, *arguments, **options):
        return write(nn.Linear(4, 3), (torch.randn(1, 4),), *arguments[1:], **options)
    write = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", convert)
    with pytest.raises(ExportError, match="on the example it differs by") as error:
        moeware.export(nn.Linear(4, 3), torch.randn(1, 4), tmp_path / "m.onnx")
    assert "dynamo, opset 18: on the example" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_weights_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LARGEST_FILE_BYTES", 1000)
    model = nn.Linear(40, 30)
    found = moeware.export(model, torch.randn(1, 40), tmp_path / "m.onnx")
    assert {each.name for each in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    x = torch.randn(1, 40)
    np.testing.assert_allclose(run(found.path, input=x.numpy())[0], model(x).detach(), atol=1e-5)


class Several(nn.Module):
    """Results as transformers and others return them; an input that none depends on."""

    def forward(self, x, unused, y):
        return {"sum": x + y, "rest": (x - y, None, [x.argmax(-1)])}


def test_several_results_and_an_unused_input(tmp_path):
    found = moeware.export(Several(), [torch.randn(1, 4) for _ in range(3)], tmp_path / "m.onnx")
    outputs = [each.name for each in onnx.load(found.path).graph.output]
    assert outputs == ["output_0", "output_1", "output_2"]


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(3)


@pytest.mark.parametrize("model, example, message", [
    (Noisy(4, 3), torch.randn(1, 4), "one result for one input, but two runs differ by"),
    (nn.Linear(4, 3).half(), torch.randn(1, 4), "'weight' must be torch.float32, not torch.float16"),
    (nn.Linear(4, 3), torch.full((1, 4), torch.nan), "finite results for the example"),
    (nn.Linear(4, 3), (), "at least one tensor")])
def test_what_cannot_be_exported(tmp_path, model, example, message):
    with pytest.raises(ExportError, match=message):
        moeware.export(model, example, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Counted(nn.Module):
    """Numbers cut by counts, which the newer exporter does not take, and a norm, which the older one
    does not."""

    def forward(self, x):
        counts = torch.bincount((x[0] > 0).long(), minlength=2).tolist()
        return nn.functional.rms_norm(torch.cat(x[0].split(counts))[None], (4,))


def test_exporters_print_nothing(tmp_path, capfd):
    with pytest.raises(ExportError, match="none does"):
        moeware.export(Counted(), torch.randn(1, 4), tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")


def test_transformers_need_not_be_installed(tmp_path):
    code = ("import sys; sys.modules['transformers'] = None\nimport moeware, torch\n"
            f"moeware.export(torch.nn.Linear(4, 3), torch.randn(1, 4), {str(tmp_path / 'm.onnx')!r})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and (tmp_path / "m.onnx").is_file()
