"""What a row of the table of identities is, and the normaliser that applies rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from sfa_onnx.passes.values.terms import REDUCTIONS, Term

__all__ = ["Fired", "Identity", "Normal", "row"]


@dataclass(frozen=True)
class Identity:
    """One equation.

    Attributes:
        name: what people call it.
        ops: operators that may stand at the top of the left side.
        left, right: both sides, in the notation of `tests/test_values.py`, which evaluates them.
        rule: the right side of a term whose arguments are normal already; None: it does not apply.
        unless: a left side that violates the condition, and what a careless rule would make of it.
    """

    name: str
    ops: tuple[str, ...]
    left: str
    right: str
    rule: Callable[[Normal, Term], Term | None]
    unless: tuple[str, str] | None = None


def row(
    name: str,
    ops: str | Iterable[str],
    left: str,
    right: str,
    rule: Callable[[Normal, Term], Term | None],
    *unless: str,
) -> Identity:
    """A row of the table; operators may be given as words, `unless` as its two sides."""
    words = ops.split() if isinstance(ops, str) else ops
    return Identity(
        name, tuple(words), left, right, rule, (unless[0], unless[1]) if unless else None
    )


@dataclass(frozen=True)
class Fired:
    """An identity at work: for `inspect --explain --trace`."""

    name: str
    before: Term
    after: Term

    def __str__(self) -> str:
        return f"{self.name}: {self.before} = {self.after}"


@dataclass
class Normal:
    """Builds terms in normal form by the rows of a table; notes which rows fire.

    Attributes:
        table: the rows, in the order in which they are tried.
        fired: what has been applied so far, in order.
    """

    table: Iterable[Identity]
    fired: list[Fired] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rows: dict[str, list[Identity]] = {}
        for row in self.table:
            for op in row.ops:
                self._rows.setdefault(op, []).append(row)
        self._made: dict[Term, Term] = {}

    def make(self, op: str, args: tuple[Term, ...] = (), data: Hashable = None) -> Term:
        """The normal form of an operator applied to normal terms."""
        term = Term(op, args, data)
        known = self._made.get(term)
        if known is not None:
            return known
        self._made[term] = term  # a row that meets its own left side again leaves it
        result = term
        for row in self._rows.get(op, ()):
            found = row.rule(self, term)
            if found is not None and found != term:
                self.fired.append(Fired(row.name, term, found))
                result = found
                break
        self._made[term] = result
        return result

    def again(self, term: Term) -> Term:
        """`term`, built anew from its leaves."""
        if not term.args:
            return self.make(term.op, (), term.data) if term.op not in REDUCTIONS else term
        return self.make(term.op, tuple(self.again(a) for a in term.args), term.data)

    # -- what rows and readers build ------------------------------------------------------------

    def add(self, *terms: Term) -> Term:
        """Their sum."""
        return self.make("add", terms)

    def mul(self, *terms: Term) -> Term:
        """Their product."""
        return self.make("mul", terms)

    def power(self, base: Term, exponent: int) -> Term:
        """`base` to a whole number."""
        return self.make("pow", (base,), exponent)

    def exp(self, term: Term) -> Term:
        """The exponential."""
        return self.make("exp", (term,))

    def log(self, term: Term) -> Term:
        """The natural logarithm."""
        return self.make("log", (term,))

    def where(self, condition: Term, then: Term, other: Term) -> Term:
        """`then` where the condition holds, else `other`."""
        return self.make("where", (condition, then, other))

    def flag(self, condition: Term) -> Term:
        """1 where the condition holds, else 0."""
        return self.make("flag", (condition,))

    def negate(self, condition: Term) -> Term:
        """Whether it does not hold."""
        return self.make("not", (condition,))
