"""Terms and their identities: every row is evaluated in float64, violated, and removed in turn."""

from __future__ import annotations

import ast
import math
from typing import Any

import numpy as np
import pytest

from sfa_onnx import fuse
from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.steps import Ref
from sfa_onnx.passes.values.identity import Identity, Normal
from sfa_onnx.passes.values.table import SCORES, TABLE, normal
from sfa_onnx.passes.values.terms import FALSE, ONE, TRUE, Term, dot, element, index, number
from tests.graphs import gathered

T, U, D, ALONE = Label("t", 7), Label("u", 7), Label("d", 3), Label("one", 1)
CUT = 3  # where pieces are cut
NAMES = {
    **{name: (name, ()) for name in ("a", "b", "c0", "p", "c", "d")},
    **{name: (name, (T,)) for name in ("s", "v", "x", "y", "ct")},
    "su": ("s", (U,)),
}
RATIONAL = {ast.Add: "add", ast.Mult: "mul"}
COMPARE = {ast.Eq: "eq", ast.Lt: "lt", ast.LtE: "le"}


def read(text: str) -> Term:
    """A term from its notation; nothing is normalised."""
    return _read(ast.parse(text, mode="eval").body)


def _read(node: ast.AST) -> Term:
    match node:
        case ast.Constant(value=value):
            return number(float(value))
        case ast.Name(id="inf"):
            return number(math.inf)
        case ast.Name(id="true" | "false" as name):
            return TRUE if name == "true" else FALSE
        case ast.Name(id="dot"):
            return dot(Ref("q", (Expr.of(D),)), Ref("k", (Expr.of(D),)), D)
        case ast.Name(id=name):
            value, labels = NAMES[name]
            return element(Ref(value, tuple(map(Expr.of, labels))))
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return Term("not", (_read(inner),))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            own = _read(inner)
            return number(-own.value) if own.is_number() else Term("mul", (number(-1), own))
        case ast.BinOp(left=a, op=ast.Sub(), right=b):
            return Term("add", (_read(a), Term("mul", (number(-1), _read(b)))))
        case ast.BinOp(left=a, op=ast.Pow(), right=b):
            return Term("pow", (_read(a),), int(_read(b).value))
        case ast.BinOp(left=a, op=op, right=b):
            return Term(RATIONAL[type(op)], (_read(a), _read(b)))
        case ast.BoolOp(op=op, values=values):
            return Term("and" if isinstance(op, ast.And) else "or", tuple(map(_read, values)))
        case ast.Compare(left=a, ops=[op], comparators=[b]):
            return Term(COMPARE[type(op)], (_read(a), _read(b)))
        case ast.Call(func=ast.Name(id="pieces"), args=args):
            return Term("pieces", tuple(map(_read, args)), (T, ((0, CUT), (CUT, T.size))))
        case ast.Call(func=ast.Name(id="at"), args=[ast.Name(id=name)]):
            return index(Expr.of({"t": T, "u": U}[name]))
        case ast.Call(func=ast.Name(id="sum_parts"), args=args):
            return Term("add", tuple(_part(_read(a), i) for i, a in enumerate(args)))
        case ast.Call(func=ast.Name(id=name), args=args):
            if isinstance(args[0], ast.Name) and args[0].id in ("t", "u", "one"):
                return Term(name, (_read(args[1]),), {"t": T, "u": U, "one": ALONE}[args[0].id])
            return Term(name, tuple(map(_read, args)))
    raise AssertionError(ast.dump(node))


def _part(term: Term, which: int) -> Term:
    low, size = (0, CUT) if not which else (CUT, T.size - CUT)
    own = Label(f"part{which}", size)
    return Term("sum", (term.rename({T: Expr.of(own) + low}),), own)


def values(seed: int) -> dict[str, np.ndarray]:
    """Numbers, rows over keys and conditions."""
    rng = np.random.default_rng(seed)
    found = {name: np.asarray(rng.normal()) for name in ("a", "b", "c0")}
    found |= {name: rng.normal(size=T.size) for name in ("s", "v", "x", "y")}
    found |= {name: rng.normal(size=D.size) for name in ("q", "k")}
    found |= {"p": np.asarray(rng.uniform(0.5, 2)), "ct": rng.integers(2, size=T.size) > 0}
    found["ct"] &= seed % 3 > 0  # some rows see no key, some a single one
    found["ct"] |= (np.arange(T.size) == 2) & (seed % 6 == 3)
    return found | {name: np.asarray(rng.integers(2) > 0) for name in ("c", "d")}


