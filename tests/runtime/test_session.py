"""Sessions, the host's routine that drives a board, and what happens when a board vanishes."""

import logging

import numpy as np
import onnx
import pytest

from moeware.hw.arch.config import Config
from moeware.hw.arch.program import DeviceStep, HostStep, Program, ProgramError
from moeware.hw.arch.registers import MAGIC, Control, Register, Status
from moeware.runtime import board_device, drive
from moeware.runtime.board_device import BoardDevice, open_board
from moeware.runtime.device import DeviceError, DeviceLost, device_names, open_device
from moeware.runtime.feeds import FeedError
from moeware.runtime.serial_link import LinkError
from moeware.runtime.session import PlacementError, Session

from .reference import CONFIG, Graph, evaluate

ROWS, CHANNELS = 3, 6
OTHER = Config.from_dict(CONFIG.to_dict() | {"queue": 5})


@pytest.fixture
def program() -> Program:
    graph = Graph(0)
    source = graph.input(ROWS, CHANNELS)
    graph.add_linear(graph.linear(source, 5, table=True), None, 4)
    program = graph.program("linear0", "addlinear1")
    program.image = np.random.default_rng(0).bytes(1000)
    for part in (*program.steps[0].inputs, *program.steps[0].outputs):
        object.__setattr__(part.region, "address", part.region.address + 1024)
    return program


def feeds(frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"input0": random.normal(0, 1, (frames, ROWS, CHANNELS)).astype(np.float32)}


