"""`lq bench --model`: whole models of real shapes, decoding and reading prompts, by lq and by the ways beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import decoder, step, timing
from .bench import first_line
from .cli import Exit
from .decoder import Decoder
from .model_check import DTYPE, Checked, Point, judged, references, relative, row_of
from .model_options import CHECKED, Options
from .model_results import SCHEMA, Row, extrapolated, heading, line, picture, summary, told, written
from .report import size
from .results import clocks, facts
from .terminal import show
from .ways import WAYS, Runner, estimate, model_of

# Bytes whose read is timed; longer reads are as fast.
READ = 1 << 30


def bench_model(options: Options, command: Sequence[str] = ("lq", "bench")) -> int:
    """Prints a row for each way at each point. Exit.PROOF_FAILED if any is wrong, or lq fails.

    Raises ArgumentError for options that do not go together. `options.json` is written after every point, so that
    what was measured survives whatever stops the rest.
    """
    shape = options.shape
    before: list[Row] = []
    here = torch.cuda.device(options.device) if options.device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), here:
        if options.extrapolate:
            short = dataclasses.replace(options, trace=None, steps=0, svg=None)
            one = _Session(short, dataclasses.replace(shape, layers=1), command)
            wrong = one.run()
            if wrong:
                return wrong
            before = one.rows
            one.models.clear()
        return _Session(options, shape, command, before).run()


class _Session:
    """One run: what it was asked for, the models that it holds, and the rows so far."""

    def __init__(
        self, options: Options, shape: decoder.Shape, command: Sequence[str], before: Sequence[Row] = ()
    ) -> None:
        self.before = before
        self.options, self.shape, self.begun = options, shape, time.monotonic()
        self.ways = ("lq", *options.compare)
        self.rows: list[Row] = []
        self.models: dict[str, Decoder] = {}
        self.light_rate: float | None = None
        self.document: dict[str, Any] = {
            "kind": "model",
            **facts(options.device, command),
            "schema": SCHEMA,
            "model": options.model,
            "layers": shape.layers,
            "of_layers": decoder.SHAPES[options.model].layers,
            "bits": options.bits,
            "group": options.group,
            "method": options.method,
            "context": options.context,
            "dtype": "bfloat16",
        }

    def run(self) -> int:
        options, device = self.options, self.options.device
        torch.manual_seed(0)
        # The weights are random: the best binary codes of them are no better than the first.
        how = {"rounds": 1} if options.method == "bcq" else {}
        quantized = decoder.random(
            self.shape, device, DTYPE, bits=options.bits, group=options.group, method=options.method, **how
        )
        self.quantized = quantized
        self.timer = timing.timer(device)
        self.document["light"] = self.timer.light_name()
        points = [Point(batch, 1, options.context) for batch in options.batches]
        points += [Point(1, options.prefill, options.prefill)] if options.prefill else []
        self.together = self.fits(max(point.batch * point.length for point in points))
        self.document["interleaved"] = self.together
        self.say(f"{options.model} made, {size(decoder.weight_bytes(quantized))} of weights a step")
        show([*self.head(), ("", ""), heading()])
        warm_up(device)
        for point in points:
            self.measure(point)
        self.document["clocks_at_end"] = clocks(device)
        self.write()
        show([("", ""), *summary(self.rows), *told(self.extrapolated())])
        wrong = [row for row in self.rows if row.bad]
        for row in wrong:
            show([("bold red", f"{row.verdict}: {row.way}, {row.phase}, batch {row.batch}: {row.note}")])
        return Exit.PROOF_FAILED if wrong else Exit.FINE

    def head(self) -> list[tuple[str, str]]:
        """The machine, the model and the method, in words."""
        d = self.document
        layers = str(d["layers"]) + ("" if d["layers"] == d["of_layers"] else f" of {d['of_layers']}, shortened")
        turns = "all ways in turns" if self.together else "one way after the other: together they do not fit"
        weights = f"{d['bits']} bits {d['method']}, groups of {d['group']}, random"
        lines = [
            f"{d['device']['name']}, torch {d['torch']}, {d['date']}",
            f"{d['model']}, layers: {layers}; weights: {weights}; activations and head: bfloat16",
            f"decode: one step, a cache of {d['context']} tokens; {turns}, medians of {self.options.repeats} samples",
            "compile: with an empty Inductor cache; error: of the logits, against float32, and what is allowed",
            f"light: {d['light']}",
        ]
        return [("dim", text) for text in lines]

    def fits(self, cached: int) -> bool:
        """Whether all ways, with caches of `cached` tokens, fit into what memory is free, and a fifth to spare."""
        device, shape = self.options.device, self.shape
        self.emptied()
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        caches = 2 * DTYPE.itemsize * shape.layers * shape.kv_heads * shape.head * cached * len(self.ways)
        return caches + sum(estimate(name, self.quantized) for name in self.ways) < 0.8 * free

    def say(self, text: str) -> None:
        """A line of progress, on stderr, with the seconds since the start."""
        print(f"{time.monotonic() - self.begun:5.0f} s  {text}", file=sys.stderr, flush=True)

    def measure(self, point: Point) -> None:
        """Every way at one point: compiled, checked, and those that are right timed, in turns where they fit."""
        self.emptied()
        checked: list[Checked] = []
        for names in [self.ways] if self.together else [(name,) for name in self.ways]:
            rows: list[Row] = []
            runners: list[Runner | None] = []
            checks: list[Sequence[Checked]] = []
            for name in names:
                late = self.late()
                if not checked and not late:
                    checked = references(self.quantized, point)
                skipped = row_of(name, point, "skipped", "time limit"), None, checked
                row, runner, own = skipped if late else self.tried(name, point, checked)
                self.say(
                    f"{point.phase}, batch {point.batch}: {name} {row.verdict}{f', {row.note}' if row.note else ''}"
                )
                rows.append(row)
                runners.append(runner)
                checks.append(own)
            self.rows += self.timed(point, rows, runners, checks)
            self.write()
            if not self.together:
                runner, runners, self.models = None, [], {}
                self.emptied()

    def late(self) -> bool:
        limit = self.options.time_limit
        return limit is not None and time.monotonic() - self.begun > limit

    def tried(
        self, name: str, point: Point, checked: Sequence[Checked]
    ) -> tuple[Row, Runner | None, Sequence[Checked]]:
        """One way, compiled and checked, and what it was checked by; no runner where it is wrong or cannot run."""
        cuda = self.options.device.type == "cuda"
        try:
            if name not in self.models:
                self.models[name] = model_of(name, self.quantized)
            if WAYS[name].other:
                checked = references(self.models[name], point)
            self.models[name].empty_cache(point.batch, point.length, DTYPE)
            runner = Runner(name, self.models[name])
            before = torch.cuda.memory_allocated(self.options.device) if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.options.device)
            row = judged(runner, point, checked)
        except torch.OutOfMemoryError:
            self.models.pop(name, None)
            return row_of(name, point, "FAILED", "out of memory"), None, checked
        except Exception as error:  # noqa: BLE001  one way that cannot run must not cost the others
            return row_of(name, point, "FAILED", first_line(error)), None, checked
        if cuda:
            own = {t.data_ptr(): t.nbytes for t in (*runner.model.parameters(), *runner.model.buffers())}
            grown = torch.cuda.max_memory_allocated(self.options.device) - before
            row = dataclasses.replace(row, memory_bytes=sum(own.values()) + grown)
        row = dataclasses.replace(row, light=self.light(row.weight_bytes))
        return row, runner if row.verdict == "ok" else None, checked

    def light(self, size: int | None) -> float | None:
        """Seconds in which `size` bytes can be read on this device; None where nobody can tell."""
        if size is None or self.light_rate == 0.0:
            return None
        if self.light_rate is None:
            try:
                sampler = self.timer.sampler(self.timer.light(min(size, READ))[0])
                self.light_rate = min(size, READ) / timing.interleaved([sampler], 5)[0].median
            except Exception as error:  # noqa: BLE001  without a compiler there is no light; the rest is measured
                self.light_rate = 0.0
                show([("yellow", f"no light: {first_line(error)}")])
                return None
        return size / self.light_rate

    def timed(
        self, point: Point, rows: list[Row], runners: Sequence[Runner | None], checks: Sequence[Sequence[Checked]]
    ) -> list[Row]:
        """The rows with their times, printed; then what is asked of lq at the first point."""
        able = [(i, runner) for i, runner in enumerate(runners) if runner is not None]
        found = timing.interleaved(
            [self.sampler(point, runner, checks[i][0]) for i, runner in able], self.options.repeats
        )
        for (i, runner), s in zip(able, found, strict=True):
            first = checks[i][0]
            last = relative(runner(first.tokens, first.position)[1], first.exact)
            if last <= (rows[i].allowed or 0.0):
                rows[i] = rows[i].timed(s)
            else:
                rows[i] = dataclasses.replace(rows[i], verdict="WRONG", note="right at first, wrong after many calls")
        show(line(row) for row in rows)
        for i, runner in able:
            if runner.name == "lq" and (point.batch, point.tokens) == (self.options.batches[0], 1):
                self.closer(runner, rows[i], checks[i][0])
        return rows

    def closer(self, runner: Runner, row: Row, first: Checked) -> None:
        """The trace and the endurance of lq, where they are asked for."""
        if self.options.trace is not None:
            found = step.trace(runner, first.tokens, first.position, self.options.trace)
            self.document["trace"] = found
            show(step.told(found, row.light))
        if self.options.steps:
            endurance = step.endure(runner, first.tokens, self.options.steps, self.options.context)
            self.document["endurance"] = dataclasses.asdict(endurance)
            show([endurance.line()])

    def sampler(self, point: Point, runner: Runner, first: Checked) -> timing.Sampler:
        """Samples of about 100 ms, of at most 32 steps."""
        most = min(32, self.options.context - CHECKED)

        def run(times: int) -> float:
            if point.phase == "decode":
                return runner.decode(first.tokens, CHECKED, times)
            return runner.prompt(first.tokens, first.position, times)

        times = max(1, min(most, round(0.1 / max(run(2), 1e-6))))
        return lambda: run(times)

    def emptied(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()

    def extrapolated(self) -> list[dict[str, Any]]:
        """To all layers, where a model of one was timed before; else nothing."""
        whole = decoder.SHAPES[self.options.model].layers
        return extrapolated(self.before, self.rows, self.shape.layers, whole)

    def write(self) -> None:
        document = self.document
        if self.before:
            before = [dataclasses.asdict(row) for row in self.before]
            document = {**document, "rows_of_one_layer": before, "extrapolated": self.extrapolated()}
        document = written(self.options.json, document, self.rows)
        if self.options.svg is not None:
            self.options.svg.write_text(picture(document))


def warm_up(device: torch.device) -> None:
    """What the first compile of a process does once belongs to no way."""
    torch.compile(torch.nn.Linear(4, 4, device=device))(torch.randn(2, 4, device=device))