def evaluate(term: Term, known: dict[str, np.ndarray], at: dict[Label, int]) -> Any:
    """What a term is, in float64."""

    def of(inner: Term) -> Any:
        return evaluate(inner, known, at)

    def position(expr: Expr) -> int:
        return expr.const + sum(at[label] * by for label, by in expr.terms)

    def along(inner: Term) -> list[Any]:
        return [evaluate(inner, known, {**at, term.label: i}) for i in range(term.label.size)]

    with np.errstate(all="ignore"):
        match term.op:
            case "number":
                return np.float64(term.value)
            case "element":
                return known[term.ref.value][tuple(position(c) for c in term.ref.coords)]
            case "index":
                return position(term.expr)
            case "dot":
                return known["q"] @ known["k"]
            case "pieces":
                label, ranges = term.ranges
                which = next(i for i, (low, high) in enumerate(ranges) if low <= at[label] < high)
                return of(term.args[which])
            case "sum" | "maximum" | "minimum" | "any" | "all":
                names = {"maximum": "max", "minimum": "min"}
                return getattr(np, names.get(term.op, term.op))(along(term.args[0]), axis=0)
            case "pow":
                return of(term.args[0]) ** np.float64(term.exponent)
            case "flag":
                return np.float64(bool(of(term.args[0])))
            case "true" | "false":
                return np.bool_(term.op == "true")
        inner = [of(a) for a in term.args]
        reduce = {"add": np.add, "mul": np.multiply, "max": np.fmax, "min": np.fmin}
        reduce |= {"and": np.logical_and, "or": np.logical_or}
        if term.op in reduce:
            return reduce[term.op].reduce(inner)
        single = {"abs": np.abs, "exp": np.exp, "log": np.log, "not": np.logical_not}
        single |= {
            "isnan": np.isnan,
            "eq": np.equal,
            "lt": np.less,
            "le": np.less_equal,
            "where": np.where,
        }
        return single[term.op](*inner)


def same(left: Term, right: Term, seed: int) -> bool:
    known = values(seed)
    at = {T: seed % T.size, U: seed % T.size}
    a, b = evaluate(left, known, at), evaluate(right, known, at)
    return bool(np.allclose(np.float64(a), np.float64(b), rtol=1e-9, atol=1e-12, equal_nan=True))


def reads(row: Identity, *without: str) -> Normal:
    """What reads terms where the row holds."""
    return normal(*without, scores_too=row in SCORES)


def rows() -> list[Any]:
    return [pytest.param(row, id=row.name) for row in (*TABLE, *SCORES)]


@pytest.mark.parametrize("row", rows())
def test_both_sides_are_equal_numbers(row: Identity) -> None:
    left, right = read(row.left), read(row.right)
    assert all(same(left, right, seed) for seed in range(20))


@pytest.mark.parametrize("row", rows())
def test_the_row_makes_them_one_term_and_nothing_else_does(row: Identity) -> None:
    left, right = read(row.left), read(row.right)
    whole, less = reads(row), reads(row, row.name)
    assert whole.again(left) == whole.again(right)
    assert row.name in {f.name for f in whole.fired}
    assert less.again(left) != less.again(right)


@pytest.mark.parametrize("row", [p for p in rows() if p.values[0].unless])
def test_a_violated_condition_shows(row: Identity) -> None:
    assert row.unless is not None
    left, wrong = map(read, row.unless)
    assert not all(same(left, wrong, seed) for seed in range(20))
    whole = reads(row)
    assert whole.again(left) != whole.again(wrong)


@pytest.mark.parametrize("row", rows())
@pytest.mark.parametrize("seed", range(3))
def test_normal_forms_keep_their_numbers(row: Identity, seed: int) -> None:
    for text in (row.left, row.right):
        assert same(read(text), reads(row).again(read(text)), seed)


