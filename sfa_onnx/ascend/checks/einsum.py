"""An Einsum of two operands as one broadcast MatMul, where that says the same."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MatMulForm", "as_matmul"]


@dataclass(frozen=True)
class MatMulForm:
    """Axis labels by what they do.

    The first operand becomes [batch, left[:-1], 1 per right[:-1], left[-1], inner], the second
    [batch, 1 per left[:-1], right[:-1], inner, right[-1]]; MatMul broadcasts the ones.
    """

    left_labels: str
    right_labels: str
    output_labels: str
    batch: str  # in both operands and in the output
    left: str  # in the first operand only
    right: str  # in the second operand only
    inner: str  # in both, summed over

    @property
    def left_perm(self) -> list[int]:
        """Axes of the first operand in the order batch, left, inner."""
        return [self.left_labels.index(c) for c in self.batch + self.left + self.inner]

    @property
    def right_perm(self) -> list[int]:
        """Axes of the second operand in the order batch, right[:-1], inner, right[-1:]."""
        order = self.batch + self.right[:-1] + self.inner + self.right[-1:]
        return [self.right_labels.index(c) for c in order]

    @property
    def output_perm(self) -> list[int]:
        """From the product's order to the order of the output."""
        made = self.batch + self.left[:-1] + self.right[:-1] + self.left[-1:] + self.right[-1:]
        return [made.index(c) for c in self.output_labels]


def as_matmul(equation: str, ranks: list[int]) -> MatMulForm | None:
    """The MatMul form of `equation` for operands of these ranks, None when it has none.

    Refused: another number of operands than two, ellipses, a label twice in an operand (diagonal),
    a label of one operand that is neither in the other nor in the output (a plain sum).
    """
    text = equation.replace(" ", "")
    if "." in text or text.count("->") > 1 or text.count(",") != 1:
        return None
    operands, arrow, output = text.partition("->")
    left, right = operands.split(",")
    if not arrow:
        both = left + right
        output = "".join(sorted(c for c in set(both) if both.count(c) == 1))
    if [len(left), len(right)] != ranks or not (left + right + output).isalpha():
        return None
    if any(len(set(s)) != len(s) for s in (left, right, output)) or set(output) - set(left + right):
        return None
    if {c for c in left + right if (c in left) != (c in right)} - set(output):
        return None
    return MatMulForm(
        left,
        right,
        output,
        batch="".join(c for c in output if c in left and c in right),
        left="".join(c for c in output if c not in right),
        right="".join(c for c in output if c not in left),
        inner="".join(c for c in left if c in right and c not in output),
    )
