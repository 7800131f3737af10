"""Sizes as expressions: one standard form, Min and Max, stand-ins, and what makes two sizes one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes import size as size_module
from sfa_onnx.passes.shapes.concrete import Concrete, SizesMeetError
from sfa_onnx.passes.shapes.dims import size_of
from sfa_onnx.passes.shapes.fold_open import numbers_of
from sfa_onnx.passes.shapes.form import Form, largest, quotient, smallest
from sfa_onnx.passes.shapes.meet import made_equal
from sfa_onnx.passes.shapes.size import Size, StandIns, broadcast, form_of, greatest, is_open, least
from tests.zoo.write import Graph

A, B, C = (Form.of(x) for x in "abc")
SYMBOLS = st.fixed_dictionaries({x: st.integers(0, 40) for x in "abc"})
NUMBERS = st.builds(lambda n: Form(const=n), st.integers(0, 9))


def combined(inner: st.SearchStrategy[Form]) -> st.SearchStrategy[Form]:
    two = st.tuples(inner, inner)
    return st.one_of(
        two.map(lambda t: t[0].plus(t[1])),
        two.map(lambda t: t[0].times(t[1])),
        two.map(lambda t: smallest(*t)),
        two.map(lambda t: largest(*t)),
        st.tuples(inner, st.integers(1, 7)).map(lambda t: quotient(t[0], Form(const=t[1]))),
    )


FORMS = st.recursive(st.one_of(st.sampled_from([A, B, C]), NUMBERS), combined, max_leaves=6)


def value(text: str, sizes: dict[str, int]) -> int:
    return int(eval(text, {"Min": min, "Max": max}, dict(sizes)))


@given(FORMS, FORMS, SYMBOLS)
def test_forms_compute_what_numbers_do(f: Form, g: Form, sizes: dict[str, int]) -> None:
    x, y = f(sizes), g(sizes)
    assert f.plus(g)(sizes) == x + y == g.plus(f)(sizes)
    assert f.plus(g, -1)(sizes) == x - y
    assert f.times(g)(sizes) == x * y
    assert smallest(f, g)(sizes) == min(x, y)
    assert largest(f, g)(sizes) == max(x, y)
    assert quotient(f, Form(const=4))(sizes) == x // 4
    assert f.times(g) == g.times(f)
    assert value(str(f), sizes) == x
    assert f.least is None or f.least <= x
    if f.exceeds(g):
        assert x >= y
    if (whole := f.over(g)) is not None and y:
        assert whole(sizes) * y == x


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(FORMS, st.fixed_dictionaries({x: st.integers(1, 40) for x in "abc"}))
def test_a_text_gives_back_the_form(f: Form, sizes: dict[str, int]) -> None:
    """For axes that have elements: `Max(1, a)` is what exporters write for a broadcast `a`."""
    home = StandIns()
    read = size_of(str(f), {x: home.symbol(x) for x in "abc"})
    assert read is not None
    assert form_of(read)(sizes) == f(sizes)
    assert is_open(read) == (not f.fixed)


def test_what_is_no_size_stands_for_none() -> None:
    assert size_of("0", {}) == 0
    assert size_of(f"{(1 << 63) - 1}", {}) == (1 << 63) - 1
    for text in ("-1", "3 - 4", "s - 4", f"{1 << 63}", "1//0", "9**9", "'x'", "s[0]", "__import__"):
        assert size_of(text, {"s": 3}) is None


def test_thousands_of_symbols_are_told_apart(monkeypatch) -> None:
    asked, prime = [], size_module._prime
    monkeypatch.setattr(size_module, "_prime", lambda n: asked.append(n) or prime(n))
    home = StandIns()
    numbers = [int(home.symbol(f"s{i}")) for i in range(2000)]
    assert len(set(numbers)) == 2000
    assert all(n % d for n in numbers for d in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41))
    few = numbers[:100]
    assert len({a - b for a in few for b in few}) == 100 * 99 + 1  # all differences of two
    behind = sum(n > few[-1] for n in asked)
    assert behind < 30 * 1900  # of the numbers there, one in seven or eight is prime
    assert [n for n in range(19, 3000, 2) if prime(n)] == [
        n for n in range(19, 3000, 2) if all(n % d for d in range(3, n, 2))
    ]


def test_min_and_max_are_neither_argument_unless_that_is_certain() -> None:
    total = A.plus(B)
    assert str(smallest(Form(const=8), total)) == "Min(8, a + b)"
    assert smallest(total, A) == A
    assert largest(total, A) == total
    assert largest(A, Form()) == A
    assert smallest(Form(const=8), Form(const=3), A) == smallest(A, Form(const=3))
    assert smallest(smallest(A, B), Form(const=4)) == smallest(smallest(Form(const=4), B), A)
    assert total.exceeds(smallest(Form(const=8), total))


def test_stand_ins_of_sums_products_and_minima_are_all_different() -> None:
    home = StandIns()
    forms = [Form.of(f"s{i}") for i in range(9)]
    pairs = [x.plus(y) for i, x in enumerate(forms) for y in forms[:i]]
    pairs += [x.times(y) for i, x in enumerate(forms) for y in forms[: i + 1]]
    pairs += [smallest(Form(const=8), x) for x in pairs[:20]]
    numbers = [int(home.size(f)) for f in (*forms, *pairs)]
    assert len(set(numbers)) == len(numbers)
    assert least(8, home.size(pairs[0])) < home.size(forms[0])  # Min(8, keys) is no more than keys


def test_sizes_keep_what_they_are_through_arithmetic() -> None:
    home = StandIns()
    past, seq = home.symbol("past"), home.symbol("seq")
    total = past + seq
    assert isinstance(total, Size)
    assert total - past == seq
    assert str(form_of((total * 4) // 4)) == "past + seq"
    assert str(form_of(-((-total) // 128))) == "-((-past - seq) // 128)"
    assert not is_open(total - total + 3)
    assert form_of(greatest(0, total - 8)).least == 0


@pytest.mark.parametrize(
    ("a", "b", "swaps"),
    [
        (A, B, {"b": "a"}),
        (C, A.plus(B), {"c": "a + b"}),
        (A.plus(B), A.plus(C), {"c": "b"}),
        (A.times(B), Form(const=2).times(B), {"a": "2"}),
        (A, Form(const=7), {"a": "7"}),
        (A.times(B), C, {"c": "a*b"}),
        (smallest(Form(const=8), A.plus(B)), smallest(Form(const=8), C), {"c": "a + b"}),
        (C.plus(Form(const=1)), A.plus(B), {"c": "a + b - 1"}),
        (A.plus(Form(const=1)), A, None),
        (Form(const=3), Form(const=4), None),
        (A.times(A), B.times(C), None),
    ],
)
def test_what_makes_two_sizes_one(a: Form, b: Form, swaps: dict[str, str] | None) -> None:
    found = made_equal(a, b, list("abc"), [])
    assert found == made_equal(b, a, list("abc"), [])
    assert (None if found is None else {s: str(f) for s, f in found}) == swaps


def computed(*steps: str) -> tuple[Graph, str]:
    """min(8, past + seq), then ceil(that / 3) * 3, as shape arithmetic."""
    g = Graph(18)
    total = g.op("Add", *(g.op("Shape", x, start=1, end=2) for x in ("past", "new")))
    k = g.op("Min", g.ints(8), total)
    if "blocks" in steps:
        k = g.op("Div", g.op("Add", k, g.ints(2)), g.ints(3))
    return g, k


@pytest.mark.parametrize(("steps", "text"), [((), "Min(8, past + seq)"), (("blocks",), None)])
def test_shape_arithmetic_is_followed_as_expressions(steps: tuple[str, ...], text: str) -> None:
    g, k = computed(*steps)
    out = g.op("Expand", "x", k)
    inputs = {
        "past": ("f32", ("b", "past", 4)),
        "new": ("f32", ("b", "seq", 4)),
        "x": ("f32", (1,)),
    }
    model = g.model(inputs, {"out": ("f32", ("n",))}, [out])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    index = GraphIndex.of(model)
    (size,) = Concrete(index).shape("out") or (0,)
    assert is_open(size)
    assert text is None or str(form_of(size)) == text
    for past, seq in ((1, 1), (3, 2), (7, 1), (9, 9)):
        chosen = Concrete(index, {"b": 2, "past": past, "seq": seq})
        k = min(8, past + seq)
        assert chosen.shape("out") == ((k if text else -(-k // 3)),)
        assert form_of(size)({"past": past, "seq": seq}) == (k if text else -(-k // 3))


def test_an_axis_that_must_be_a_sum_is_one() -> None:
    g = Graph(18)
    out = g.op("Add", g.op("Concat", "past", "new", axis=0), "table")
    inputs = {"past": ("f32", ("p",)), "new": ("f32", ("s",)), "table": ("f32", ("s62",))}
    model = g.model(inputs, {"out": ("f32", ("n",))}, [out])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    sizes = Concrete(GraphIndex.of(model))
    assert sizes.shape("out") == (sizes.symbols["p"] + sizes.symbols["s"],)
    assert sizes.equal == (("p + s", "s62"),)
    with pytest.raises(SizesMeetError, match="sizes 5 and 6 meet"):
        Concrete(GraphIndex.of(model), {"p": 2, "s": 3, "s62": 6}).shape("out")


def test_what_onnx_infers_of_open_sizes_stays_open() -> None:
    """An operator without a rule of ours: its result has plain numbers for what is open."""
    g = Graph(18)
    out = g.op("Pad", "x", g.ints(0, 1, 0, 2))
    model = g.model({"x": ("f32", ("b", "s"))}, {"out": ("f32", ("b", "n"))}, [out])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    batch, padded = Concrete(GraphIndex.of(model)).shape("out") or (0, 0)
    assert is_open(batch)
    assert is_open(padded)
    assert str(form_of(batch)) == "b"


def test_a_number_that_meets_a_stand_in_moves_the_stand_ins() -> None:
    """The file has an axis as long as the stand-in of a symbol: they are still two sizes."""
    home = StandIns()
    taken = int(home.symbol("s"))
    g = Graph(18)
    out = g.op("Mul", "x", g.const(np.ones((1, taken), np.float32)))
    model = g.model({"x": ("f32", ("s", 1))}, {"out": ("f32", ("s", taken))}, [out])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    sizes = Concrete(GraphIndex.of(model))
    rows, columns = sizes.shape("out") or (0, 0)
    assert is_open(rows)
    assert not is_open(columns)
    assert rows != columns == taken


@pytest.mark.parametrize(
    ("axis", "sizes"),
    [(1, ("a", "24*b")), (2, ("a*b", "24")), (-1, ("6*a*b", "4")), (0, ("1", "24*a*b"))],
)
def test_flattened_axes_are_products_whoever_asks_first(axis: int, sizes: tuple[str, str]) -> None:
    """Asked for before the same product of a Reshape: no second name for it."""
    g = Graph(18)
    flat = g.op("Flatten", "x", axis=axis)
    line = g.op("Reshape", "x", g.ints(-1))
    outs = {flat: ("f32", ("m", "n")), line: ("f32", ("l",))}
    concrete = Concrete(
        GraphIndex.of(g.model({"x": ("f32", ("a", "b", 6, 4))}, outs, [flat, line]))
    )
    assert tuple(str(form_of(n)) for n in concrete.shape(flat) or ()) == sizes
    assert str(form_of((concrete.shape(line) or (0,))[0])) == "24*a*b"


def test_one_gives_way_where_axes_are_broadcast() -> None:
    stand_ins = StandIns()
    one, other = (stand_ins.size(x) for x in (A, B))
    assert broadcast(1, one, one) == one
    assert broadcast(1, one, other) == greatest(1, one, other) != one
    assert broadcast(1, 7) == 7
    assert broadcast(1, 1) == 1


def test_axes_that_are_broadcast_where_one_is_expected_are_that_one() -> None:
    whole = largest(Form(const=1), A, B)
    for axis in (A, B):
        assert made_equal(whole, axis, list("abc"), []) == [("b", A)]
        assert made_equal(axis, whole, list("abc"), []) == [("b", A)]
    assert made_equal(whole, C, list("abc"), []) != [("b", A)]


def test_a_cache_cut_to_the_sequences_of_a_call_has_those() -> None:
    cut = smallest(A, B)
    assert made_equal(cut, A, list("abc"), []) == [("b", A)] == made_equal(B, cut, list("abc"), [])
    assert made_equal(cut, C, list("abc"), []) != [("b", A)]


def test_positions_of_an_open_axis_are_no_sizes() -> None:
    """A tensor of another rank in every run: what stands in for a size is a size of nothing."""
    g = Graph(18)
    zero, one = g.const(0, np.int64), g.const(1, np.int64)
    count = g.op("Squeeze", g.op("Shape", "x", start=1, end=2))
    line = g.op("Range", zero, count, one)
    wide = g.op("Expand", g.op("ReduceSum", "x", g.ints(1)), line)  # [b, 1]
    index = GraphIndex.of(
        g.model({"x": ("f32", ("b", "s"))}, {"y": ("f32", ())}, [g.op("Identity", wide)])
    )
    sizes = Concrete(index)
    assert sizes.shape(wide) is None
    assert not sizes.equal
    assert [form_of(s) for s in sizes.symbols.values()] == [Form.of("b"), Form.of("s")]
    assert sizes.shape(line) == (sizes.symbols["s"],)


def test_sizes_wrap_as_the_arithmetic_of_the_file_does() -> None:
    large = np.array([[2**63, -(2**63) - 1], [2**64 + 5, -7]], object)
    assert numbers_of(large).tolist() == [[-(2**63), 2**63 - 1], [5, -7]]
    assert numbers_of(np.zeros((2, 0), object)).shape == (2, 0)