def test_above_a_low_is_where_the_mask_keeps() -> None:
    whole = normal()
    for low, kept in (("-1e5", True), ("-5", False)):
        found = whole.again(read(f"{low} < where(c, dot(a), -inf)"))
        assert (found == whole.again(read("c"))) == kept


def test_every_name_stands_once() -> None:
    assert len({row.name for row in (*TABLE, *SCORES)}) == len(TABLE) + len(SCORES)


@pytest.mark.parametrize(
    "text",
    [
        "flag(0 < dot) * dot",
        "flag(not (dot < 0)) * 2 * dot * 0.5",
        "where(0 <= 3 * dot, dot, 0)",
        "where(dot < 0, 0, dot)",
        "0.5 * (dot + abs(dot))",
        "0.5 * abs(3 * dot) + 1.5 * dot",
        "dot - min(dot, 0)",
        "-1 * min(0, -1 * dot)",
        "dot + max(0, -1 * dot)",
        "flag(0 < dot + 2 * a) * (dot + 2 * a) - flag(0 < dot + 2 * a) * (dot + 2 * a)"
        " + max(0, dot)",
    ],
)
def test_spellings_of_a_relu_are_one(text: str) -> None:
    """But for a positive factor, which belongs to the weights."""
    n = normal(scores_too=True)
    left = n.again(read(text))
    plain = [n.again(read(x)) for x in ("max(0, dot)", "0.5 * max(0, 2 * dot)", "max(0, 3 * dot)")]
    assert left in plain
    assert all(same(read(text), left, seed) for seed in range(9))


@pytest.mark.parametrize(
    "text",
    [
        "flag(0.1 < dot) * dot",
        "flag(0 < a) * dot",
        "flag(0 < dot) * dot * dot",
        "flag(0 < dot + a) * (dot + 2 * a)",
        "where(0 < dot, dot, 0.1)",
        "where(0 < dot, dot, 0.1 * dot)",
        "dot + max(a, -1 * a)",
        "dot + max(dot, -2 * dot)",
        "dot + abs(2 * dot)",
        "dot - min(dot, 1)",
        "max(dot, -1 * dot)",
        "min(6, max(0, dot))",
    ],
)
def test_what_only_looks_like_a_relu_is_not(text: str) -> None:
    n = normal(scores_too=True)
    found = n.again(read(text))
    assert found not in (n.again(read("max(0, dot)")), n.again(read("max(0, 2 * dot)")))
    assert all(same(read(text), found, seed) for seed in range(9))


SOFTMAX = "sum(t, exp(s) * v) * sum(t, exp(s)) ** -1"


@pytest.mark.parametrize(
    "text",
    [
        "sum(t, exp(s - maximum(u, su)) * v) * sum(t, exp(s - maximum(u, su))) ** -1",
        "sum(t, exp(s - log(sum(u, exp(su)))) * v)",
        "sum(t, exp(s - a - log(sum(u, exp(su - a)))) * v)",
        "sum(t, where(isnan(exp(s) * a), 0, exp(s)) * v) * sum(t, exp(s)) ** -1",
        "sum(t, exp(s - maximum(u, su)) * v) * max(1e-9, sum(t, exp(s - maximum(u, su)))) ** -1",
        "where(sum(t, exp(s - maximum(u, su))) == 0, 0, " + SOFTMAX + ")",
    ],
)
def test_spellings_of_softmax_are_one(text: str) -> None:
    n = normal()
    assert n.again(read(text)) == n.again(read(SOFTMAX))


@pytest.mark.parametrize(
    "text",
    [
        "sum(t, exp(s) * v) * (sum(t, exp(s)) + 1e-9) ** -1",
        "sum(t, exp(s) * v) * max(1e-9, sum(t, exp(s))) ** -1",
        # exponentials that are not shifted by their own maximum may vanish in a row that sees keys
        "where(sum(t, exp(s)) == 0, 0, " + SOFTMAX + ")",
        "where(sum(t, exp(s - max(0, maximum(u, su)))) == 0, 0, " + SOFTMAX + ")",
        "sum(t, exp(s - max(0, maximum(u, su))) * v)"
        " * max(1e-9, sum(t, exp(s - max(0, maximum(u, su))))) ** -1",
        "sum(t, exp(s - max(maximum(u, su), maximum(u, 2 * su))) * v)"
        " * max(1e-9, sum(t, exp(s - max(maximum(u, su), maximum(u, 2 * su))))) ** -1",
        "sum(t, exp(min(s, 2)) * v) * sum(t, exp(s)) ** -1",
        "sum(t, exp(s) * v) * (sum(t, exp(s)) + exp(a)) ** -1",
        "sum(t, exp(2 * s) * v) * sum(t, exp(s)) ** -1",
    ],
)
def test_what_only_looks_like_softmax_is_not(text: str) -> None:
    n = normal()
    assert n.again(read(text)) != n.again(read(SOFTMAX))


