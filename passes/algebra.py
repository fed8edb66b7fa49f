"""The algebra of a dequantized weight, carried through the operations that compute it.

A `Form` is what a float tensor equals, exactly: sum_i coef_i * codes_i + offset, where codes_i are integers (or places
in a short list of levels) and coef_i, offset are float64, all broadcast to the tensor's shape. Views, gathers, writes
and casts move its pieces about; sums and products combine them. Whatever is not understood makes a Form without
terms, a plain constant, so that ignorance is never wrong: recognition from the values alone takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_TERMS = 16
MAX_TABLE = 4096


@dataclass(frozen=True)
class Term:
    """coef * codes, or coef * levels[codes] where there are levels."""

    coef: Tensor
    codes: Tensor
    levels: Tensor | None = None

    def values(self) -> Tensor:
        """The term without its coefficient, in float64."""
        return self.codes.to(torch.float64) if self.levels is None else self.levels[self.codes.long()]


@dataclass(frozen=True)
class Form:
    """sum of terms + offset, broadcast to `shape`. A piece with one element is the same everywhere."""

    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    offset: Tensor


def constant(value: Tensor | float, shape: Sequence[int] = ()) -> Form:
    """A plain float64 value: no terms."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return Form(tuple(tensor.shape) if isinstance(value, Tensor) else tuple(shape), (), tensor)


def integer(codes: Tensor) -> Form:
    """An integer or boolean tensor, as the float it is about to become."""
    one = torch.ones((), dtype=torch.float64, device=codes.device)
    codes = codes.to(torch.uint8) if codes.dtype == torch.bool else codes
    return Form(tuple(codes.shape), (Term(one, codes),), torch.zeros_like(one))


def lookup(levels: Tensor, codes: Tensor) -> Form:
    """levels[codes]: a table, by its distinct values."""
    form = integer(codes)
    return replace(form, terms=(replace(form.terms[0], levels=levels),))


def levels_of(table: Tensor) -> tuple[Tensor, Tensor] | None:
    """The distinct values of a short float64 table and each entry's place among them; None if it is no such table."""
    shape = table.shape
    # Of what is expanded, as for a gather, one copy will do.
    table = table[tuple(slice(0, 1) if step == 0 else slice(None) for step in table.stride())]
    if not 2 <= table.numel() <= MAX_TABLE or not bool(torch.isfinite(table).all()):
        return None
    levels, inverse = torch.unique(table, return_inverse=True)
    return (levels, inverse.expand(shape)) if levels.numel() <= 256 else None


def levelled(values: Tensor) -> Form | None:
    """A float64 tensor of at most 256 distinct values, each found many times, as a look-up among them."""
    flat, levels = values.reshape(-1), values.new_empty(0)
    if flat.numel() < 1024:
        # Of few values each may be a scale.
        return None
    for part in flat.split(1 << 16):
        if levels.numel():
            place = torch.searchsorted(levels, part).clamp(max=levels.numel() - 1)
            part = part[levels[place] != part]
        if part.numel():
            fresh = torch.unique(part[:4096])
            fresh = fresh if part.numel() <= 4096 or fresh.numel() > 256 else torch.unique(part)
            levels = torch.unique(torch.cat([levels, fresh]))
        if levels.numel() > 256:
            return None
    # Where each is found less often, they may well be levels times scales, which need fewer bits.
    if not 2 <= levels.numel() <= flat.numel() // 64 or not bool(torch.isfinite(levels).all()):
        return None
    codes = torch.cat([torch.searchsorted(levels, part).to(torch.uint8) for part in flat.split(1 << 16)])
    codes = codes.view(values.shape)
    step, origin = levels[1] - levels[0], (levels[0] / (levels[1] - levels[0])).round()
    place = torch.arange(levels.numel(), dtype=torch.float64, device=levels.device) + origin
    if origin.abs() <= 2**15 and torch.equal(place * step, levels):
        return scaled(integer(codes.to(torch.int32) + origin.to(torch.int32)), step, values.shape)
    return lookup(levels, codes)


