"""The results of `lq bench`: a row for each candidate and the facts of the machine; as text, JSON, README's table."""

from __future__ import annotations

import datetime
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

from .device import measured, processor
from .errors import ArgumentError
from .report import size

T = TypeVar("T")
SCHEMA = 1
KINDS = ("ours", "dense", "light", "neighbour")
TIMED = ("ok", "unchecked")
VERDICTS = (*TIMED, "WRONG", "FAILED")
# Least widths of the columns; the first four are aligned left.
WIDTHS = (12, 18, 9, 5, 14, 9, 6, 6, 7, 9, 8)


@dataclass(frozen=True)
class Row:
    """One candidate on one problem y[m, n] = x[m, k] @ w[n, k].T.

    kind      "ours", "dense" (the vendor's matmul on a dense weight), "light" (a read of the bytes) or "neighbour"
    bytes     of one copy of the weight as the candidate holds it; `copies` of them were rotated over
    error     ours: the largest error over its bound; neighbours: relative error in the norm; None: not checked
    median    seconds of one launch, with `least` and `most`, over `samples` samples; None where not timed
    light     median seconds in which the same bytes can be read; dense: of the vendor's matmul; both of this run
    """

    n: int
    k: int
    m: int
    format: str
    x_dtype: str
    bias: bool
    kind: str
    kernel: str
    layout: str
    bytes: int
    copies: int
    verdict: str
    note: str = ""
    error: float | None = None
    median: float | None = None
    least: float | None = None
    most: float | None = None
    samples: int = 0
    light: float | None = None
    dense: float | None = None

    @property
    def share(self) -> float | None:
        """Of the speed of light: 1 where nothing but reading the weight takes time."""
        return self.light / self.median if self.light and self.median else None

    @property
    def spread(self) -> float | None:
        """(most - least) / median."""
        if not self.median or self.least is None or self.most is None:
            return None
        return (self.most - self.least) / self.median

    @property
    def speedup(self) -> float | None:
        """How many times faster than the dense matmul."""
        return self.dense / self.median if self.dense and self.median else None


def objects(document: Mapping[str, Any], kind: type[T]) -> list[T]:
    """The rows of a results document as objects of a dataclass. Raises ArgumentError where they have other fields."""
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    rows = document.get("rows")
    if not isinstance(rows, list) or any(not isinstance(row, dict) or set(row) != names for row in rows):
        raise ArgumentError("rows", type(rows).__name__, f"a list of objects with {', '.join(sorted(names))}")
    return [kind(**row) for row in rows]


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """The rows of a results document. Raises ArgumentError where it is not one of this schema."""
    if document.get("schema") != SCHEMA:
        raise ArgumentError("schema", document.get("schema"), str(SCHEMA))
    found = objects(document, Row)
    for row in found:
        if row.kind not in KINDS or row.verdict not in VERDICTS:
            raise ArgumentError("row", (row.kind, row.verdict), f"{' | '.join(KINDS)}; {' | '.join(VERDICTS)}")
    return found


def committed() -> list[dict[str, Any]]:
    """Every results file of lqcompile/measured, parsed, in the order of names; `file` is its name.

    Raises ArgumentError where one is not of this schema.
    """
    found = measured()
    for document in found.values():
        rows_of(document)
    return [{**document, "file": name} for name, document in found.items()]


