"""Say where each node of a model would run, and why, without compiling or building anything."""

HELP = "say which nodes of a model run on the accelerator"


def configure(parser) -> None:
    parser.add_argument("model", help="ONNX file")
    parser.add_argument("--strict", action="store_true",
                        help="exit status 1 if a node would run on the host")


def run(arguments) -> dict:
    from moeware.compiler.fuse import fuse
    from moeware.compiler.load import load
    from moeware.compiler.partition import describe, partition, report
    parts = partition(fuse(load(arguments.model)))
    facts = report(parts)
    return {"ok": not (arguments.strict and facts["host_nodes"]), "model": arguments.model,
            "placement": describe(parts), **facts}


def text(facts: dict) -> str:
    lines = [f"{facts['model']}: {facts['placement']}"]
    for entry in facts["host"]:
        names = entry["sources"] or [entry["node"]]
        lines.append(f"  host: {entry['reason']}  (in the file: {', '.join(map(str, names))})")
    return "\n".join(lines)
