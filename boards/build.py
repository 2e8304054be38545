"""From a configuration to a bitstream, in one call."""

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from amaranth.lib import wiring

from moeware.hw.arch.config import Config

from .board import Board
from .floorplan import floorplan
from .tools import TOOLS, BuildError, find

__all__ = ["BuildError", "build"]

NAME = "top"
SEEDS = 3
# The default, router1, rips up one wire at a time and hardly ends where many block RAMs and
# multipliers crowd; router2 negotiates all wires at once (PathFinder).
ROUTER = "router2"
# The default, heap, moves carry chains and wide memories far from where they are wanted, the more the
# fuller the device is; the electrostatic placer spreads all cells at once.
PLACER = "static"
LOGIC = ("TRELLIS_COMB", "TRELLIS_FF", "TRELLIS_RAMW", "DP16KD", "MULT18X18D")
Progress = Callable[[str], None]


def build(board: Board, config: Config, out_dir: str | Path, *, clock_hz: int | None = None,
          seed: int | None = None, seeds: int = SEEDS, progress: Progress | None = None,
          accelerator: wiring.Component | None = None) -> dict:
    """Make the bitstream of a configuration for a board.

    Writes ``<board.name>.bit``, ``report.json`` and ``nextpnr.log`` into `out_dir`, each complete
    or not at all. Needs no vendor tool and no environment variable: the tools come from PyPI
    (``pip install 'moeware[build]'``). Takes minutes.

    Parameters
    ----------
    clock_hz : system clock; by default the board's.
    seed, seeds : the first placement to try, by default the board's, and how many before the clock is
        given up.
    progress : called with one line of text at each step.
    accelerator : replaces the accelerator of `config`, for tests.

    Returns
    -------
    The report: ``board``, ``config``, ``digest``, ``bitstream`` (file name), ``clock_hz``,
    ``fmax_mhz`` (by clock), ``met``, ``utilisation`` (by resource ``used`` and ``available``),
    ``sdram`` (``clock_hz``, ``phase_degrees``, ``capture_cycles``, ``margin_ns``), ``seed``,
    ``seconds`` and ``tools`` (versions).

    Raises
    ------
    BuildError
        A tool is missing or fails, a resource does not suffice (the message names it), or no
        placement reaches the clock.
    ClockError
        A `clock_hz` that cannot be made.
    """
    from .top import BoardTop

    notify = progress or (lambda line: None)
    started = time.monotonic()
    tools = {name: find(name) for name in ("yosys", "nextpnr-ecp5", "ecppack")}
    for name, path in tools.items():
        if path is None:
            raise BuildError(f"Building needs {name}, which is not installed. Run "
                             f"`pip install {TOOLS[name].package}`.")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix=".build-", dir=out) as folder:
        notify(f"Generating gateware for {board.name}")
        top = BoardTop(board, config, clock_hz=clock_hz, accelerator=accelerator)
        platform = board.platform()
        platform.prepare(top, NAME).extract(folder)
        if Path(tools["yosys"]).name.startswith("yowasp") and not yowasp_is_compiled():
            notify("The first call of a YoWASP tool compiles it, which takes about a minute, once")

        notify("Synthesising (yosys)")
        run("yosys", [tools["yosys"], "-q", "-l", "yosys.log", f"{NAME}.ys"], folder)
        choose_sites(Path(folder, f"{NAME}.json"), platform.device, notify)
        seed = board.seed if seed is None else seed
        report = place_and_route(tools["nextpnr-ecp5"], platform, folder, range(seed, seed + seeds),
                                 notify)
        notify("Packing the bitstream (ecppack)")
        run("ecppack", [tools["ecppack"], "--compress", "--input", f"{NAME}.config",
                        "--bit", f"{NAME}.bit"], folder)

        report = {
            "board": board.name,
            "config": config.to_dict(),
            "digest": config.digest,
            "bitstream": f"{board.name}.bit",
            "clock_hz": top.plan.clock_hz,
            **report,
            "sdram": {"clock_hz": top.plan.sdram_hz,
                      "phase_degrees": top.plan.phase_degrees,
                      "capture_cycles": top.plan.capture_cycles,
                      "margin_ns": top.plan.margin_ns},
            "seconds": round(time.monotonic() - started, 1),
            "tools": {"amaranth": version("amaranth"),
                      **{name: TOOLS[name].version() for name in tools}},
        }
        Path(folder, "report.json").write_text(json.dumps(report, indent=2) + "\n")
        for made, kept in [("nextpnr.log", "nextpnr.log"), (f"{NAME}.bit", report["bitstream"]),
                           ("report.json", "report.json")]:
            os.replace(Path(folder, made), out / kept)
    notify(f"Wrote {out / report['bitstream']}: {summary(report)}")
    return report