def table(document: Mapping[str, Any], ms: Sequence[int] = (1, 2, 4, 8), formats: Iterable[str] | None = None) -> str:
    """The fastest of our kernels for each shape, format and m of a results document, as a Markdown table.

    `formats` keeps those of "form:bits:group:zero", None all. A cell is the median in microseconds, the share of the
    light in percent and the ratio to the dense matmul. Raises ArgumentError for another schema.
    """
    wanted = None if formats is None else set(formats)
    best: dict[tuple[int, int, str, str], dict[int, Row]] = {}
    dtypes = set()
    for row in rows_of(document):
        format = short(row.format)
        if row.kind != "ours" or row.median is None or row.m not in ms or (wanted is not None and format not in wanted):
            continue
        dtypes.add(row.x_dtype)
        cells = best.setdefault((row.n, row.k, format, row.x_dtype), {})
        if row.m not in cells or row.median < (cells[row.m].median or 0):
            cells[row.m] = row
    head = ["N x K", "format", *(["x"] if len(dtypes) > 1 else []), "kernel", *(f"m={m}" for m in ms)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (n, k, format, dtype), cells in best.items():
        kernels = ", ".join(dict.fromkeys(row.kernel for row in cells.values()))
        first = [f"{n} x {k}", format, *([dtype] if len(dtypes) > 1 else []), kernels]
        lines.append("| " + " | ".join([*first, *(_cell(cells.get(m)) for m in ms)]) + " |")
    return "\n".join(lines)


def short(format: str) -> str:
    """A format's spec without its scale dtype."""
    return format.rsplit(":", 1)[0]


def _cell(row: Row | None) -> str:
    if row is None or row.median is None:
        return "-"
    parts = [f"{1e6 * row.median:.1f} us"]
    parts += [] if row.share is None else [f"{100 * row.share:.0f} %"]
    parts += [] if row.speedup is None else [f"{row.speedup:.2f}x"]
    return ", ".join(parts)


def facts(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """What a results document says of the machine, the software and the moment; dates in UTC, sizes in bytes."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    out: dict[str, Any] = {"schema": SCHEMA, "command": shlex.join(command), "date": now}
    out |= {"lqcompile": version("lqcompile"), "torch": torch.__version__, "cuda": torch.version.cuda}
    out["triton"] = _version("triton")
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        out["device"] = {
            "type": "cuda",
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "processors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
        }
        found = _nvidia_smi(device, "driver_version")
        return out | ({"driver": found[0]} if found else {}) | {"clocks_at_start": clocks(device)}
    out["device"] = {"type": "cpu", "name": processor(), "threads": torch.get_num_threads()}
    return out


def clocks(device: torch.device) -> dict[str, int]:
    """The clocks of a GPU at this moment in MHz, `sm` and `memory`; empty where nobody says."""
    found = _nvidia_smi(device, "clocks.sm,clocks.mem") if device.type == "cuda" else []
    return {name: int(mhz) for name, mhz in zip(("sm", "memory"), found, strict=False) if mhz.isdecimal()}


def _nvidia_smi(device: torch.device, names: str) -> list[str]:
    command = shutil.which("nvidia-smi")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if command is None or uuid is None:
        return []
    query = (command, f"--id=GPU-{uuid}", f"--query-gpu={names}", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [field.strip() for field in done.stdout.split(",")]
    return found if done.returncode == 0 and len(found) == len(names.split(",")) else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def head(document: Mapping[str, Any]) -> str:
    """The machine and the method, in words."""
    device, rotation, cache = (document[name] for name in ("device", "rotation_bytes", "cache_bytes"))
    software = [f"torch {document['torch']}"]
    software += [f"{name} {document[name]}" for name in ("cuda", "triton", "driver") if document.get(name)]
    lines = [
        f"{device['name']}, {', '.join(software)}, {document['date']}",
        f"weights rotated over more than {size(rotation)}, {rotation / cache:.1f} times the cache of {size(cache)}",
        f"light: {document['light']}",
    ]
    others = document["neighbours"]
    used = [name for name, state in others.items() if state == "used"]
    lines += [f"neighbours: {', '.join(used)}"] if used else []
    lines += [f"not importable: {name} ({state})" for name, state in others.items() if state != "used"]
    return "\n".join(lines)


def heading(dense: str) -> str:
    """The names of the columns of `line`; ratios are to the matmul called `dense`."""
    names = ("N x K", "format", "x", "m", "kernel", "us", "spread", "light", dense, "MB", "error")
    return _aligned(names)


def line(row: Row) -> str:
    """A row as text: median microseconds, (most - least) / median, share of light, ratio to dense, error.

    The error is in units of the bound, for neighbours relative in the norm ("rel"); "-" where there is none.
    """
    kernel = f"{row.kernel}/{row.layout}" if row.layout and row.layout != row.kernel else row.kernel
    error = "-" if row.error is None else f"{row.error:.2f}" if row.kind == "ours" else f"rel {row.error:.0e}"
    us = f"{1e6 * row.median:.2f}" if row.median is not None else row.verdict
    spread = "-" if row.spread is None else f"{100 * row.spread:.0f}%"
    share = "-" if row.share is None or row.kind == "light" else f"{100 * row.share:.0f}%"
    ratio = "-" if row.speedup is None or row.kind in ("light", "dense") else f"{row.speedup:.2f}x"
    first = (f"{row.n}x{row.k}", short(row.format), row.x_dtype, str(row.m), kernel)
    text = _aligned((*first, us, spread, share, ratio, f"{row.bytes / 1e6:.2f}", error))
    return text + (f"  {row.note}" if row.note else "")


def _aligned(cells: Sequence[str]) -> str:
    left = (0, 1, 2, 4)
    both = enumerate(zip(cells, WIDTHS, strict=True))
    return "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in both).rstrip()


def summary(rows: Sequence[Row], skipped: int) -> str:
    """One line: how many rows were timed, wrong, failed; how the fastest of ours of each problem compare."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row.n, row.k, row.m, row.format, row.x_dtype)
        if row.kind == "ours" and row.median and (key not in best or row.median < (best[key].median or 0)):
            best[key] = row
    counts = {v: sum(row.verdict == v for row in rows if row.kind == "ours") for v in VERDICTS}
    parts = [f"{len(best)} problems timed, {skipped} skipped"]
    parts += [f"of our rows {counts['ok']} right, {counts['WRONG']} WRONG, {counts['FAILED']} FAILED"]
    ratios, shares = ([v for row in best.values() if (v := getattr(row, name))] for name in ("speedup", "share"))
    if ratios:
        parts.append(f"the fastest of ours {statistics.geometric_mean(ratios):.2f}x dense (geometric mean)")
    if shares:
        parts.append(f"{100 * statistics.geometric_mean(shares):.0f} % of light")
    return "; ".join(parts)
