"""Runs `moeware demo` as the README tells, and keeps what it prints for the README."""

import json
import subprocess
import sys
import time
from pathlib import Path

from record import ROOT, record


def main() -> None:
    began = time.perf_counter()
    command = str(Path(sys.executable).with_name("moeware"))
    done = subprocess.run([command, "demo"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - began
    facts = json.loads((ROOT / "build" / "demo" / "report.json").read_text())
    record("demo", "The demo", "`moeware demo` without the set-up; with it, the first simulation's "
           "compilation counts too.",
           {"seconds": round(seconds), "values compared": facts["rtl"]["values"],
            "equal": facts["rtl"]["equal"]}, output=done.stdout)


if __name__ == "__main__":
    main()
