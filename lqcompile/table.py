"""A Report as a table for a terminal: (style, line) pairs of at most 100 columns, with colour or without."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from .errors import Reason
from .report import SETTLED, Report, advice, copy_of, predicted, size, timed, tuned, when, with_ids
from .types import Decision, Piece

WIDTH = 100
Line = tuple[str, str]
# Columns of the path, the format and what follows.
LAYER = 34


def lines(report: Report) -> Iterator[Line]:
    """Verdict first, then what to do, what was rewritten, what was kept and why, and what went wrong on the way."""
    device = str(report.device.get("name", "unknown device"))
    planned = "" if report.device.get("real", True) else " (planned for, not here)"
    head = f"lqcompile {version('lqcompile')}   {fit(device, 50)}{planned}   torch {version('torch')}"
    yield "dim", fit(head, WIDTH)
    yield "", ""
    missed = report.quantized - report.rewritten
    yield "bold green" if report.rewritten and not missed else "bold yellow", f"  {report.verdict()}"
    for line in wrap(f"what to do: {report.next_step()}", "  ", "    "):
        yield "bold", line
    if report.rewritten and report.device.get("kind") == "cpu" and not _fast(report):
        yield "dim", "  no low-bit kernel of this CPU takes these weights; lq doctor and lq kernels say which there are"
    yield from _rewritten(report)
    yield from _kept(report)
    if report.breaks:
        yield "", ""
        yield "yellow", f"  graph breaks: {len(report.breaks)}; what stands between two graphs is not compiled"
        for text in report.breaks:
            for line in wrap(text, "    ", "      "):
                yield "", line
    if report.passes:
        each = ", ".join(f"{fit(p.name, 30)} {p.seconds:.2f}" for p in report.passes)
        total = sum(p.seconds for p in report.passes)
        yield "", ""
        for line in wrap(f"passes {total:.2f} s: {each}", "  ", "    "):
            yield "dim", line
    if report.warnings:
        yield "", ""
        for text in report.warnings:
            for line in wrap(f"warning: {text}", "  ", "    "):
                yield "yellow", line


def _fast(report: Report) -> bool:
    """Whether any matmul runs by another kernel than `dense`."""
    return any(piece.kernel != "dense" for d in report.decisions for piece in d.pieces)


def _rewritten(report: Report) -> Iterator[Line]:
    groups: dict[tuple[str, str, str], list[Decision]] = defaultdict(list)
    for d in report.decisions:
        if d.outcome == "rewritten":
            groups[pattern(d.where.path), str(d.format), _kernels(d.pieces)].append(d)
    if not groups:
        return
    rows = [("layer", "format", "weights", "predicted", "kernel")]
    noted = False
    for (path, format, kernels), found in sorted(groups.items()):
        before, after = sum(d.bytes_before for d in found), sum(d.bytes_after for d in found)
        speed, ratios = predicted(found), [t for d in found if (t := timed(d, report.device)) is not None]
        shown = "" if speed is None else f"{speed[1]:.2g}x"
        if shown and all(map(tuned, found)):
            shown += " measured"
        else:
            shown += f" ({sum(ratios) / len(ratios):.2g}x measured)" if ratios else ""
            noted |= speed is not None
        rows.append(
            (
                _counted(path, [d.where.path for d in found], LAYER),
                format,
                f"{size(before)} -> {size(after)}",
                shown,
                kernels,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    yield "", ""
    for row in rows:
        start = "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)) + "  "
        style = "dim" if row is rows[0] else ""
        if len(start) > WIDTH - 24:
            yield style, fit(start.rstrip(), WIDTH)
            start = " " * 11
        for line in wrap(row[4], start, " " * len(start)):
            yield style, line
    if noted:
        yield "dim", "  predicted: by the cost model, at the least M, against the same matmul on a dense weight"


def _kept(report: Report) -> Iterator[Line]:
    groups: dict[tuple[Reason | None, str], dict[tuple[str, str, str], list[str]]] = defaultdict(dict)
    first: dict[tuple[Reason | None, str], str] = {}
    for id, d in with_ids(report.decisions):
        if d.outcome != "rewritten":
            nearest = "; ".join(f"{m.rule or 'recognition'} stopped at {m.at}" for m in d.near_misses)
            source = f"{d.where.file}:{d.where.line}" if d.where.file else ""
            row = (pattern(d.where.path), source, nearest)
            groups[d.reason, advice(d)].setdefault(row, []).append(d.where.path)
            first.setdefault((d.reason, advice(d)), id)
    if not groups:
        return
    yield "", ""
    yield "bold", f"  {report.kept} kept"
    # What a user can change stands first.
    counts = {key: sum(map(len, rows.values())) for key, rows in groups.items()}
    order = sorted(groups.items(), key=lambda g: (g[0][0] in SETTLED, -counts[g[0]], str(g[0])))
    for (reason, what), rows in order:
        sentence = reason.sentence if reason else "no reason was recorded"
        style = "" if reason in SETTLED else "yellow"
        for line in wrap(sentence, f"  {counts[reason, what]:>5}  ", " " * 9):
            yield style, line
        for line in wrap(f"advice: {what}", " " * 9, " " * 11):
            yield "", line
        layer = max(len(_counted(path, paths, 44)) for (path, _, _), paths in rows.items())
        for (path, source, nearest), paths in sorted(rows.items()):
            shown = f"{_counted(path, paths, 44):<{layer}}  {fit(source, 40, keep_end=True)}"
            yield "dim", f"{'':11}{shown}".rstrip()
            for line in wrap(f"nearest: {fit(nearest, 300)}", " " * 13, " " * 15) if nearest else []:
                yield "dim", line
        if reason not in SETTLED:
            yield "dim", fit(f"{'':11}try: lq why {first[reason, what]}", WIDTH)


def pattern(path: str) -> str:
    """A module path with its numbers as stars: equal for equal layers."""
    return re.sub(r"\b\d+\b", "*", path or "(top level)")


def _counted(path: str, paths: Sequence[str], width: int) -> str:
    """The name of one matmul, or the pattern of several and how many."""
    return f"{fit(path, width)} ({len(paths)})" if len(paths) > 1 else fit(paths[0] or path, width)


def _kernels(pieces: tuple[Piece, ...]) -> str:
    if len(pieces) == 1:
        return fit(pieces[0].kernel, 30)
    return ", ".join(f"{fit(_way(p, pieces), 30)} for {when(p)}" for p in pieces)


def _way(p: Piece, pieces: tuple[Piece, ...]) -> str:
    copy = copy_of(p, pieces)
    return f"{p.kernel} ({copy} copy)" if copy else p.kernel


def fit(text: str, width: int, keep_end: bool = False) -> str:
    """`text` in at most `width` printable characters, cut in the middle or, to keep its end, in front."""
    # A long name is cut first, at a length that escaping cannot bring below `width`.
    if len(text) > 4 * width:
        text = text[-2 * width :] if keep_end else text[: 2 * width] + text[-2 * width :]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= width:
        return text
    front = 0 if keep_end else (width - 3) // 2
    return f"{text[:front]}...{text[len(text) - (width - 3 - front) :]}"


def brief(call: str) -> str:
    """A call without its tensor operands: "to(torch.float16)" of "to(%3, torch.float16)"."""
    call = re.sub(r"\[(?:(?:%\d+|_)(?:, )?)+\]|%\d+|\b_\b", "", call)
    call = re.sub(r"(\(|, )(?:, )+", r"\1", call)
    return call.replace(", )", ")").replace("()", "")


def wrap(text: str, first: str, rest: str) -> list[str]:
    """Lines of at most WIDTH columns."""
    clean = fit(text, 2000)
    return textwrap.wrap(clean, WIDTH, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]
