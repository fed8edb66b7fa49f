"""From an evaluated weight to a QWeight that is proved to be it: the idioms read, and none is believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from ..errors import ArgumentError, Reason, Refused
from ..formats import UNIT_ROUNDOFF, columns, dequantize, rows, validate
from ..types import Format, NearMiss, QWeight
from . import algebra, idioms
from .deferred import Block, spans
from .evaluate import Weight
from .grouping import turned


@dataclass(eq=False)
class Recovered:
    """One weight operand understood: a QWeight for each place of the batch, proved against the tensors in `sources`.

    weights  until they are packed; n, k and formats are of the user's weights [n, k], and stay
    again    does the same for other tensors in place of `sources`; raises Refused
    fused    the library's operation that multiplied by it, "" for none
    across   groups are of outputs, not inputs: `weights` are the transposed ones, [k, n]
    layout   of a weight that is packed already: its parts are the sources, and `weights` have no values; "" for others
    """

    weights: tuple[QWeight, ...]
    rule: str
    proof: str
    sources: tuple[Tensor, ...]
    again: Callable[[Sequence[Tensor]], Recovered]
    key: str
    fused: str = ""
    across: bool = False
    layout: str = ""
    n: int = field(init=False)
    k: int = field(init=False)
    formats: tuple[Format, ...] = field(init=False)

    def __post_init__(self) -> None:
        first = self.weights[0]
        self.n, self.k = (first.k, first.n) if self.across else (first.n, first.k)
        self.formats = tuple(w.format for w in self.weights)

    def forget(self) -> None:
        """Frees the weights, once they are packed: what it takes to make them again is kept."""
        self.weights = ()


@dataclass
class Reader:
    """Asks the idioms. Slices of equal structure, by `key`, first try the one that read the first of them.

    Holds no tensor: what it makes may outlive the graph.
    """

    _analysed: set[str] = field(default_factory=set)
    _rules: dict[str, tuple[str, bool]] = field(default_factory=dict)
    _hopeless: set[str] = field(default_factory=set)

    @property
    def analysed(self) -> int:
        """How many structures were read."""
        return len(self._analysed)

    def read(
        self, weights: Sequence[Weight], sources: Sequence[Tensor], key: str, misses: list[NearMiss],
        again: Callable[[Sequence[Tensor]], Recovered],
    ) -> Recovered:  # fmt: skip
        """Reads and proves each of `weights`. Raises Refused, with the nearest miss added to `misses`."""
        found, proofs, rule, ways = [], [], "", set[bool]()
        for weight in weights:
            if not weight.lowbit:
                raise Refused(Reason.NOT_QUANTIZED, "no value comes from low-bit data")
            (rule, across), qweight, proof = self._first(weight, key, misses)
            found.append(qweight)
            proofs.append(proof)
            ways.add(across)
        if len(ways) > 1:
            raise Refused(Reason.GROUPS, "scales are shared by inputs here and by outputs there")
        worst = next((p for p in proofs if p != "bit_exact"), "bit_exact")
        return Recovered(tuple(found), rule, worst, tuple(sources), again, key, weights[0].fused, True in ways)

    def _first(self, weight: Weight, key: str, misses: list[NearMiss]) -> tuple[tuple[str, bool], QWeight, str]:
        """The first idiom that reads a weight, and whether across, what it reads and its proof."""
        known = self._rules.get(key)
        self._analysed.add(key)
        refusals: list[tuple[str, Refused]] = []
        for idiom, across in self._attempts(key):
            name = idioms.name_of(idiom)
            short = any(r.reason is Reason.GROUPS for _, r in refusals)
            if across and (name, across) != known and not short:
                continue
            try:
                qweight = validate(_read_across(idiom, weight) if across else idiom.read(weight))
                proof = prove(qweight, weight, across)
            except (ArgumentError, Refused) as error:
                if isinstance(error, ArgumentError):
                    error = Refused(Reason.PROOF_FAILED, str(error)[:200])
                # What it was raised from holds what was tried, as large as the weight. What is told is of inputs.
                refusals += [] if across else [(name, error.with_traceback(None))]
            else:
                self._rules[key] = name, across
                return (name, across), qweight, proof
        if not _finite(weight.native) or not _finite(weight.shadow):
            raise Refused(Reason.NON_FINITE, "weight")
        # The most telling refusal: one about groups or a proof says more than "too many levels", and that more than
        # that there is no such thing to read.
        telling = [r for r in refusals if r[1].reason != Reason.TOO_MANY_LEVELS or " " in r[1].at]
        telling.sort(key=lambda r: r[1].reason == Reason.TOO_MANY_LEVELS)
        nearest = telling[0] if telling else refusals[-1]
        if refusals[-1][1].reason == Reason.TOO_MANY_LEVELS:
            self._hopeless.add(key)
        # Where the algebra ended says more than what an idiom found missing.
        lost = weight.lost if nearest[1].reason == Reason.TOO_MANY_LEVELS else ""
        refused = Refused(nearest[1].reason, lost or nearest[1].at)
        misses.append(NearMiss(weight.near if lost else nearest[0], refused.reason, refused.at))
        raise refused from nearest[1]

    def _attempts(self, key: str) -> list[tuple[ModuleType, bool]]:
        """Idioms, and whether to read across, in the order to try: last the search of the values, which takes long."""
        algebra = [idiom for idiom in idioms.discover() if idioms.name_of(idiom) != "by_value"]
        # Where those of an equal slice gave nothing, to search these too would take seconds a layer.
        values = [i for i in idioms.discover() if i not in algebra and key not in self._hopeless]
        attempts = [*((i, False) for i in algebra), *((i, True) for i in algebra), *((i, False) for i in values)]
        return sorted(attempts, key=lambda attempt: (idioms.name_of(attempt[0]), attempt[1]) != self._rules.get(key))


def _read_across(idiom: ModuleType, weight: Weight) -> QWeight:
    """What an idiom reads in the transposed weight. Raises Refused."""
    form, outputs = turned(weight.form)
    qweight = idiom.read(replace(weight, native=weight.native.t(), shadow=weight.shadow.t(), form=form))
    return qweight if outputs is None else replace(qweight, perm=outputs)


def _finite(t: Tensor) -> bool:
    # One pass: the extremes of what holds NaN are NaN.
    return t.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(t))


def prove(qweight: QWeight, weight: Weight, across: bool) -> str:
    """Whether codes, scales and zeros are the weight, or, `across`, its transpose.

    "bit_exact": they give the exact weight in float64. "float64_rounding": they do up to the last bits of float64
    itself. Raises Refused otherwise, or where eager's own weight is no rounding of the exact one.
    """
    exactly = True
    places = torch.arange(qweight.k, device=qweight.codes.device)
    places = places if qweight.perm is None else torch.argsort(qweight.perm)
    for low, high in spans(weight.shadow):
        some = columns(qweight, places[low:high]) if across else rows(qweight, slice(low, high))
        rebuilt = dequantize(some, torch.float64)
        exactly &= _rows_are(rebuilt.t() if across else rebuilt, weight, low, high)
    return "bit_exact" if exactly else "float64_rounding"


def _rows_are(rebuilt: Tensor, weight: Weight, low: int, high: int) -> bool:
    """Whether `rebuilt` is these rows of the weight to the bit; raises Refused if not up to rounding. It is spent."""
    block = Block()
    exact, native = block.part(weight.shadow, low, high), block.part(weight.native, low, high)
    if not _finite(native):
        raise Refused(Reason.NON_FINITE, "weight")
    exactly = torch.equal(rebuilt, exact)
    if exactly and torch.equal(exact.to(native.dtype), native):
        # Nearly always: eager rounded once, to the nearest.
        return True
    size = _size_of(weight, low, high, block)
    difference = rebuilt.sub_(exact).abs_()
    if bool((difference > 2.0**-48 * size).any()):
        raise Refused(Reason.PROOF_FAILED, f"off by {float(difference.max()):.3g}")
    # A dozen roundings of the coarsest dtype that eager computes in, and its subnormals.
    rounding = 12 * weight.roundoff * (size if weight.form.terms else size.amax(-1, keepdim=True))
    tiny = 2.0**-24 if weight.roundoff > UNIT_ROUNDOFF[torch.float32] else 2.0**-126
    if bool((native.to(torch.float64, copy=True).sub_(exact).abs_() > rounding + tiny).any()):
        raise Refused(Reason.EAGER_DIFFERS, str(native.dtype))
    return exactly


def _size_of(weight: Weight, low: int, high: int, block: Block) -> Tensor:
    """What is added up to give these rows of the weight, in absolute value: what roundings are relative to."""
    form, size = weight.form, block.part(weight.shadow, low, high).abs()

    def some(piece: Tensor) -> Tensor:
        return block.part(piece.expand(form.shape), low, high)

    for term in form.terms:
        size += (some(term.coef) * algebra.Term(term.coef, some(term.codes), term.levels).values()).abs_()
    return size + some(form.offset).abs() if form.terms else size
