"""python -m tests.libraries [library[:case] ...]: what became of every idiom; exit code 1 if something is wrong."""

from __future__ import annotations

import importlib
import sys
import traceback

from .harness import measure
from .nightly import LIBRARIES, verdict


def main(wanted: list[str]) -> int:
    totals, failed = [0, 0], 0
    for name in LIBRARIES:
        only = {w.partition(":")[2] for w in wanted if w.partition(":")[0] == name}
        if wanted and not only:
            continue
        try:
            library = importlib.import_module(f"{__package__}.{name}")
        except ImportError as error:
            print(f"{name}: cannot be imported: {error}"[:150])
            failed += bool(wanted)
            continue
        for case, make in library.CASES.items():
            if only - {""} and case not in only:
                continue
            label = f"{name}: {case}"
            try:
                row = measure(label, make)
            except Exception as error:  # noqa: BLE001
                print(f"{label:34} FAILS {type(error).__name__}: {str(error).strip()[:300]}")
                if only - {""}:
                    traceback.print_exc()
                failed += 1
                continue
            print(row, flush=True)
            wrong = verdict(library, case, row)
            if wrong:
                print(f"    NOT AS EXPECTED: {wrong}")
            failed += bool(wrong)
            totals[0] += row.rewritten
            totals[1] += len(row.decisions)
    print(f"{totals[0]} of {totals[1]} matmuls rewritten; {failed} wrong")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
