"""Lines and progress on a terminal: with rich where it is installed, else the same words without colour."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .table import Line

# Work shorter than this, in seconds, says nothing.
PATIENCE = 2.0


def show(lines: Iterable[Line]) -> None:
    """Prints (style, line) pairs to stdout; colour only on a terminal."""
    console = _console() if sys.stdout.isatty() else None
    for style, line in lines:
        if console is None:
            print(line)
        else:
            # Neither wrapped nor read as markup: names of the model are text.
            console.print(line, style=style or None, markup=False, highlight=False, soft_wrap=True, emoji=False)


def _console() -> Any:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says on stderr what is being done, and for how long, once it takes more than two seconds."""
    done = threading.Event()

    def tell() -> None:
        start = time.perf_counter()
        wait = PATIENCE
        while not done.wait(wait):
            print(f"  {time.perf_counter() - start:3.0f} s  {what} ...", file=sys.stderr, flush=True)
            wait = 5.0

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
