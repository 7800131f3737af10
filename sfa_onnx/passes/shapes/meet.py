"""Where sizes turn out to be one, and which symbols that makes the same.

Exporters give every input symbols of its own, though many of them must be equal for the graph to
run. Three things tell, and this is all of them:

* two sizes meet on one axis (broadcast to each other, declared and inferred): `made_equal`;
* a view keeps the number of elements: `of_view`;
* a declared quotient of sizes is whole: `of_quotient`.

Nothing is guessed: what cannot be solved for a symbol stays apart. Whoever notices (a shape rule,
by `Concrete.meet`; a step of tracing, by `UnifyError`) drops what it was doing, the symbol becomes
the other size everywhere (`Concrete.unify`), and the question is asked again.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping, Sequence

from sfa_onnx.passes.shapes.dims import size_of
from sfa_onnx.passes.shapes.form import Atom, Call, Form
from sfa_onnx.passes.shapes.size import is_open

__all__ = ["Swap", "made_equal", "of_quotient", "of_view"]

Swap = tuple[str, Form]  # a symbol, and what it is


def made_equal(
    a: Form, b: Form, symbols: Sequence[str], inputs: Iterable[frozenset[str]]
) -> list[Swap] | None:
    """What symbols must be for `a` and `b` to be equal; None where it cannot be determined.

    Args:
        a: one size.
        b: the other.
        symbols: in the order in which the inputs declare them; the later one is replaced.
        inputs: the symbols of each input: no two axes of one become the same size by pairing.
    """
    difference = _primitive(a.plus(b, -1))
    if difference.fixed:
        return None if difference.const else []
    solutions = [(s, f) for s in reversed(symbols) if (f := _solved(difference, s)) is not None]
    for fits in (_is_sum, _is_less):  # a total is past + new, rather than a past total - new
        if found := [swap for swap in solutions if fits(swap[1])]:
            return found[:1]
    if broadcast := _broadcast(a, b, symbols) or _broadcast(b, a, symbols):
        return broadcast
    known = _paired(a, b, symbols, inputs) or _inside(a, b, symbols, inputs)
    return known or ([s for s in solutions if s[1].terms][:1] or None)


def _primitive(form: Form) -> Form:
    """Without the factors that all its terms have."""
    if form.const or not form.terms:
        return form
    first = form.terms[0][1]
    common: list[Atom] = []
    for atom in dict.fromkeys(first):
        common += [atom] * min(atoms.count(atom) for _, atoms in form.terms)
    number = math.gcd(*(c for c, _ in form.terms))
    return form.over(Form(((number, tuple(common)),)) if common else Form(const=number)) or form


def _solved(difference: Form, symbol: str) -> Form | None:
    """What `symbol` is where `difference` is 0, and it stands there once and by itself."""
    own = [t for t in difference.terms if symbol in Form((t,)).symbols]
    if len(own) != 1 or own[0][1] != (symbol,) or abs(own[0][0]) != 1:
        return None
    rest = difference.plus(Form((own[0],)), -1)
    return rest.times(Form(const=-own[0][0]))


def _is_sum(form: Form) -> bool:
    return form.const >= 0 and all(c > 0 for c, _ in form.terms)


def _is_less(form: Form) -> bool:
    """A sum less a number."""
    return bool(form.terms) and all(c > 0 for c, _ in form.terms)


def _broadcast(size: Form, of: Form, symbols: Sequence[str]) -> list[Swap]:
    """Max(1, n, m) or Min(n, m), where n is expected: m = n.

    Exporters write the first, the size of axes that are broadcast to each other, where index
    tensors meet that come from different inputs, and the second where a cache for many sequences
    is cut to those of a call.
    """
    call, expected = size.alone, of.plain
    if not isinstance(call, Call) or call.name not in ("Max", "Min") or expected is None:
        return []
    axes = [a.plain for a in call.arguments if a != Form(const=1)]
    if expected not in axes or not all(axis in symbols for axis in axes):
        return []
    first, *others = (s for s in symbols if s in axes)
    return [(s, Form.of(first)) for s in others]


def _paired(
    a: Form, b: Form, symbols: Sequence[str], inputs: Iterable[frozenset[str]]
) -> list[Swap] | None:
    """Merged axes such as B*S1: symbols are paired in the order of their declaration."""
    left, right = _factors(a, symbols), _factors(b, symbols)
    if left is None or right is None or left[0] != right[0]:
        return None
    mine = [s for s in left[1] if s not in right[1]]
    theirs = [s for s in right[1] if s not in left[1]]
    if not mine or len(mine) != len(theirs):
        return None
    swap = dict(zip(theirs, mine, strict=True))
    for own in inputs:
        if len({swap.get(s, s) for s in own}) < len(own):
            return None
    return [(drop, Form.of(keep)) for drop, keep in swap.items()]


def _factors(form: Form, symbols: Sequence[str]) -> tuple[int, list[str]] | None:
    """(coefficient, symbols in order) of a single product of symbols."""
    if len(form.terms) != 1 or form.const:
        return None
    (c, atoms) = form.terms[0]
    if any(a not in symbols for a in atoms) or len(set(atoms)) < len(atoms):
        return None
    return c, [s for s in symbols if s in atoms]


def _inside(
    a: Form, b: Form, symbols: Sequence[str], inputs: Iterable[frozenset[str]]
) -> list[Swap] | None:
    """Min(8, n) and Min(8, m): n and m."""
    one, other = a.alone, b.alone
    if not (isinstance(one, Call) and isinstance(other, Call)) or one.name != other.name:
        return None
    mine = [x for x in one.arguments if x not in other.arguments]
    theirs = [x for x in other.arguments if x not in one.arguments]
    if one.name == "size" or len(mine) != 1 or len(theirs) != 1:
        return None
    return made_equal(mine[0], theirs[0], symbols, inputs)


def of_view(
    source: Sequence[int], target: Sequence[int], symbols: Mapping[str, int]
) -> tuple[str, str] | None:
    """(symbol, what it is) for a view to keep the number of elements; None: it does, or may.

    A view from [b2, s2, k] to [b * s, k'] only makes sense when b2 = b and s2 = s.
    """
    if math.prod(source) == math.prod(target):
        return None

    def inside(shape: Sequence[int]) -> list[str]:
        return [s for dim in shape for s, n in symbols.items() if is_open(n) and dim % n == 0]

    here, there = inside(source), inside(target)
    mine, theirs = [s for s in here if s not in there], [s for s in there if s not in here]
    return (mine[0], theirs[0]) if mine and theirs else None


def of_quotient(text: str, symbols: Mapping[str, int]) -> tuple[int, int] | None:
    """Two sizes that must be one for the quotients of a dim to be whole; None: they are, or may be.

    The number of elements is told by a declared (b2*s2*k)//(b*s), the k' of the view above.
    """
    if "//" not in text or size_of(text, symbols) is None:
        return None
    for node in ast.walk(ast.parse(text, mode="eval")):
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.FloorDiv):
            continue
        over, under = (_symbols_of(side) for side in (node.left, node.right))
        if over is None or under is None or set(over) & set(under) or len(over) != len(under):
            continue
        place = list(symbols).index  # exporters sort factors by name; inputs have axes in order
        for a, b in zip(sorted(over, key=place), sorted(under, key=place), strict=True):
            if symbols[a] != symbols[b]:
                return symbols[a], symbols[b]
    return None


def _symbols_of(tree: ast.expr) -> list[str] | None:
    """The symbols of a product; None where it is something else."""
    names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    inner = (n for n in ast.walk(tree) if isinstance(n, ast.expr))
    plain = all(
        isinstance(n, ast.Name | ast.Constant)
        or (isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult))
        for n in inner
    )
    return names if plain and names and len(set(names)) == len(names) else None
