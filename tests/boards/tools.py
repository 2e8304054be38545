"""Stand-ins for the programs that `build` and `deploy` call."""

import json
import os
import sys
import textwrap

UTILISATION = {"TRELLIS_COMB": {"used": 5000, "available": 83640},
               "MULT18X18D": {"used": 128, "available": 156},
               "DCCA": {"used": 0, "available": 56}}


def install(folder, monkeypatch, variable, body):
    """Make `variable` name a Python program with this `body`."""
    path = folder / variable.lower()
    path.write_text(f"#!{sys.executable}\nimport json, sys, pathlib\n{textwrap.dedent(body)}")
    path.chmod(0o755)
    monkeypatch.setenv(variable, os.fspath(path))


def install_all(folder, monkeypatch, *, achieved=(120.0,), utilisation=UTILISATION, fails=False):
    """Yosys, nextpnr, which wants a site for the one multiplier, and ecppack. Placement number i reaches `achieved[i]` MHz; with `fails`,
    nextpnr prints the utilisation and fails."""
    install(folder, monkeypatch, "YOSYS", """
        assert "synth_ecp5" in pathlib.Path(sys.argv[-1]).read_text()
        cells = {"m": {"type": "MULT18X18D", "attributes": {}, "connections": {"A": [2]}}}
        pathlib.Path("top.json").write_text(json.dumps(
            {"modules": {"top": {"attributes": {"top": "1"}, "cells": cells}}}))
        """)
    install(folder, monkeypatch, "NEXTPNR_ECP5", f"""
        argument = dict(zip(sys.argv, sys.argv[1:]))
        netlist = json.loads(pathlib.Path(argument["--json"]).read_text())
        assert "BEL" in netlist["modules"]["top"]["cells"]["m"]["attributes"]
        utilisation = {json.dumps(utilisation)}
        log = "".join(f"Info: {{name:>20}}: {{n['used']:5}}/{{n['available']:5}}    10%\\n"
                      for name, n in utilisation.items())
        pathlib.Path(argument["--log"]).write_text(log)
        if {fails}:
            sys.exit("ERROR: Unable to place cell")
        assert argument["--package"] == "CABGA381" and "--85k" in sys.argv
        achieved = {list(achieved)}[int(argument["--seed"]) - 1]
        pathlib.Path(argument["--report"]).write_text(json.dumps({{
            "fmax": {{"clk": {{"achieved": achieved, "constraint": 50.0}}}},
            "utilization": utilisation}}))
        pathlib.Path(argument["--textcfg"]).write_text("config of seed " + argument["--seed"])
        """)
    install(folder, monkeypatch, "ECPPACK", """
        argument = dict(zip(sys.argv, sys.argv[1:]))
        pathlib.Path(argument["--bit"]).write_text(pathlib.Path(argument["--input"]).read_text())
        """)