def test_a_floor_under_a_sum_with_a_sink_never_acts() -> None:
    total = "(sum(t, exp(s - maximum(u, su))) + exp(a - maximum(u, su)))"
    n = normal()
    assert n.again(read(f"max(1e-9, {total})")) == n.again(read(total))


def test_a_running_maximum_folds() -> None:
    """Three chunks: m, l and acc start at -inf, 0 and 0."""
    n = normal()
    chunks = [(f"s{i}", f"v{i}") for i in range(3)]
    most, total, acc = number(-math.inf), number(0), number(0)
    plain_top, plain_total = [], []
    for s, v in chunks:
        score, row = (element(Ref(name, (Expr.of(T),))) for name in (s, v))
        new = n.make("max", (most, n.make("maximum", (score,), T)))
        alpha = n.exp(n.add(most, n.mul(number(-1), new)))
        p = n.exp(n.add(score, n.mul(number(-1), new)))
        total = n.add(n.mul(total, alpha), n.make("sum", (p,), T))
        acc = n.add(n.mul(acc, alpha), n.make("sum", (n.mul(p, row),), T))
        most = new
        plain_top.append(n.make("sum", (n.mul(n.exp(score), row),), T))
        plain_total.append(n.make("sum", (n.exp(score),), T))
    floored = n.make("max", (number(1e-10), total))
    merged = n.mul(acc, n.power(floored, -1))
    assert merged == n.mul(n.add(*plain_top), n.power(n.add(*plain_total), -1))


def test_two_partial_softmaxes_merge_by_their_log_sums() -> None:
    n = normal()
    parts, tops, totals = [], [], []
    for i in range(2):
        score, row = (element(Ref(f"{x}{i}", (Expr.of(T),))) for x in "sv")
        top = n.make("sum", (n.mul(n.exp(score), row),), T)
        total = n.make("sum", (n.exp(score),), T)
        parts.append((n.mul(top, n.power(total, -1)), n.log(total)))
        tops.append(top)
        totals.append(total)
    whole = n.log(n.add(*(n.exp(lse) for _, lse in parts)))
    merged = n.add(*(n.mul(o, n.exp(n.add(lse, n.mul(number(-1), whole)))) for o, lse in parts))
    assert merged == n.mul(n.add(*tops), n.power(n.add(*totals), -1))
    swapped = n.add(
        *(
            n.mul(o, n.exp(n.add(lse, n.mul(number(-1), whole))))
            for (o, _), (_, lse) in zip(parts, parts[::-1], strict=True)
        )
    )
    assert swapped != merged


def test_terms_are_compared_by_content() -> None:
    assert element(Ref("a", ())) == element(Ref("a", ())) != element(Ref("b", ()))
    assert hash(ONE) == hash(number(1))
    assert repr(read("exp(a) * 2")) == "(exp(a[]) * 2)"


def test_a_trace_tells_the_normal_form_and_each_identity() -> None:
    (site,) = fuse(gathered(), verify=False, trace=True).sites
    first, *fired = site.terms
    assert first.startswith("out = ")
    assert "sum(key0, " in first
    assert any(line.startswith("bound label: ") for line in fired)
    (quiet,) = fuse(gathered(), verify=False).sites
    assert not quiet.terms


def test_a_number_stands_behind_what_is_chosen_instead_of_it() -> None:
    """One spelling of a choice: `where(c, 5, a)` and `where(not c, a, 5)` are the same term."""
    whole = normal()
    chosen = whole.again(read("where(c, 5, a)"))
    assert chosen == whole.again(read("where(not c, a, 5)"))
    assert chosen.args[2].is_number()
