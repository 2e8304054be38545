"""How the compiler ends on damaged files: counts by kind and outcome, the slowest, the largest."""

import sys
from collections import Counter

from record import ROOT, record

sys.path.insert(0, str(ROOT))
from tests.compiler.ordeal import MODELS, TEXTS, verdicts

CASES = 2080  # 40 of each kind
OUTCOMES = ("refused", "compiled and equal", "compiled", "failed")


def main() -> None:
    found = []
    for each in verdicts(0, CASES):
        found.append(each)
        if each.outcome == "failed":
            print(f"seed {each.seed}, {each.kind} in {each.model}: {each.message}", flush=True)
    total = Counter(each.outcome for each in found)
    kinds = dict.fromkeys(each.kind for each in found)
    counts = Counter((each.kind, each.outcome) for each in found)
    slowest = max(found, key=lambda each: each.seconds)
    largest = max(found, key=lambda each: each.megabytes)
    table = [["kind of damage", *OUTCOMES],
             *([kind, *(counts[kind, outcome] for outcome in OUTCOMES)] for kind in sorted(kinds))]
    figures = {"cases": len(found), "kinds of damage": len(kinds),
               **{outcome: total[outcome] for outcome in OUTCOMES},
               "slowest, s of processor": round(slowest.seconds, 2),
               "largest, MB resident with all imports": round(largest.megabytes)}
    record("bad-input", "Damaged files",
           f"Seeds 0 to {CASES - 1}, each a damaged copy of one of {len(MODELS) + len(TEXTS)} small "
           "models, compiled from load to emit (one in five: `moeware check`). Refused: by an error "
           "that names the node, constant or file, the rule and a remedy. Compiled and equal: the "
           "float graph agrees with ONNX Runtime on the damaged file to 1e-4. Compiled: `check` "
           "accepts the file, or ONNX Runtime does not run it. Failed: all else, and more than 10 s "
           "of processor or 1 GB resident. By `python -m tests.compiler.ordeal FIRST LAST`.",
           figures, tables={"Cases by kind and outcome": table},
           notes=[f"Slowest: {slowest.kind} in {slowest.model} (seed {slowest.seed}); largest: "
                  f"{largest.kind} in {largest.model} (seed {largest.seed})."])


if __name__ == "__main__":
    main()