def expected(program: Program, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs by the reference."""
    step = program.steps[0]
    integers = evaluate(step.operations, {p.tensor: p.quantise(given[p.name]) for p in step.inputs})
    return [port.dequantise(integers[port.tensor]) for port in step.outputs]


class FakeBoard:
    """A link to a board that runs the reference on what lies in its memory."""

    def __init__(self, program: Program, *, digest: int = CONFIG.digest, magic: int = MAGIC,
                 runs_until_lost: int | None = None):
        self.program, self.left = program, runs_until_lost
        self.memory = bytearray(np.random.default_rng(1).bytes(4096))
        self.registers = {Register.MAGIC: magic, Register.DIGEST: digest, Register.STATUS: 0}
        self.polls = 0
        self.writes: list[int] = []
        self.error = self.stuck = self.closed = False

    def read_register(self, index: int) -> int:
        if index == Register.STATUS and self.polls:
            self.polls -= 1
            return Status.BUSY
        return self.registers.get(index, 100 + index)

    def write_register(self, index: int, value: int) -> None:
        self.registers[index] = value
        if index == Register.CONTROL and value & Control.START:
            self._start()

    def read_memory(self, address: int, length: int) -> bytes:
        return bytes(self.memory[address:address + length])

    def write_memory(self, address: int, data: bytes) -> None:
        self.writes.append(address)
        self.memory[address:address + len(data)] = data

    def close(self) -> None:
        self.closed = True

    def _start(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise LinkError("cable pulled")
        self.polls = 1 << 60 if self.stuck else 2
        self.registers[Register.STATUS] = Status.DONE | (Status.ERROR if self.error else 0)
        image = self.program.image
        assert self.memory[:len(image)] == image
        step, config = self.program.steps[0], self.program.config
        assert self.registers[Register.PROGRAM] == step.entry

        def region(part) -> slice:
            return slice(part.region.address, part.region.address + part.region.bytes(config))
        inputs = {port.tensor: port.region.unpack(config, bytes(self.memory[region(port)]))[None]
                  for port in step.inputs}
        values = evaluate(step.operations, inputs)
        for port in step.outputs:
            self.memory[region(port)] = port.region.pack(config, values[port.tensor][0])


@pytest.fixture
def boards(monkeypatch):
    """Fake boards by the name of their port."""
    found: dict[str, FakeBoard | Exception] = {}

    def link(port: str):
        if isinstance(found[port], Exception):
            raise found[port]
        return found[port]
    monkeypatch.setattr(board_device, "find_ports", lambda: sorted(found))
    monkeypatch.setattr(board_device, "SerialLink", link)
    monkeypatch.setattr(drive, "POLL_INTERVAL_S", 0)
    return found


def assert_equal(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def test_session_describes_the_model(program):
    session = Session(program, "torch")
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("input0", ["batch", ROWS, CHANNELS], "tensor(float)")]
    assert [o.name for o in session.get_outputs()] == ["linear0", "addlinear1"]
    assert session.placement == "graph: 2/2 nodes on fpga program, executed by torch"
    assert session.device_name == "torch" and session.last_counters == []


def test_session_answers_from_a_file(program, tmp_path):
    program.save(tmp_path / "model.moe")
    session = Session(tmp_path / "model.moe", "torch")
    for frames in (1, 5):
        given = feeds(frames, seed=frames)
        assert_equal(session.run(None, given), expected(program, given))
    assert_equal(session.run(["addlinear1"], given), expected(program, given)[1:])
    assert_equal(session.run(["addlinear1", "linear0"], given), expected(program, given)[::-1])


def test_a_damaged_file_is_refused(program, tmp_path):
    program.save(tmp_path / "model.moe")
    raw = (tmp_path / "model.moe").read_bytes()
    (tmp_path / "model.moe").write_bytes(raw[:-1])
    with pytest.raises(ProgramError, match="truncated or damaged"):
        Session(tmp_path / "model.moe", "torch")


def test_auto_takes_pytorch_without_a_board(program, boards, caplog):
    with caplog.at_level(logging.INFO, "moeware"):
        session = Session(program)
    assert session.placement == ("graph: 2/2 nodes on fpga program, executed by torch "
                                 "(no board found)")
    assert [(r.levelname, r.message) for r in caplog.records] == [("WARNING", session.placement)]


def test_auto_takes_the_board_that_answers(program, boards, caplog):
    boards["a"] = LinkError("port is busy")
    boards["b"] = FakeBoard(program, magic=5)
    boards["c"] = FakeBoard(program, digest=OTHER.digest)
    boards["d"] = FakeBoard(program)
    with caplog.at_level(logging.WARNING, "moeware"):
        session = Session(program)
    assert session.placement.endswith("executed by board on d") and not caplog.records
    assert boards["b"].closed and boards["c"].closed and not boards["d"].closed
    given = feeds(3)
    assert_equal(session.run(None, given), expected(program, given))
    assert len(session.last_counters) == 3
    assert session.last_counters[0]["cycles"] == 100 + Register.CYCLES
    assert set(session.last_counters[0]) == set(drive.counter_names())


def test_auto_names_what_it_found_instead(program, boards):
    boards["a"] = FakeBoard(program, magic=5)
    boards["c"] = FakeBoard(program, digest=OTHER.digest)
    placement = Session(program).placement
    assert "executed by torch" in placement and "MAGIC" in placement
    assert f"{OTHER.digest:#010x}" in placement and f"{CONFIG.digest:#010x}" in placement


def test_a_board_asked_for_must_be_there(program, boards):
    for options in ({"strict": True}, {"fallback": False}):
        with pytest.raises(DeviceError, match="no board found"):
            Session(program, "board", **options)
    assert Session(program, "board").device_name == "torch"
    boards["x"] = FakeBoard(program)
    assert Session(program, "board", port="x", strict=True).device_name == "board on x"


def test_a_board_that_vanishes(program, boards, caplog):
    boards["a"] = FakeBoard(program, runs_until_lost=2)
    session, given = Session(program), feeds(4)
    with caplog.at_level(logging.WARNING, "moeware"):
        assert_equal(session.run(None, given), expected(program, given))
    assert session.device_name == "torch" and session.last_counters == []
    assert len(caplog.records) == 1 and "cable pulled" in caplog.records[0].message
    assert_equal(session.run(None, given), expected(program, given))


def test_a_board_that_vanishes_without_fallback(program, boards):
    boards["a"] = FakeBoard(program, runs_until_lost=2)
    session = Session(program, fallback=False)
    with pytest.raises(DeviceLost, match="cable pulled"):
        session.run(None, feeds(4))


def test_a_device_of_another_configuration(program):
    class Other:
        name, config, counters = "other", OTHER, []
    with pytest.raises(DeviceError) as error:
        Session(program, Other())
    for config in (CONFIG, OTHER):
        assert f"{config.digest:#010x}" in str(error.value)
        assert str(config.to_dict()) in str(error.value)


def test_a_board_without_expectations_checks_each_program(program):
    board = BoardDevice(FakeBoard(program, digest=OTHER.digest))
    with pytest.raises(DeviceError, match="must have the digest"):
        board.run(program, program.steps[0], {"input0": np.zeros((1, ROWS, CHANNELS))})


def test_the_image_is_written_once(program):
    link = FakeBoard(program)
    session = Session(program, BoardDevice(link, CONFIG))
    given = feeds(2)
    for _ in range(2):
        assert_equal(session.run(None, given), expected(program, given))
    assert link.writes.count(0) == 1
    link.memory[990:1000] = bytes(10)  # someone else's program
    assert_equal(session.run(None, given), expected(program, given))
    assert link.writes.count(0) == 2
    program.image = bytes(reversed(program.image))
    assert_equal(session.run(None, given), expected(program, given))
    assert link.writes.count(0) == 3


def test_counters_are_read_in_one_exchange_where_that_is_possible(program):
    link = FakeBoard(program)
    one_by_one = drive.read_counters(link)
    link.read_registers = lambda first, count: [link.read_register(first + i) for i in range(count)]
    assert drive.read_counters(link) == one_by_one


@pytest.mark.parametrize("fault, message", [("error", "illegal instruction after 106 instruct"),
                                            ("stuck", "must end within 0.01 s")])
def test_a_run_that_fails_is_no_lost_board(program, fault, message):
    link = FakeBoard(program)
    session = Session(program, BoardDevice(link, CONFIG, timeout_s=0.01))
    setattr(link, fault, True)
    with pytest.raises(DeviceError, match=message) as error:
        session.run(None, feeds(1))
    assert not isinstance(error.value, DeviceLost)
    link.polls, link.error, link.stuck = 0, False, False
    given = feeds(1)
    assert_equal(session.run(None, given), expected(program, given))


def test_a_target_may_wait_by_itself(program):
    link = FakeBoard(program)
    waited = []
    link.wait_done = lambda timeout_s: (waited.append(timeout_s), setattr(link, "polls", 0))
    given = feeds(2)
    assert_equal(Session(program, BoardDevice(link)).run(None, given), expected(program, given))
    assert waited == [10.0, 10.0]


def test_open_board_checks_the_configuration(program, boards):
    boards["a"] = FakeBoard(program)
    assert open_board(None).digest == CONFIG.digest
    with pytest.raises(DeviceError, match="must have the digest"):
        open_board(OTHER, port="a")


@pytest.mark.parametrize("change, message", [
    ({"other": np.zeros((1, 3, 6), np.float32)}, "one of the inputs .'input0'., not 'other'"),
    ({"input0": None}, "numpy array of float32"),
    ({"input0": np.zeros((1, 3, 6))}, "numpy array of float32 .*, not float64"),
    ({"input0": np.zeros((1, 6, 3), np.float32)}, r"shape \['batch', 3, 6\], not \[1, 6, 3\]"),
    ({"input0": np.zeros((3, 6), np.float32)}, r"shape \['batch', 3, 6\], not \[3, 6\]"),
    ({"input0": np.zeros((0, 3, 6), np.float32)}, "at least one frame")])
def test_wrong_feeds(program, change, message):
    with pytest.raises(FeedError, match=message):
        Session(program, "torch").run(None, feeds(1) | change)


def test_missing_feeds_and_unknown_outputs(program):
    session = Session(program, "torch")
    with pytest.raises(FeedError, match="must have the input 'input0'"):
        session.run(None, {})
    with pytest.raises(FeedError, match="one of .'linear0', 'addlinear1'., not 'logits'"):
        session.run(["logits"], feeds(1))


def host_step(batch: int | str) -> HostStep:
    """answer = -addlinear1"""
    graph = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> g (float[{batch}, {ROWS}, 4] addlinear1) => '
        f'(float[{batch}, {ROWS}, 4] answer) {{ answer = Neg(addlinear1) }}')
    return HostStep(model=graph.SerializeToString(), inputs=["addlinear1"], outputs=["answer"],
                    reasons={"/neg": "Neg is not a supported form"})


@pytest.mark.parametrize("batch", [1, "n"])
def test_host_steps(program, batch, caplog):
    program.steps.append(host_step(batch))
    program.outputs = [("answer", (ROWS, 4), "tensor(float)")]
    given = feeds(3)
    with caplog.at_level(logging.WARNING, "moeware"):
        session = Session(program, "torch")
    assert len(caplog.records) == 1  # nobody runs on the host unseen
    assert_equal(session.run(None, given), [-expected(program, given)[1]])
    assert_equal(session.run(["answer"], given), [-expected(program, given)[1]])


def test_strict_refuses_host_nodes(program):
    program.steps.append(host_step(1))
    with pytest.raises(PlacementError, match="node /neg: Neg is not a supported form"):
        Session(program, "torch", strict=True)


def test_counters_add_up_over_steps(program):
    step = program.steps[0]
    program.steps = [step, DeviceStep(entry=0, inputs=step.inputs, outputs=step.outputs,
                                      operations=step.operations)]
    session = Session(program, BoardDevice(FakeBoard(program)))
    session.run(None, feeds(2))
    assert session.last_counters[1]["cycles"] == 2 * (100 + Register.CYCLES)


def test_unknown_devices_are_named():
    assert {"board", "torch", "golden", "rtl"} <= set(device_names())
    with pytest.raises(DeviceError, match="must be one of .*'torch'.*, not 'gpu'"):
        open_device("gpu", None)
