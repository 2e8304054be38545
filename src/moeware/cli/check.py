"""Say where each node of a model would run, and why, without compiling or building anything."""

from moeware.cli.input_options import add_choices_option

HELP = "say which nodes of a model run on the accelerator"


def configure(parser) -> None:
    parser.add_argument("model", help="ONNX file")
    add_choices_option(parser)
    parser.add_argument("--strict", action="store_true",
                        help="exit status 1 if a node would run on the host")


def run(arguments) -> dict:
    return placement(arguments.model, dict(arguments.choices), strict=arguments.strict)


def placement(model: str, choices: dict[str, list[int]] | None = None, *, strict: bool) -> dict:
    """The facts about an ONNX file, with the first value of each of its choices."""
    from moeware.compiler.choices import check_choices, combinations
    from moeware.compiler.fuse import fuse
    from moeware.compiler.kept import Kept
    from moeware.compiler.kept_weights import survey
    from moeware.compiler.load import load
    from moeware.compiler.partition import describe, partition, report
    first = combinations(check_choices(choices or {}))[0]
    canonical = fuse(load(model, first))
    parts = partition(canonical)
    kept = Kept.of(canonical)
    survey(kept, parts.steps)
    facts = report(parts) | {"kept": kept.report()}
    return {"ok": not (strict and facts["host_nodes"]), "model": model,
            "placement": describe(parts), **facts}


def text(facts: dict) -> str:
    from moeware.cli.tables import kept_lines
    lines = [f"{facts['model']}: {facts['placement']}"]
    for entry in facts["host"]:
        names = entry["sources"] or [entry["node"]]
        lines.append(f"  host: {entry['reason']}  (in the file: {', '.join(map(str, names))})")
    return "\n".join(lines + kept_lines(facts["kept"], "can keep"))