def choose_sites(netlist: Path, device: str, notify: Progress) -> None:
    """Fix multipliers and block RAMs in the netlist, see `floorplan`."""
    notify("Choosing sites of multipliers and block RAMs")
    cells = json.loads(netlist.read_text())
    floorplan(cells, device)
    netlist.write_text(json.dumps(cells))


def place_and_route(nextpnr: str, platform, folder: str, seeds: range, notify: Progress) -> dict:
    """Try placements until one reaches all clocks; its part of the report."""
    best = 0.0
    for seed in seeds:
        notify(f"Placing and routing (nextpnr, seed {seed}); minutes for a large design")
        command = [nextpnr, "--quiet", "--log", "nextpnr.log", "--report", "nextpnr.json",
                   "--timing-allow-fail", "--seed", str(seed), "--placer", PLACER,
                   "--router", ROUTER,
                   *device_options(platform),
                   "--json", f"{NAME}.json", "--lpf", f"{NAME}.lpf", "--textcfg", f"{NAME}.config"]
        log = Path(folder, "nextpnr.log")
        try:
            run("nextpnr", command, folder)
        except BuildError:
            check_fit(used_in_log(log.read_text() if log.exists() else ""))
            raise
        report = json.loads(Path(folder, "nextpnr.json").read_text())
        check_fit(report["utilization"])
        fmax = report["fmax"]
        share = min(clock["achieved"] / clock["constraint"] for clock in fmax.values())
        fmax_mhz = {name: round(clock["achieved"], 2) for name, clock in fmax.items()}
        if share >= 1:
            return {"fmax_mhz": fmax_mhz, "met": True, "seed": seed, "utilisation": {
                resource: count for resource, count in report["utilization"].items()
                if count["used"]}}
        best = max(best, share)
        wanted = {name: round(clock["constraint"], 2) for name, clock in fmax.items()}
        notify(f"Seed {seed} reaches {fmax_mhz} MHz, not {wanted} MHz")
    raise BuildError(f"Clock must be reached, but the best of {len(seeds)} placements reached "
                     f"{best:.0%} of it. Lower clock_hz, try more seeds, or make the configuration "
                     f"smaller.")


def device_options(platform) -> list[str]:
    """What nextpnr must know of the device, as Amaranth's platform has it."""
    return [platform._nextpnr_device_options[platform.device], "--speed", platform.speed,
            "--package", platform._nextpnr_package_options[platform.package].upper()]


def used_in_log(log: str) -> dict[str, dict[str, int]]:
    """The utilisation that nextpnr prints before it places."""
    rows = re.findall(r"Info:\s+(\w+):\s+(\d+)/\s*(\d+)\s+\d+%", log)
    return {resource: {"used": int(used), "available": int(available)}
            for resource, used, available in rows}


def check_fit(utilisation: dict[str, dict[str, int]]) -> None:
    over = [f"{count['used']} of {count['available']} {resource}"
            for resource, count in utilisation.items() if count["used"] > count["available"]]
    if over:
        raise BuildError(f"Design does not fit: it needs {', '.join(over)}. Make the configuration "
                         f"smaller.")


def run(name: str, command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"{name} must succeed, but ended with status {done.returncode}:\n"
                         f"{done.stdout[-3000:]}")


def yowasp_is_compiled() -> bool:
    """Whether a YoWASP tool has run on this machine before (it keeps what it compiled)."""
    cache = os.environ.get("YOWASP_CACHE_DIR")
    folders = [Path(cache)] if cache else list(Path.home().glob(".cache/YoWASP*"))
    return any(folder.exists() for folder in folders)


def summary(report: dict) -> str:
    fullest = max(((name, count) for name, count in report["utilisation"].items()
                   if name in LOGIC), key=lambda item: item[1]["used"] / item[1]["available"])
    return (f"{min(report['fmax_mhz'].values())} MHz reached, {report['clock_hz'] / 1e6:g} MHz "
            f"used; fullest resource {fullest[0]} {fullest[1]['used']} "
            f"of {fullest[1]['available']}")
