"""Where a node of the graph stands in the user's program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import fx

from .. import formats
from ..types import Where
from .constants import target_name

# The forward of our own layers tells a user less than the line that called it.
_OWN_MODULES = {str(Path(formats.__file__).with_name(name)) for name in ("quantize.py", "packed.py")}


def where(node: fx.Node) -> Where:
    """The module path, the user's file, line and code of a node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    path = re.sub(r"^L\['\w+'\]\.?|\b_modules\b\.?|\(\)", "", str(path))
    path = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", path).strip(".").replace("..", ".")
    lines = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
    own = [entry for entry in lines if "/torch/nn/modules/" not in entry[0] and entry[0] not in _OWN_MODULES] or lines
    file, line, code = own[-1] if own else ("", "0", "")
    op = target_name(node) or str(node.target)
    return Where(path or _unit(node, stack) or node.name, file, int(line), code.strip(), op)


def _unit(node: fx.Node, stack: dict[str, Any]) -> str:
    """The class or the function that a node stands in: what names it where the model itself is the only module."""
    if stack:
        kind = list(stack.values())[-1][1]
        return str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    names = re.findall(r'File "[^"]+", line \d+, in ([^\n]+)', node.meta.get("stack_trace") or "")
    return re.sub(r"^torch_dynamo_resume_in_|_at_\d+$", "", names[-1]) if names else ""
