"""The table of operators says what the compiler does."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from moeware.compiler import canonical, fuse
from moeware.compiler.fuse.norm import fuse_norm

SCRIPT = Path(__file__).parents[1] / "docs" / "operators.py"


@pytest.fixture
def operators():
    spec = importlib.util.spec_from_file_location("operators_page", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_every_operator_is_described(operators):
    forms, operands = operators._forms(), operators._operands()
    assert set(operators.kinds.READS) <= set(forms) <= set(canonical.OPERATORS)
    assert set(operands) == set(canonical.OPERATORS) and all(forms.values())
    assert all(map(operators._limits, canonical.OPERATORS))
    for operator, (_, _, attributes) in canonical._SIGNATURES.items():
        assert all(name in " ".join(operands[operator][1]) for name in attributes)


def test_a_new_rule_is_picked_up(operators, monkeypatch):
    def fuse_new(model):
        """Replace something new by ``Linear``, as ``Strange`` operators.

        More about it.
        """
    monkeypatch.setattr(operators, "RULES", (*fuse.RULES, fuse_new))
    assert operators._forms()["Linear"][-1].startswith("Replace something new by ``Linear``")
    assert operators.page() != operators.PAGE.read_text()
    fuse_new.__doc__ = "New.\n\nForms\n-----\nLayerNorm\n    - one form,\n      wrapped\n    - another"
    assert operators._forms()["LayerNorm"][-2:] == ["one form, wrapped", "another"]
    fuse_new.__doc__ = "New.\n\nForms\n-----\nStrange\n    - one"
    with pytest.raises(ValueError, match="Forms of fuse_new must be of canonical operators"):
        operators._forms()


def test_a_changed_rule_makes_the_page_stale(operators, monkeypatch):
    monkeypatch.setattr(fuse_norm, "__doc__", fuse_norm.__doc__.replace("the last", "any"))
    assert operators.page() != operators.PAGE.read_text()


def test_what_the_partition_does_not_read_is_for_the_host(operators, monkeypatch):
    reads = {name: kinds for name, kinds in operators.kinds.READS.items() if name != "Add"}
    monkeypatch.setattr(operators.kinds, "READS", reads)
    assert operators._place("Add") == ("host", "", "")
    assert operators._place("Pointwise") == ("accelerator", "linear", "function")
