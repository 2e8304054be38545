"""Rooms import each other only as the table of the architecture allows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moeware

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "hw.arch": set(),
    "hw": {"hw.arch"},
    "compiler": {"hw.arch"},
    "runtime": {"hw.arch"},
    "sim": {"hw", "hw.arch", "runtime"},
    "boards": {"hw", "hw.arch"},
}


def room(module: str) -> str | None:
    """The room of a module of moeware; "" for what stands above all rooms, None for others."""
    name = module.split(".")
    if name[0] != "moeware":
        return None
    inner = name[1:]
    if inner[:2] == ["hw", "arch"]:
        return "hw.arch"
    return inner[0] if inner and inner[0] in ALLOWED else ""


def imports(path: Path, module: str) -> set[str]:
    """Names of all modules that a file of source imports, wherever in it, in full."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def files() -> list[tuple[str, Path, str]]:
    found = []
    for folder in ("hw", "compiler", "runtime", "sim", "boards"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(("moeware", *(part for part in parts if part != "__init__")))
            found.append((room(module), path, module))
    return found


@pytest.mark.parametrize("name", ALLOWED)
def test_rooms_import_what_the_table_allows(name):
    checked = 0
    for own, path, module in files():
        if own != name:
            continue
        checked += 1
        for imported in imports(path, module):
            target = room(imported)
            assert target in (None, own, *ALLOWED[own]), f"{module} imports {imported}"
    assert checked


def test_the_contract_needs_the_standard_library_and_numpy_only():
    for own, path, module in files():
        if own == "hw.arch":
            for imported in imports(path, module):
                first = imported.split(".")[0]
                assert first in sys.stdlib_module_names | {"numpy", "moeware"}, (path, imported)


def test_relative_imports_are_resolved(tmp_path):
    file = tmp_path / "unit.py"
    file.write_text("from ..arch import isa\nfrom . import rows\nimport numpy as np\n"
                    "def f():\n    from ...compiler.load import load\n")
    assert imports(file, "moeware.hw.linear.unit") == {
        "moeware.hw.arch.isa", "moeware.hw.linear.rows", "numpy", "moeware.compiler.load.load"}
    assert room("moeware.hw.arch.isa") == "hw.arch" and room("moeware.hw.linear.rows") == "hw"
    assert room("moeware.api") == "" and room("numpy") is None


@pytest.mark.parametrize("code, unwanted", [
    ("import moeware", "amaranth torch onnx onnxruntime onnx_ir serial"),
    ("import moeware; moeware.Session", "amaranth torch onnx onnxruntime onnx_ir"),
    ("import moeware.cli; moeware.cli.main(['doctor'])", "torch onnx onnxruntime onnx_ir"),
    ("from moeware.runtime.device import open_device; open_device('torch', None)",
     "amaranth onnx onnx_ir moeware.compiler moeware.sim")])
def test_imports_are_light(code, unwanted):
    check = (f"{code}\nimport sys\nfound = [name for name in {unwanted.split()} "
             "if name in sys.modules]\nassert not found, found")
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_offers_its_interface():
    for name in moeware.__all__:
        assert getattr(moeware, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'session_'"):
        getattr(moeware, "session_")  # noqa: B009
