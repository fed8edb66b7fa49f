"""`lq explain`, `lq why` and `lq diff`: from the arguments to what is printed, written and returned to the shell."""

from __future__ import annotations

import sys
from pathlib import Path

from . import cache, config, table, terminal, why
from .cli import Exit
from .device import Device
from .errors import Reason
from .kernels.build import has_nvrtc
from .report import Report
from .target import TargetError, explained


def explain(
    target: str, html: Path | None, json: Path | None, arch: str | None, no_gpu: bool, min_rewritten: float | None
) -> int:
    """`lq explain`. Raises ArgumentError for an unusable target or architecture."""
    if no_gpu:
        config.hide_gpus()
    device = Device.null(arch) if arch else None
    failure = None
    try:
        with terminal.progress(f"planning {table.fit(target, 60)}"):
            report = explained(target, device)
    except TargetError as error:
        failure, report = str(error), error.report or Report({}, ())
    if failure is None or report.decisions:
        terminal.show(table.lines(report))
        with terminal.progress("writing the report"):
            _write(report, html, json)
    if device is not None and not has_nvrtc():
        print(f"  planned without the kernels that need NVRTC: {Reason.NO_NVRTC.advice}", file=sys.stderr)
    if failure is not None:
        print(f"lq explain: the program failed: {failure}", file=sys.stderr)
        return Exit.USAGE
    if report.refuted:
        print(f"lq explain: {report.refuted} matmuls failed a proof or a verification", file=sys.stderr)
        return Exit.PROOF_FAILED
    share = percentage(report)
    if min_rewritten is not None and share < min_rewritten:
        print(f"lq explain: {share:.0f} % rewritten, fewer than --min-rewritten {min_rewritten:g}", file=sys.stderr)
        return Exit.FEW_REWRITTEN
    return Exit.FINE


def percentage(report: Report) -> float:
    """Packed, now or before, in percent of the matmuls that have a weight: products of two activations do not count."""
    weighed = sum(d.reason is not Reason.INPUT_WEIGHT for d in report.decisions)
    return 100.0 * (report.rewritten + report.packed) / weighed if weighed else 0.0


def _write(report: Report, html: Path | None, json: Path | None) -> None:
    text = report.json()
    # `lq why` and `lq diff` read it from here.
    cache.default().put("report", "last", text.encode(), matmuls=len(report.decisions))
    if json is not None:
        json.write_text(text + "\n", encoding="utf-8")
    if html is not None:
        report.html(html)
        print(f"\n  wrote {html}")


def tell(layer: str, source: str | None) -> int:
    """`lq why`, from a report file, a target, or the last `lq explain`. Raises ArgumentError."""
    document: why.Document
    if source is None:
        last = cache.default().get("report", "last")
        if last is None:
            print("lq why: nothing was explained yet; first: lq explain FILE.py", file=sys.stderr)
            return Exit.USAGE
        document = why.parse(last, "the last report")
    elif source.endswith(".json"):
        document = why.read(source)
    else:
        try:
            with terminal.progress(f"planning {table.fit(source, 60)}"):
                document = explained(source).document()
        except TargetError as error:
            print(f"lq why: the program failed: {error}", file=sys.stderr)
            return Exit.USAGE
    terminal.show(list(why.why(document, layer)))
    return Exit.FINE


def differ(old: Path, new: Path) -> int:
    """`lq diff`. Raises ArgumentError for a file that is no report."""
    found = why.diff(why.read(old), why.read(new))
    terminal.show(found or [("", "every decision is the same")])
    return Exit.DIFFERENT if found else Exit.FINE
