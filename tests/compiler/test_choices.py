"""Models with a choice, such as a task: one program, whose runs name the value."""

import json

import numpy as np
import onnx
import pytest
import torch

import moeware
from moeware import cli
from moeware.compiler.calibrate import Calibration, merged
from moeware.compiler.errors import CompileError
from moeware.compiler.pipeline import STAGES, compile_model
from moeware.hw.arch import isa
from moeware.hw.arch.program import Program
from moeware.hw.arch.quantised import Experts, Linear
from moeware.hw.arch.registers import MAGIC, Control, Register, Status
from moeware.runtime.board_device import BoardDevice
from moeware.runtime.session import FeedError, Session
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.golden import GoldenDevice, Machine

from ..hw.arch.configs import CONFIGS
from . import exports

CALIBRATION = {"image": exports.example(64, seed=1)}
CHOICES = {"task": [0, 1]}
IMAGES = exports.example(5, seed=2)
FORMS = {  # how the gate is selected, the task's example, exporter
    "index": ("index", torch.tensor(0), True),
    "index-traced": ("index", torch.tensor(0), False),
    "select": ("select", torch.tensor([0]), True),
    "select-traced": ("select", torch.tensor([0]), False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, path of its file), by form; exported when first asked for."""
    folder, known = tmp_path_factory.mktemp("tasks"), {}

    def make(form: str = "index"):
        if form not in known:
            gate, task, dynamo = FORMS[form]
            model = exports.Tasks(gate)
            known[form] = model, exports.export(model, folder / f"{form}.onnx", dynamo=dynamo,
                                                task=task)
        return known[form]
    return make


@pytest.fixture(scope="module")
def program(made):
    return compile_model(made()[1], CONFIGS[0], CALIBRATION, choices=CHOICES, trace=True)


def logits(model, task: int) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IMAGES), torch.tensor(task)).numpy()


class Steps:
    """PyTorch, as a device that notes what it ran."""

    name, config, counters = "steps", None, []

    def __init__(self):
        self.runs = []

    def run(self, program, step, inputs, **options):
        self.runs.append((step, inputs))
        return TorchDevice().run(program, step, inputs, **options)


@pytest.mark.parametrize("form", FORMS)
def test_every_task_is_exact_and_close_to_float(made, form):
    model, path = made(form)
    program = compile_model(path, CONFIGS[0], CALIBRATION, choices=CHOICES, trace=True)
    found, golden, steps = {}, GoldenDevice(), Steps()
    for task in (0, 1, 1, 0):
        result, = Session(program, steps).run(None, {"image": IMAGES, "task": task})
        step, inputs = steps.runs[-1]
        assert step.choice == {"task": task}
        difference = compare(program, step, {"golden": golden, "PyTorch": TorchDevice()}, inputs)
        assert difference.equal and difference.values > 5000, difference
        np.testing.assert_array_equal(found.setdefault(task, result), result)
        real = logits(model, task)
        error = np.sqrt(np.square(result - real).mean()) / real.std()
        assert error < 0.15, (task, error)
    assert np.abs(logits(model, 0) - logits(model, 1)).max() > 0.2  # tasks that could be confused
    assert np.abs(found[0] - found[1]).max() > 0.2


def test_tasks_share_what_is_equal(made, program):
    one = compile_model(made()[1], CONFIGS[0], CALIBRATION, choices={"task": [1]}, trace=True)
    first, second = (program.steps_of({"task": task})[0] for task in (0, 1))
    code = (len(second.layer_of) + 1) * isa.BYTES
    gate = 512  # bytes of 5 experts' weights in rows of 20 channels, and of their biases
    assert code < len(program.image) - len(one.image) < code + gate
    assert program.dram_bytes - one.dram_bytes == len(program.image) - len(one.image)
    kinds = set()
    for here, there in zip(first.operations, second.operations, strict=True):
        for name in ("weight", "up", "down") if isinstance(here, (Linear, Experts)) else ():
            if hasattr(here, name):
                kinds.add(name)
                np.testing.assert_array_equal(getattr(here, name), getattr(there, name), here.name)
    assert kinds == {"weight", "up", "down"}
    assert [(port.scale, port.offset) for port in first.inputs + first.outputs] == [
        (port.scale, port.offset) for port in second.inputs + second.outputs]


def test_grids_are_those_of_all_tasks(made):
    def scales(tasks: list[int]) -> set[float]:
        made_for = compile_model(made()[1], CONFIGS[0], CALIBRATION, choices={"task": tasks})
        return {step.outputs[0].scale for step in made_for.steps}
    first, second = scales([0]), scales([1])
    assert first != second
    assert scales([0, 1]) == scales([1, 0]) == {max(first | second)}


def test_merged_calibrations_hold_equal_samples_once():
    first, second = (Calibration(
        {"same": np.ones((2, 3)), "x": np.full((2, 3), task), f"expert{task}": np.zeros((1, 3))},
        {"experts": np.array([1, task])}, frames=2) for task in (0, 1))
    found = merged([first, second])
    assert {name: rows.shape for name, rows in found.samples.items()} == {
        "same": (2, 3), "x": (4, 3), "expert0": (1, 3), "expert1": (1, 3)}
    assert found.tokens["experts"].tolist() == [2, 1] and found.frames == 2


def test_tasks_take_turns_on_one_board_without_a_reload(program):
    target = GoldenTarget(program)
    board = Session(program, BoardDevice(target, program.config))
    expected = {task: Session(program, "torch").run(None, {"image": IMAGES, "task": task})[0]
                for task in (0, 1)}
    for task in (0, 1, 0, 1, 1):
        for frame in range(len(IMAGES)):
            found, = board.run(None, {"image": IMAGES[frame:frame + 1], "task": np.int64(task)})
            np.testing.assert_array_equal(found[0], expected[task][frame])
    assert target.images == 1


class GoldenTarget:
    """Registers and DRAM in front of a golden machine; counts in `images` how often a driver wrote
    an image."""

    def __init__(self, program: Program):
        self.images = 0
        self.registers = {Register.MAGIC: MAGIC, Register.DIGEST: program.config.digest,
                          Register.STATUS: Status.DONE}
        self.machine = Machine(program.config, np.zeros(program.dram_bytes, np.uint8))

    def read_register(self, index: int) -> int:
        return self.registers.get(index, 0)

    def write_register(self, index: int, value: int) -> None:
        self.registers[index] = value
        if index == Register.CONTROL and value & Control.START:
            self.machine.run(self.registers[Register.PROGRAM])

    def read_memory(self, address: int, length: int) -> bytes:
        return self.machine.dram[address:address + length].tobytes()

    def write_memory(self, address: int, data: bytes) -> None:
        self.images += address == 0
        self.machine.dram[address:address + len(data)] = np.frombuffer(data, np.uint8)


def test_files_keep_choices_and_equal_arrays_once(program, tmp_path):
    program.save(tmp_path / "tasks.moe")
    read = Program.load(tmp_path / "tasks.moe")
    assert read.choices == CHOICES and read.image == program.image
    assert [step.choice for step in read.steps] == [{"task": 0}, {"task": 1}]
    experts = [next(op for op in step.operations if isinstance(op, Experts)) for step in read.steps]
    assert experts[0].up is experts[1].up and experts[0].down is experts[1].down
    for task in (0, 1):
        feeds = {"image": IMAGES, "task": np.array([task])}
        np.testing.assert_array_equal(Session(read, "golden").run(None, feeds)[0],
                                      Session(program, "torch").run(None, feeds)[0])


def test_stages_can_be_dumped_and_resumed(made, program, tmp_path):
    path = made()[1]
    options = {"choices": CHOICES, "trace": True, "dump": tmp_path}
    compile_model(path, CONFIGS[0], CALIBRATION, **options)
    for start in list(STAGES)[1:]:
        resumed = compile_model(path, CONFIGS[0], CALIBRATION, **options, start=start)
        assert resumed.image == program.image and resumed.choices == CHOICES
    with pytest.raises(CompileError, match=r"must be of the choices \{\}, not .*start at load"):
        compile_model(path, CONFIGS[0], CALIBRATION, dump=tmp_path, start="tile")


@pytest.mark.parametrize("feeds, message", [
    ({}, r"must have the input 'task' \(one of \[0, 1\]\), not only \['image'\]"),
    ({"task": 2}, r"'task' must be one of \[0, 1\], not 2: compile"),
    ({"task": np.array([0, 1])}, r"must be one integer .* not int64 \[2\]"),
    ({"task": 1.0}, r"must be one integer .*, not float64 \[\]"),
    ({"task": True}, "must be one integer .*, not bool"),
    ({"task": 1, "tusk": 1}, r"one of the inputs \['image', 'task'\], not 'tusk'"),
])
def test_wrong_tasks_are_refused(program, feeds, message):
    with pytest.raises(FeedError, match=message):
        Session(program, "torch").run(None, {"image": IMAGES, **feeds})


def test_sessions_list_the_choice(program):
    image, task = Session(program, "torch").get_inputs()
    assert image.name == "image" and (task.name, task.shape, task.type) == (
        "task", [], "tensor(int64)")


@pytest.mark.parametrize("choices, message", [
    ({"tusk": [0]}, r"must be one of the model's inputs \['image', 'task'\], not 'tusk'"),
    ({"image": [0]}, "'image' must be one integer, of shape .*, not float32"),
    ({"task": []}, r"must be one or more different integers, not \[\]"),
    ({"task": [1, 1]}, r"different integers, not \[1, 1\]"),
    ({"task": [0.5]}, r"different integers, not \[0.5\]"),
    ({"task": [0, 2]}, "Choice task = 2 must be an index into the constant of shape"),
    ({"task": [1 << 63]}, "must be int64, not 9223372036854775808"),
    (None, r"'task' must have a shape whose first axis is the batch; .*--choices task=0,1"),
])
def test_wrong_choices_are_refused(made, choices, message):
    with pytest.raises(CompileError, match=message):
        compile_model(made()[1], CONFIGS[0], CALIBRATION, choices=choices)


def test_graphs_that_differ_are_refused(made, tmp_path):
    """A model whose task also decides between two functions of different operators."""
    model = onnx.load(str(made()[1]))
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    head.output[0] = "plain"
    branches = [onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["plain"], [f"{operator}_out"])], operator, [],
        [onnx.helper.make_tensor_value_info(f"{operator}_out", onnx.TensorProto.FLOAT, None)])
        for operator in ("Softmax", "Sigmoid")]
    model.graph.node.extend([
        onnx.helper.make_node("Cast", ["task"], ["flag"], to=onnx.TensorProto.BOOL),
        onnx.helper.make_node("If", ["flag"], ["logits"], then_branch=branches[0],
                              else_branch=branches[1])])
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path))
    with pytest.raises(CompileError, match=r"must be the same for all choices, not \S+ for task = 0 "
                                           r"and \S+ for task = 1"):
        compile_model(path, CONFIGS[0], CALIBRATION, choices=CHOICES)


def test_command_line(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[0].to_dict()))
    np.savez("data.npz", images=CALIBRATION["image"], task=1)
    np.savez("images.npz", image=IMAGES)
    path = str(made()[1])

    def run(*arguments):
        capsys.readouterr()
        status = cli.main(arguments)
        return status, *capsys.readouterr()
    assert "17/17 nodes" in run("check", path, "--choices", "task=0,1")[1]
    assert run("compile", path, "--config", "config.json", "--calibration", "data.npz", "--choices",
               "task=0,1", "-o", "m.moe", "--trace")[0] == 0
    assert run("run", "m.moe", "images.npz", "--choose", "task=1", "-o", "out.npz",
               "--device", "torch")[0] == 0
    expected = moeware.Session("m.moe", "torch").run(None, {"image": IMAGES, "task": 1})[0]
    np.testing.assert_array_equal(np.load("out.npz")["logits"], expected)
    status, _, error = run("run", "m.moe", "images.npz", "--device", "torch")
    assert status == 1 and "must have the input 'task' (one of [0, 1])" in error
    status, out, _ = run("simulate", "m.moe", "images.npz", "--choose", "task=1", "--device",
                         "golden", "--device", "torch", "--compare")
    assert status == 0 and "0 differences" in out
