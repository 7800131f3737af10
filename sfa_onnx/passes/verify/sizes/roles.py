"""What each symbol of a graph's inputs sizes at a site: queries, keys, the selection ..."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sfa_onnx.passes.candidate import Candidate, Operand, Role

__all__ = ["KEYS", "find_roles", "ragged"]

KEYS = (Role.LATENT, Role.LATENT_INT8, Role.PACKED, Role.SCALE, Role.KEY_ROPE)
Shapes = dict[str, tuple[int, ...]]


def find_roles(
    evaluate: Callable[[Mapping[str, int]], Shapes],
    symbols: Mapping[str, int],
    candidate: Candidate,
    layout_kv: str,
) -> dict[str, set[str]]:
    """Symbol -> what it sizes, found by changing one size at a time.

    Args:
        evaluate: shapes of the operands for sizes of the symbols.
        symbols: sizes to start from, of the symbols that are open.
        candidate: the site.
        layout_kv: how the graph takes its keys.
    """
    base = evaluate(symbols)
    found: dict[str, set[str]] = {}
    used: dict[tuple[str, int], int] = {}  # (operand, merged axis) -> symbols seen so far
    for symbol, size in symbols.items():
        changed = evaluate({**symbols, symbol: size + 4})
        roles: set[str] = set()
        for operand in candidate.operands:
            before, after = base[operand.value], changed[operand.value]
            for axis, (a, b) in enumerate(zip(before, after, strict=True)):
                if a != b:
                    place = (operand.value, axis)
                    roles.add(_role(candidate, layout_kv, operand, axis, used.get(place, 0)))
                    used[place] = used.get(place, 0) + 1
        if roles:
            found[symbol] = roles - {""} or {"other"}
    return found


def ragged(candidate: Candidate) -> bool:
    """Whether sequences of queries follow each other along one axis."""
    lengths = (o for o in candidate.operands if o.role is Role.LENGTHS_QUERY)
    return any(o.domain.cumulative for o in lengths)


def _role(candidate: Candidate, layout_kv: str, operand: Operand, axis: int, nth: int = 0) -> str:
    """What an axis of an operand sizes, by the operand's role and the axis' place.

    `nth` counts the symbols that size a merged axis ("B*S1"), in the order of the inputs.
    """
    rank = len(operand.axes)
    if operand.role is Role.INDICES:
        if axis == rank - 1:
            return "K"
        first = 0 if operand.axes[0] != "1" else 1
        several = sum(a != "1" for a in operand.axes[:-1]) > 1
        alone = not several and operand.axes[axis] == "T"
        if layout_kv == "TND" or ragged(candidate) or alone:
            return "T"
        return "B" if axis == first and several else "S1"
    if operand.role in KEYS:
        return _key_role(candidate, layout_kv, operand, axis)
    if operand.role is Role.BLOCK_TABLE:
        return "M" if axis == rank - 1 else "B"
    if operand.role in (Role.LENGTHS_KV, Role.LENGTHS_QUERY):
        return "B"
    parts = operand.axes[axis].split("*")
    label = parts[min(nth, len(parts) - 1)]
    return label if label in ("B", "S1", "S2", "K", "N1", "T", "M") else ""


def _key_role(candidate: Candidate, layout_kv: str, operand: Operand, axis: int) -> str:
    rank = len(operand.axes)
    if axis == rank - 1:
        return "width"
    if any(o.role is Role.BLOCK_TABLE for o in candidate.operands):
        return "pages" if axis == 0 else "slots"
    if layout_kv == "TND":
        return "T2"
    axes = [i for i in range(rank - 1) if operand.axes[i] != "1"]
    if [operand.axes[i].partition("_of_")[0] for i in axes[:2]] == ["S2", "B"]:
        return "S2" if axis == axes[0] else "B"
    return "S2" if axis == axes[min(1, len(axes) - 1)] else "B"
