"""The pages show what the benchmarks' result files say."""

import json
import subprocess
import sys
from pathlib import Path

from moeware.hw.arch.config import Config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from configs import TARGETS, in_flight


def test_pages_are_generated_from_the_results():
    done = subprocess.run([sys.executable, BENCHMARKS / "page.py", "--check"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_zynq_accelerators_fit():
    """Each was synthesised as it is defined now."""
    synthesised = [json.loads(path.read_text())
                   for path in BENCHMARKS.glob("results/xilinx-*.json")]
    for name, target in TARGETS.items():
        if name.startswith("zcu102"):
            result, = [result for result in synthesised if name in result["targets"]]
            # Options that are newer than the result are off by default, and then the gateware is the
            # same.
            assert Config(**result["config"]) == in_flight(target).config
            assert {"DSP48E2", "RAMB36E2"} <= set(result["used"])
            assert all(used <= result["available"][cell] for cell, used in result["used"].items())
