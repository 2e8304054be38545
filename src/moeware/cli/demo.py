"""The whole way on a small model: digits, a mixture-of-experts vision transformer.

Compiles it, answers the held-out images with integers on PyTorch and with floats in ONNX Runtime,
runs some of them on simulated gateware and compares every layer, and writes a report with a plot.
"""

import json
import os
import tempfile
import time
from pathlib import Path

HELP = "compile, run, simulate and compare the example model"
FOLDER = Path("examples", "digits")


def configure(parser) -> None:
    parser.add_argument("--model", help=f"ONNX file (default: {FOLDER / 'digits.onnx'})")
    parser.add_argument("--samples", help=".npz file with calibration, images and labels "
                        "(default: beside the model)")
    parser.add_argument("--config", default="ulx3s-85f",
                        help="board or JSON file (default: ulx3s-85f)")
    parser.add_argument("--frames", type=int, default=20, help="images on simulated gateware; "
                        "0 leaves it out (default: 20)")
    parser.add_argument("--out", default=str(Path("build", "demo")),
                        help="folder for the report (default: build/demo)")


def run(arguments) -> dict:
    import numpy as np

    import moeware
    from moeware.cli import check
    from moeware.cli.progress import stages_bar
    began = time.perf_counter()
    model, samples = _files(arguments)
    with np.load(samples, allow_pickle=False) as archive:
        data = dict(archive)
    config = moeware.find_config(arguments.config)
    facts: dict = {"model": str(model), "check": check.placement(str(model), strict=True),
                   "config": config.to_dict(), "config_digest": f"{config.digest:#010x}"}
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    programs = {}
    for trace in (False, True):
        with stages_bar("compile, traced" if trace else "compile") as progress:
            programs[trace] = moeware.compile(model, config, str(samples), trace=trace,
                                              progress=progress)
    programs[False].save(out / "digits.moe")
    facts["accuracy"] = accuracy(model, programs[False], data["images"], data["labels"])
    facts["expert_agreement"] = expert_agreement(model, programs[False], data["images"])
    if arguments.frames:
        facts["rtl"] = simulated(programs, data["images"][:arguments.frames])
    facts["seconds"] = time.perf_counter() - began
    facts["ok"] = facts["check"]["ok"] and facts.get("rtl", {}).get("equal", True)
    facts["report"] = str(_report(out, facts))
    return facts


def _files(arguments) -> tuple[Path, Path]:
    """The model and its samples: as given, below the working folder, or below the source tree."""
    if arguments.model:
        model = Path(arguments.model)
    else:
        source = Path(__file__).resolve().parents[3]
        places = [place / FOLDER / "digits.onnx" for place in (Path(), source)]
        model = next((place for place in places if place.is_file()), places[0])
    samples = Path(arguments.samples or model.with_name(f"{model.stem}_samples.npz"))
    for path in (model, samples):
        if not path.is_file():
            raise ValueError(f"Demo must have the file {path}: run it in the source tree, or name "
                             "the file with --model and --samples")
    return model, samples


def accuracy(model: Path, program, images, labels) -> dict:
    """Share of right answers, float and integer, and how fast each was."""
    import onnxruntime

    from moeware.cli.progress import frames_bar
    from moeware.runtime.session import Session
    reference = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    session = Session(program, "torch")
    name = session.get_inputs()[0].name
    answers, seconds = {}, {}
    began = time.perf_counter()
    answers["float"] = reference.run(None, {name: images})[0].argmax(1)
    seconds["float"] = time.perf_counter() - began
    with frames_bar("images on PyTorch") as progress:
        began = time.perf_counter()
        answers["integer"] = session.run(None, {name: images}, progress=progress)[0].argmax(1)
        seconds["integer"] = time.perf_counter() - began
    return {"images": len(images), "placement": session.placement, "seconds": seconds,
            "float": float((answers["float"] == labels).mean()),
            "integer": float((answers["integer"] == labels).mean()),
            "same_answer": float((answers["float"] == answers["integer"]).mean())}