def whole(form: Form) -> Form:
    """A form of one plain integer term with its offset counted in the codes, where it is a multiple of a coefficient
    that is the same everywhere.
    """
    if len(form.terms) != 1 or form.terms[0].levels is not None or not is_uniform(form.terms[0].coef):
        return form
    coef = form.terms[0].coef
    extra = form.offset / coef
    if not bool(((extra == extra.round()) & (extra.abs() <= 2**15) & (extra * coef == form.offset)).all()):
        return form
    codes = form.terms[0].codes.expand(form.shape).to(torch.int32) + extra.to(torch.int32)
    return Form(form.shape, (Term(coef, codes),), torch.zeros_like(coef))


def is_uniform(t: Tensor) -> bool:
    """Whether a piece is one number everywhere."""
    return t.numel() == 1


def moved(form: Form, shape: Sequence[int], move: Callable[[Tensor], Tensor]) -> Form:
    """A form whose elements were moved about by `move`, applied to each piece at full shape."""

    def apply(piece: Tensor) -> Tensor:
        return piece.reshape(()) if is_uniform(piece) else move(piece.expand(form.shape))

    def codes(piece: Tensor) -> Tensor:
        return move(piece.expand(form.shape))

    terms = tuple(replace(t, coef=apply(t.coef), codes=codes(t.codes)) for t in form.terms)
    return Form(tuple(shape), terms, apply(form.offset))


def joined(forms: Sequence[Form], shape: Sequence[int], join: Callable[[list[Tensor]], Tensor]) -> Form | None:
    """Several forms assembled into one tensor by `join` (cat, stack, a write into a slice). None if they do not agree.

    A form without a term, such as a fresh buffer that is written over, adds 0 * codes there.
    """
    count = max(len(f.terms) for f in forms)
    if count == 0:
        return None
    if count == 1 and any(not torch.equal(f.offset.reshape(-1)[:1], forms[0].offset.reshape(-1)[:1]) for f in forms):
        # Codes less 16 beside codes as they are, and the like.
        forms = [whole(f) for f in forms]

    def pieces(found: list[Tensor], padding: list[bool] | None = None) -> Tensor:
        known = [p for p, padded in zip(found, padding or [False] * len(found), strict=True) if not padded]
        if all(is_uniform(p) for p in known) and all(bool(p == known[0]) for p in known):
            return known[0].reshape(())
        return join([p.expand(f.shape) for p, f in zip(found, forms, strict=True)])

    terms = []
    for i in range(count):
        known = [f.terms[i] for f in forms if len(f.terms) > i]
        levels = known[0].levels
        same = all((t.levels is None) == (levels is None) for t in known)
        if not same or (
            levels is not None and not all(torch.equal(t.levels, levels) for t in known if t.levels is not None)
        ):
            return None
        dtypes = {t.codes.dtype for t in known}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.int32
        nothing = torch.zeros((), dtype=dtype, device=known[0].codes.device)
        absent = [len(f.terms) <= i for f in forms]
        codes = [nothing if a else f.terms[i].codes.to(dtype) for f, a in zip(forms, absent, strict=True)]
        zero = torch.zeros_like(known[0].coef.reshape(-1)[0])
        coefs = [zero if a else f.terms[i].coef for f, a in zip(forms, absent, strict=True)]
        joint = join([c.expand(f.shape) for c, f in zip(codes, forms, strict=True)])
        terms.append(Term(pieces(coefs, absent), joint, levels))
    return Form(tuple(shape), tuple(terms), pieces([f.offset for f in forms]))


def padded(form: Form, shape: Sequence[int], pad: Callable[[Tensor, float], Tensor], value: float) -> Form:
    """A form with `value` around it, where `pad(piece, fill)` pads a piece at full shape."""
    terms = []
    for t in form.terms:
        # A code of 0 adds nothing; a place in a table does, unless its coefficient is 0.
        keep = t.levels is None and is_uniform(t.coef)
        coef = t.coef if keep else pad(t.coef.expand(form.shape), 0.0)
        terms.append(replace(t, coef=coef, codes=pad(t.codes.expand(form.shape), 0)))
    same = is_uniform(form.offset) and float(form.offset) == value
    return Form(tuple(shape), tuple(terms), form.offset if same else pad(form.offset.expand(form.shape), value))


