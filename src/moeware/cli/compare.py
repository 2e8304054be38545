"""Compare a program's integers with the float model, layer by layer, on inputs from a file.

Of each tensor the signal-to-noise ratio in dB, of each router the share of tokens that it sends to
the same experts as in float, and the first layer that is below a limit. Layers stand in order of
computation, under the compiler's names and those of the first of their nodes in the ONNX file; what
a layer adds to the residual stream stands before the stream with it. No gateware is needed: the
integers are those of every device.
"""

from moeware.cli.input_options import add_input_options, read_program

HELP = "compare a program with the float model, layer by layer"


def configure(parser) -> None:
    parser.add_argument("model", help="ONNX file that the program was compiled from")
    add_input_options(parser)
    parser.add_argument("--frames", type=int, help="compare only so many")
    parser.add_argument("--least-snr", type=float, default=20.0, metavar="DB",
                        help="a tensor below is degraded (default: 20, noise a tenth of the signal)")
    parser.add_argument("--least-agreement", type=float, default=0.9, metavar="SHARE",
                        help="so is a router with fewer tokens sent as in float (default: 0.9)")
    parser.add_argument("-o", "--output", help=".png file for a plot")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if a layer is degraded")


def run(arguments) -> dict:
    import moeware
    from moeware.accuracy_plot import plot
    from moeware.cli.inputs import read_inputs
    from moeware.cli.progress import frames_bar
    program = read_program(arguments)
    feeds = read_inputs(arguments.inputs, program, array=arguments.array, frames=arguments.frames,
                        choice=dict(arguments.choose))
    with frames_bar("compare") as progress:
        accuracy = moeware.compare(arguments.model, program, feeds,
                                   least_snr_db=arguments.least_snr,
                                   least_agreement=arguments.least_agreement, progress=progress)
    if arguments.output:
        plot(arguments.output, accuracy)
    facts = accuracy.to_dict()
    return {"ok": not (arguments.strict and facts["degraded"]), "model": arguments.model,
            "program": arguments.program, "plot": arguments.output, **facts}


def text(facts: dict) -> str:
    from moeware.cli.tables import table
    rows = [["layer", "operator", "node", "SNR", "same experts", ""]]
    for layer in facts["layers"]:
        first = "first below the limit" if layer["layer"] == facts["degraded"] else ""
        place = [layer["layer"], layer["operator"], layer["source"]]
        if "tokens" in layer:
            rows.append([*place, "", f"{layer['tokens']:.1%}", first])
        else:
            snr = "no error" if layer["snr_db"] is None and not layer["rms_error"] else (
                "no signal" if layer["snr_db"] is None else f"{layer['snr_db']:.1f} dB")
            rows.append([*place, snr, "", first])
    limits = f"{facts['least_snr_db']:g} dB or {facts['least_agreement']:.0%} of tokens"
    lines = [f"{facts['program']} against {facts['model']}, {facts['frames']} frames",
             table(rows, right=(3, 4)),
             f"first layer below {limits}: {facts['degraded'] or 'none'}"]
    if facts["plot"]:
        lines.append(f"plot: {facts['plot']}")
    return "\n".join(lines)