def expert_agreement(model: Path, program, images) -> dict[str, float]:
    """Share of expert choices that are those of the float model, by the name of the router."""
    import moeware
    found = moeware.compare(model, program, {program.inputs[0][0]: images})
    return {router.layer: router.choices for router in found.routers}


def simulated(programs: dict, images) -> dict:
    """Some images on gateware: counters of an average image of the program without trace, and the
    comparison of all layers of the traced one on all devices."""
    from moeware.cli.inputs import mean_counters
    from moeware.cli.progress import frames_bar
    from moeware.cli.simulate import DEVICES, compare
    from moeware.runtime.device import open_device
    from moeware.runtime.session import Session
    feeds = {programs[False].inputs[0][0]: images}
    devices = {name: open_device(device, programs[True].config)
               for name, device in DEVICES.items()}
    session = Session(programs[False], devices["RTL"])
    with frames_bar("images on gateware") as progress:
        session.run(None, feeds, progress=progress)
    counters = mean_counters(session.last_counters)
    return {"images": len(images), "counters": counters,
            **compare(programs[True], devices, feeds)}


def _report(out: Path, facts: dict) -> Path:
    """Writes report.json and plot.png; each is complete or absent."""
    handle, name = tempfile.mkstemp(dir=out, suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump(facts, file, indent=2)
    os.replace(name, out / "report.json")
    handle, name = tempfile.mkstemp(dir=out, suffix=".png")
    os.close(handle)
    _plot(Path(name), facts)
    os.replace(name, out / "plot.png")
    return out / "report.json"


def _plot(path: Path, facts: dict) -> None:
    """Accuracy as a table; how each engine spends the cycles of an image."""
    from matplotlib.figure import Figure

    from moeware.hw.arch.isa import Engine
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    left.axis("off")
    share = facts["accuracy"]
    rows = [["accuracy, float", f"{share['float']:.2%}"],
            ["accuracy, integer", f"{share['integer']:.2%}"],
            ["same answer", f"{share['same_answer']:.2%}"],
            *([f"experts as in float, {name}", f"{value:.2%}"]
              for name, value in facts["expert_agreement"].items())]
    left.table(rows, loc="center", colWidths=(0.75, 0.25)).scale(1, 1.6)
    left.set_title(f"{share['images']} held-out images")
    counters = facts.get("rtl", {}).get("counters")
    if not counters or "cycles" not in counters:
        right.axis("off")
    else:
        engines = [engine.name.lower() for engine in Engine]
        start = [0.0] * len(engines)
        for state in ("busy", "waiting"):
            values = [counters[f"{engine}_{state}"] for engine in engines]
            right.barh(engines, values, left=start, label=state)
            start = [a + b for a, b in zip(start, values)]
        right.axvline(counters["cycles"], color="black", linewidth=1)
        right.invert_yaxis()
        right.set_xlabel("cycles of an image")
        right.set_title(f"{counters['cycles']:,.0f} cycles an image")
        right.legend()
    figure.savefig(path, dpi=120)


def text(facts: dict) -> str:
    from moeware.cli.tables import counter_table
    share = facts["accuracy"]
    lines = [f"{facts['model']}: {facts['check']['placement']}",
             (f"accuracy of {share['images']} held-out images: float {share['float']:.2%}, integer "
             f"{share['integer']:.2%}; same answer {share['same_answer']:.2%}"),
             "expert choices as in float: " + ", ".join(
                 f"{name} {value:.2%}" for name, value in facts["expert_agreement"].items()),
             (f"time for all: ONNX Runtime, float {share['seconds']['float']:.3f} s; PyTorch, "
             f"integer {share['seconds']['integer']:.3f} s")]
    if "rtl" in facts:
        lines += [f"{facts['rtl']['images']} images, all layers: {facts['rtl']['text']}",
                  "average image on gateware (100 MHz, model of a 16-bit SDRAM at 133 MHz): "
                  + counter_table(facts["rtl"]["counters"])]
    lines.append(f"report: {facts['report']} and plot.png beside it; {facts['seconds']:.0f} s")
    return "\n".join(lines)