def scaled(form: Form, factor: Tensor, shape: Sequence[int]) -> Form:
    """A form times a constant that broadcasts against it."""
    shape = tuple(shape)
    terms = tuple(Term(_aligned(t.coef, form, factor), *_spread(t, form, shape)) for t in form.terms)
    return Form(shape, terms, _aligned(form.offset, form, factor))


def _aligned(piece: Tensor, form: Form, factor: Tensor) -> Tensor:
    return piece * factor if is_uniform(piece) or is_uniform(factor) else piece.expand(form.shape) * factor


def _spread(term: Term, form: Form, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    return term.codes.expand(form.shape).expand(shape), term.levels


def divided(form: Form, divisor: Tensor, shape: Sequence[int]) -> Form:
    """A form over a constant."""
    shape = tuple(shape)
    terms = tuple(
        Term(
            t.coef / divisor if is_uniform(t.coef) else t.coef.expand(form.shape) / divisor,
            *_spread(t, form, shape),
        )
        for t in form.terms
    )
    offset = form.offset if is_uniform(form.offset) else form.offset.expand(form.shape)
    return Form(shape, terms, offset / divisor)


def product(a: Form, b: Form, a_value: Tensor, b_value: Tensor, shape: Sequence[int]) -> Form:
    """The product of two forms, whose values in float64 are given too. One becomes a plain constant if it is not.

    The codes are in the larger one; between equals, plain codes win over a look-up: scales may be gathered by index.
    """
    if a.terms and b.terms:

        def weight(f: Form) -> tuple[bool, int]:
            return all(t.levels is None for t in f.terms), max(t.codes.numel() for t in f.terms)

        rank_a, rank_b = weight(a), weight(b)
        a_is_codes = (rank_a[1], rank_a[0]) >= (rank_b[1], rank_b[0])
        return scaled(a, b_value, shape) if a_is_codes else scaled(b, a_value, shape)
    return scaled(a, b.offset, shape) if a.terms else scaled(b, a.offset, shape)


def combined(a: Form, b: Form, a_value: Tensor, b_value: Tensor) -> Form | None:
    """The product of two codes for each weight, such as signs and magnitudes, as one code: where there are few values.

    Scales may stand in the first, not in the second.
    """
    if len(a.terms) != 1 or any(not is_uniform(t.coef) for t in b.terms) or not is_uniform(b.offset):
        return None
    if bool((a.offset != 0).any()):
        return levelled(a_value * b_value)
    term = a.terms[0]
    found = levelled(term.values().expand(a.shape) * b_value)
    return None if found is None else scaled(found, term.coef, a.shape)


def added(a: Form, b: Form, shape: Sequence[int]) -> Form:
    """The sum of two forms. Integer terms with the same coefficient, such as codes and zero points, become one."""
    shape = tuple(shape)
    offset = _sum(a.offset, a, b.offset, b)
    terms = [replace(t, codes=t.codes.expand(a.shape).expand(shape)) for t in a.terms]
    terms = [_full(t, a, shape) for t in terms]
    for other in b.terms:
        extra = _full(replace(other, codes=other.codes.expand(b.shape).expand(shape)), b, shape)
        for i, term in enumerate(terms):
            both = _merged(term, extra)
            if both is not None:
                terms[i] = both
                break
        else:
            terms.append(extra)
    return Form(shape, tuple(terms[: MAX_TERMS + 1]), offset)


def _sum(x: Tensor, a: Form, y: Tensor, b: Form) -> Tensor:
    x = x if is_uniform(x) else x.expand(a.shape)
    y = y if is_uniform(y) else y.expand(b.shape)
    return x + y


def _full(term: Term, form: Form, shape: tuple[int, ...]) -> Term:
    if is_uniform(term.coef):
        return term
    return replace(term, coef=term.coef.expand(form.shape).expand(shape))


def _signed(codes: Tensor) -> Tensor:
    """Codes in a dtype in which sums and differences of a few hundred of them do not wrap."""
    return codes.to(torch.int16 if codes.dtype in (torch.uint8, torch.int8) else torch.int32)


def _merged(a: Term, b: Term) -> Term | None:
    if a.levels is not None or b.levels is not None:
        return None
    if is_uniform(a.coef) and is_uniform(b.coef):
        x, y = float(a.coef), float(b.coef)
        if x == int(x) and y == int(y) and max(abs(x), abs(y)) <= 256:
            if max(abs(x), abs(y)) == 1:
                first = _signed(a.codes) if x > 0 else -_signed(a.codes)
                second = _signed(b.codes)
                return Term(torch.ones_like(a.coef.reshape(())), first + second if y > 0 else first - second)
            codes = a.codes.to(torch.int32) * int(x) + b.codes.to(torch.int32) * int(y)
            return Term(torch.ones_like(a.coef.reshape(())), codes)
        return Term(a.coef, _signed(a.codes) - _signed(b.codes)) if x == -y else None
    # Equal coefficients of opposite sign: codes * scale - zero * scale. Planes of a binary code have none such.
    if a.coef.shape == b.coef.shape and torch.equal(a.coef, -b.coef):
        return Term(a.coef, _signed(a.codes) - _signed(b.codes))
    return None


def summed(form: Form, dim: int, keepdim: bool) -> Form | None:
    """A sum over one short dimension: a term for each of its places, as in a sum over bit planes."""
    size = form.shape[dim]
    if not form.terms or size * len(form.terms) > MAX_TERMS:
        return None
    terms = []
    for term in form.terms:
        for i in range(size):
            codes = term.codes.expand(form.shape).select(dim, i)
            coef = term.coef if is_uniform(term.coef) else term.coef.expand(form.shape).select(dim, i)
            if keepdim:
                codes = codes.unsqueeze(dim)
                coef = coef if is_uniform(coef) else coef.unsqueeze(dim)
            terms.append(Term(coef, codes, term.levels))
    offset = form.offset.expand(form.shape).sum(dim, keepdim=keepdim)
    return Form(tuple(terms[0].codes.shape), tuple(terms), offset)


def multiplied(left: Form, right: Form, left_value: Tensor, right_value: Tensor) -> Form | None:
    """A matrix product inside the weight, if one side is constant and the sum is short: sum_i alpha[:, i] * b[i, :]."""
    inner = left.shape[-1]
    if bool(left.terms) == bool(right.terms):
        return None
    if left.terms:
        whole = (*left.shape, right.shape[-1])
        lifted = moved(left, (*left.shape, 1), lambda t: t.unsqueeze(-1))
        return summed(scaled(lifted, right_value.unsqueeze(-3), whole), len(whole) - 2, False) if inner <= 8 else None
    whole = (*left.shape, right.shape[-1])
    if left_value.ndim == 2 and torch.equal(left_value, torch.diag(left_value.diagonal())):
        # A scale for each row, written as a matrix.
        return scaled(right, left_value.diagonal().unsqueeze(1), right.shape)
    lifted = moved(right, (*right.shape[:-2], 1, *right.shape[-2:]), lambda t: t.unsqueeze(-3))
    return summed(scaled(lifted, left_value.unsqueeze(-1), whole), len(whole) - 2, False) if inner <= 8 else None


def masked(condition: Tensor, a: Tensor, b: Tensor, shape: Sequence[int]) -> Form | None:
    """where(condition, a, b) between two plain constants: a one-bit code."""
    coef = a - b
    if not bool(torch.isfinite(coef).all()) or not bool(torch.isfinite(b).all()):
        return None
    codes = condition.to(torch.uint8).expand(shape)
    expand = lambda t: t.reshape(()) if is_uniform(t) else t.expand(shape)  # noqa: E731
    return Form(tuple(shape), (Term(expand(coef), codes),), expand(b))
