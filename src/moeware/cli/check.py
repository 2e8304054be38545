"""Say where each node of a model would run, and why, without compiling or building anything.

Nodes that the host runs are listed by cause: the nodes as they are called in the file, their
operators and share of the multiply-accumulates, why they are there and what to change in the export.
Below a cause stands what only follows it to the host. ``--json`` lists every node by itself, too.
"""

import textwrap
from itertools import zip_longest

from moeware.cli.input_options import add_model_options, model_options

HELP = "say which nodes of a model run on the accelerator, and what to change for the others"
NAMED = 4  # nodes that a line names; --json has all
WIDTH = 40  # of a column of words


def configure(parser) -> None:
    parser.add_argument("model", help="ONNX file")
    parser.add_argument("--config", help="name of a board, or JSON file of a Config, whose gateware "
                        "there is (default: all that there can be)")
    add_model_options(parser)
    parser.add_argument("--strict", action="store_true",
                        help="exit status 1 if a node would run on the host")


def run(arguments) -> dict:
    return placement(arguments.model, config=arguments.config, strict=arguments.strict,
                     **model_options(arguments))


def placement(model: str, choices: dict[str, list[int]] | None = None, *,
              config: str | None = None, strict: bool, **interface) -> dict:
    """The facts about an ONNX file, with the first value of each of its choices; interface : as
    `moeware.compiler.interface.Interface` takes it."""
    from moeware.api import find_config
    from moeware.compiler.choices import check_choices, combinations
    from moeware.compiler.fuse import fuse
    from moeware.compiler.interface import Interface
    from moeware.compiler.kept import Kept
    from moeware.compiler.kept_weights import survey
    from moeware.compiler.load import load
    from moeware.compiler.partition import partition
    from moeware.compiler.placement import describe, report
    from moeware.compiler.problems import problems
    first = combinations(check_choices(choices or {}))[0]
    canonical = fuse(load(model, first, Interface(**interface)))
    parts = partition(canonical, config and find_config(config))
    kept = Kept.of(canonical)
    survey(kept, parts.steps)
    facts = report(parts) | {"kept": kept.report()}
    return {"ok": not (strict and facts["host_nodes"]), "model": model,
            "placement": describe(parts), **facts,
            "problems": [problem.to_dict(facts["macs"]) for problem in problems(parts)]}


def text(facts: dict) -> str:
    from moeware.cli.tables import kept_lines, table
    kept = kept_lines(facts["kept"], "can keep")
    if not facts["problems"]:
        return "\n".join([f"{facts['model']}: {facts['placement']}", *kept])
    rows = [["node", "operator", "MACs", "why on the host", "what to change"]]
    notes: dict[int, list[str]] = {}  # below the row of this number
    for problem in facts["problems"]:
        rows += zip_longest(
            problem["nodes"][:1], textwrap.wrap(_several(problem["operators"]), WIDTH),
            [f"{problem['mac_share'] + problem['follow_mac_share']:.1%}"], textwrap.wrap(problem["reason"], WIDTH),
            textwrap.wrap(problem["remedy"], WIDTH), fillvalue="")
        notes[len(rows) - 1] = _notes(problem)
    lines = [f"{facts['model']}: {facts['placement']}", ""]
    for number, line in enumerate(table(rows, right=(2,)).splitlines()):
        lines += [line, *notes.get(number, [])]
    return "\n".join(lines + kept)


def _notes(problem: dict) -> list[str]:
    """Lines on the other places of a cause, and on what it takes along."""
    places, follow = problem["nodes"], problem["follow"]
    notes = []
    if len(places) > 1:
        notes.append(f"  {len(places)} times, also {_several(places[1:])}")
    if follow:
        notes.append(f"  takes along {len(follow)} more, {problem['follow_mac_share']:.1%} of MACs: "
                     f"{_several(follow)}")
    return notes


def _several(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
