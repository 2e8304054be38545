"""The pages show what the benchmarks' result files say."""

import subprocess
import sys
from pathlib import Path


def test_pages_are_generated_from_the_results():
    page = Path(__file__).parents[1] / "benchmarks" / "page.py"
    done = subprocess.run([sys.executable, page, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
