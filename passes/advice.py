"""What to change, by the reason a matmul was kept and the operation at which its recognition stopped: rules as data.

A rule is (reasons, words in the name of the operation, advice); the first that fits is given. `{op}` is the operation.
"""

from __future__ import annotations

import re

from ..errors import Reason

LEVELS = (Reason.TOO_MANY_LEVELS,)
WEIGHT = (Reason.TOO_MANY_LEVELS, Reason.GROUPS, Reason.PROOF_FAILED)

FOLD = "leave one code tensor and one scale for each group: fold the other factor (a mask, other codes) into the codes"
RULES: tuple[tuple[tuple[Reason, ...], str, str], ...] = (
    (WEIGHT, r"matmul|^mm$|bmm|einsum|linear|kron|outer|tensordot|addmm|fft",
     "multiply the activation by that matrix instead: x @ (a @ w).T is (x @ w.T) @ a.T, and x @ (w @ a).T is "
     "(x @ a.T) @ w.T"),
    ((Reason.TOO_MANY_LEVELS, Reason.GROUPS), r"where|index_(put|add|fill|copy)|scatter|masked|setitem|copy_|fill",
     "keep what is written over it apart: F.linear(x, w) plus a second matmul with the outliers less w there"),
    ((Reason.GROUPS,), r"add|sub|lerp",
     "add that part to the output instead: F.linear(x, w) + F.linear(x, delta)"),
    ((Reason.GROUPS,), r"mul|div|normalize|^scale$",
     "share each scale by a group of inputs (axis=1); a factor for each input belongs on x: F.linear(x * s, w)"),
    (LEVELS, r"norm|rsqrt|mean|^var|^std|^sum$|amax|amin|^max$|^min$|logsumexp",
     "compute that number once, when quantizing, and keep the scale it gives in a buffer"),
    (LEVELS, r"^i?add|^i?sub|^rsub",
     "add one of the two code tensors' products to the output: F.linear(x, w1) + F.linear(x, w2)"),
    (LEVELS, r"^i?mul|^i?div|truediv|addcmul|addcdiv", FOLD),
    (LEVELS, r".", "apply {op} before quantizing, so that codes and scales are of its result"),
    ((Reason.UNSUPPORTED_OP,), r"dropout|rand|bernoulli|normal|noise|uniform|multinomial",
     "leave randomness out of inference: call model.eval(), or move {op} out of the weight"),
    ((Reason.UNSUPPORTED_SPELLING,), r"conv",
     "only 1x1 convolutions of stride 1 without padding are matmuls: use F.unfold and a linear layer"),
    ((Reason.UNSUPPORTED_SPELLING,), r"bilinear|einsum|tensordot",
     "write it as one matmul of x and the weight, in which each index is contracted once"),
)  # fmt: skip

FLOAT_CODES = "keep the codes in an integer tensor (uint8): these are whole numbers stored as floats"
DENSE_LEVELS = "keep codes and scales in the model and dequantize in forward: these are few levels stored densely"
WIDE_CODES = "quantize to at most 8 bits: these codes have more than 256 levels"


def advise(reason: Reason, op: str) -> str:
    """One sentence of advice; the reason's own where no rule knows better."""
    name = re.sub(r"^_+|_+$", "", op)
    for reasons, words, advice in RULES:
        if reason in reasons and re.search(words, name):
            return advice.format(op=op)
    return reason.advice
