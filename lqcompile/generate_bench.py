"""`lq bench --transformers`: a model of transformers with random weights, quantized by us, through its `generate`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from . import backend, decoder, timing
from .bench import first_line
from .cli import Exit
from .config import go_offline
from .errors import ArgumentError
from .model_check import DTYPE, relative
from .model_options import Options
from .model_results import SCHEMA, Row, heading, line, summary, written
from .quantize import quantize
from .report import Report
from .results import facts
from .terminal import show
from .ways import synchronize

# How transformers calls the models that have a shape here.
KINDS = {"llama3-8b": "llama", "llama3-70b": "llama", "qwen2.5-7b": "qwen2", "mistral-7b": "mistral", "tiny": "llama"}
WAYS = ("eager", "lq", "inductor")
# Tokens of a prompt, and with those that are generated.
PROMPT, CONTEXT = 16, 80


def config_of(name: str, layers: int | None) -> Any:
    """The configuration of a model: one of KINDS, or a config.json or its folder. Nothing is downloaded.

    Raises ArgumentError where there is none, or transformers is missing.
    """
    go_offline()
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ArgumentError("--transformers", name, "with transformers installed: pip install transformers") from error
    if name in KINDS:
        s = decoder.SHAPES[name]
        config = AutoConfig.for_model(
            KINDS[name], hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers,
            num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head, vocab_size=s.vocabulary,
            rms_norm_eps=s.epsilon, tie_word_embeddings=s.tied,
        )  # fmt: skip
    elif Path(name).exists():
        config = AutoConfig.from_pretrained(name)
    else:
        raise ArgumentError("--transformers", name, f"{' | '.join(KINDS)}, or a config.json or its folder")
    config.num_hidden_layers = layers or config.num_hidden_layers
    return config


def bench_generate(options: Options, command: Sequence[str] = ("lq", "bench")) -> int:
    """Prints a row for each of WAYS at each batch. Exit.PROOF_FAILED if one is wrong, or lq fails.

    A call of `generate` goes from PROMPT tokens until the static cache of `context` tokens is full, greedily. Raises
    ArgumentError for a model that transformers cannot make, or a context that leaves no room.
    """
    if options.context <= PROMPT:
        raise ArgumentError("--context", options.context, f"more than {PROMPT}, the prompt, with --transformers")
    config = config_of(options.model, options.layers)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    here = torch.cuda.device(options.device) if options.device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), here:
        with torch.device(options.device):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval().requires_grad_(False)
        quantize(
            model, options.bits, options.group, options.method, modules=lambda name, _: not name.endswith("lm_head")
        )
        document = {
            "kind": "model",
            **facts(options.device, command),
            "schema": SCHEMA,
            "model": f"transformers {options.model}",
            "layers": config.num_hidden_layers,
            "bits": options.bits,
            "group": options.group,
            "method": options.method,
            "context": options.context,
            "dtype": "bfloat16",
        }
        rows: list[Row] = []
        show([("dim", f"{document['device']['name']}, torch {document['torch']}, {document['model']}"), heading()])
        begun = time.monotonic()
        for batch in options.batches:
            if options.time_limit is not None and time.monotonic() - begun > options.time_limit:
                new = options.context - PROMPT
                rows += [Row(way, "generate", batch, new, "skipped", "time limit") for way in WAYS]
            else:
                rows += _measured(model, batch, options)
            written(options.json, document, rows)
    show([("", ""), *summary(rows)])
    return Exit.PROOF_FAILED if any(row.bad for row in rows) else Exit.FINE


def _measured(model: Any, batch: int, options: Options) -> list[Row]:
    """The rows of one batch, printed."""
    torch._dynamo.reset()
    tokens = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=options.device)
    new = options.context - PROMPT
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[..., Any]] = {}
    truth: Any = None
    for way in WAYS:
        run = _generate(model, tokens, new, way)
        try:
            with fresh_cache(), backend.recording() as reports:
                begun = time.perf_counter()
                found = run(output_logits=True)
                synchronize(tokens.device)
                first = time.perf_counter() - begun
            truth = found if way == "eager" else truth
            if truth is None:
                raise ValueError("eager failed, and there is nothing to compare with")
            rows[way] = _judged(way, found, truth, model, Report.merged(reports) if reports else None)
            if way != "eager":
                rows[way] = dataclasses.replace(rows[way], compile_seconds=first)
        except Exception as error:  # noqa: BLE001  one way that cannot run must not cost the others
            rows[way] = Row(way, "generate", batch, new, "FAILED", first_line(error))
        print(f"  {way}, batch {batch}: {rows[way].verdict}", file=sys.stderr, flush=True)
        if rows[way].verdict == "ok":
            runs[way] = run
    # Eager takes as long as all others together: once will do.
    for ways, repeats in (([way for way in runs if way != "eager"], options.repeats), (runs.keys() & {"eager"}, 1)):
        samples = timing.interleaved([_sampler(runs[way], tokens.device) for way in ways], repeats)
        for way, s in zip(ways, samples, strict=True):
            rows[way] = rows[way].timed(s)
    show(line(row) for row in rows.values())
    return list(rows.values())


def _generate(model: Any, tokens: Tensor, new: int, way: str) -> Callable[..., Any]:
    """One call of `generate`, its steps compiled as transformers does where a cache is static."""
    from transformers import CompileConfig

    how: dict[str, Any] = {"disable_compile": True}
    if way != "eager":
        compiling: Any = CompileConfig(backend=way, mode="reduce-overhead", fullgraph=True, dynamic=False)
        compiling._compile_all_devices = True
        how = {"compile_config": compiling}

    def run(**more: Any) -> Any:
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new, min_new_tokens=new,
            pad_token_id=0, eos_token_id=None, cache_implementation="static", return_dict_in_generate=True,
            **how, **more,
        )  # fmt: skip

    return run


def _sampler(run: Callable[..., Any], device: torch.device) -> timing.Sampler:
    def sample() -> float:
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - begun

    return sample


def _judged(way: str, found: Any, truth: Any, model: Any, report: Report | None) -> Row:
    """Compares logits with eager's up to where, at equal logits but for rounding, another token was chosen."""
    batch, new = len(found.sequences), len(found.logits)
    ours, theirs = found.sequences[:, -new:], truth.sequences[:, -new:]
    differs = (ours != theirs).any(0).nonzero()
    same = int(differs[0]) if len(differs) else new
    error = max(relative(a, b) for a, b in zip(found.logits[: same + 1], truth.logits[: same + 1], strict=False))
    # Roundings of bfloat16 add up as a random walk over the layers.
    allowed = 2 * torch.finfo(DTYPE).eps * model.config.num_hidden_layers**0.5
    wrong = "" if error <= allowed else f"the logits are off by {error:.3g}, allowed {allowed:.3g}"
    notes = [wrong] if wrong else []
    if report is not None and report.rewritten < report.quantized:
        kept = {d.reason.sentence for d in report.decisions if d.outcome != "rewritten" and d.reason}
        notes.append(f"{report.quantized - report.rewritten} of {report.quantized} not rewritten: {'; '.join(kept)}")
    return Row(
        way, "generate", batch, new, "WRONG" if wrong else "ok", "; ".join(notes),
        error=error, allowed=allowed, same=same, checked=new,
        rewritten=None if report is None else report.rewritten, quantized=None if report is None else report.quantized,
    )  # fmt: skip
