"""A relu is a relu however it is written, and what only looks like one is none."""

from __future__ import annotations

import pytest

from tests.hand_indexers import CAUSAL, fused, indexer, refused

pytestmark = pytest.mark.kernel
SPELLINGS = {
    "switched": " b = Greater(x, zero)\n f = Cast<to=1>(b)\n r = Mul(x, f)\n",
    "switched after": " b = Less(zero, x)\n f = Cast<to=1>(b)\n z = Mul(x, half)\n r = Mul(z, f)\n",
    "switched off": " b = Less(x, zero)\n c = Not(b)\n f = Cast<to=1>(c)\n r = Mul(f, x)\n",
    "half a sum": " a = Abs(x)\n b = Add(x, a)\n r = Mul(b, half)\n",
    "half by half": " b = Mul(x, half)\n a = Abs(b)\n r = Add(b, a)\n",
    "divided": " a = Abs(x)\n b = Add(a, x)\n r = Div(b, two0)\n",
    "larger": " r = Max(x, zero)\n",
    "ceiling of the type": " r = Clip(x, zero, most)\n",
    "without what is below": " n = Min(x, zero)\n r = Sub(x, n)\n",
    "turned twice": " n = Neg(x)\n c = Min(n, zero)\n r = Neg(c)\n",
    "with what is below": " n = Neg(x)\n c = Relu(n)\n r = Add(x, c)\n",
    "chosen": " b = GreaterOrEqual(x, zero)\n r = Where(b, x, zero)\n",
    "chosen off": " b = Less(x, zero)\n r = Where(b, zero, x)\n",
    "LeakyRelu": " r = LeakyRelu<alpha=0.0>(x)\n",
    "PRelu": " r = PRelu(x, zero)\n",
    "ThresholdedRelu": " r = ThresholdedRelu<alpha=0.0>(x)\n",
    "Elu": " r = Elu<alpha=0.0>(x)\n",
    "Selu": " r = Selu<alpha=0.0, gamma=2.0>(x)\n",
}
HIDDEN = f"{CAUSAL} m = Where(seen, s, low)\n"


@pytest.mark.parametrize("kind", SPELLINGS)
def test_every_spelling_is_the_indexer(kind: str) -> None:
    report = fused(indexer(relu=SPELLINGS[kind], hidden=HIDDEN))
    (node,) = (n for n in report.model.graph.node if n.op_type == "NPULightningIndexer")
    assert next(a.i for a in node.attribute if a.name == "sparse_mode") == 3


def test_a_relu_of_two_products_is_switched_on_by_their_sum() -> None:
    parts = (
        " kt = Transpose<perm=[0,2,1]>(k)\n k4 = Unsqueeze(kt, one)\n qa, qb = Split<axis=3>(q)\n"
        " ka, kb = Split<axis=2>(k4)\n xa = MatMul(qa, ka)\n xb = MatMul(qb, kb)\n"
        " x = Add(xa, xb)\n"
    )
    fused(indexer(products=parts, relu=SPELLINGS["switched"]))


LOOKALIKES = {
    "leaky": (" r = LeakyRelu(x)\n", "LeakyRelu stands where a relu is expected"),
    "slope": (" r = PRelu(x, half)\n", "PRelu stands where a relu is expected"),
    "given slope": (" r = PRelu(x, slope)\n", "PRelu stands where a relu is expected"),
    "threshold": (" r = ThresholdedRelu(x)\n", "ThresholdedRelu stands where a relu is expected"),
    "elu": (" r = Elu(x)\n", "Elu stands where a relu is expected"),
    "selu": (" r = Selu<gamma=2.0>(x)\n", "Selu stands where a relu is expected"),
    "size": (" r = Abs(x)\n", "no lightning indexer"),
    "another's size": (" a = Abs(q)\n b = ReduceSum(a, last)\n r = Add(x, b)\n", "no lightning"),
    "above a half": (
        " b = Greater(x, half)\n f = Cast<to=1>(b)\n r = Mul(x, f)\n",
        "no lightning indexer",
    ),
    "below": (" r = Min(x, zero)\n", "not positive"),
    "switched on below": (
        " b = Less(x, zero)\n f = Cast<to=1>(b)\n r = Mul(x, f)\n",
        "not positive",
    ),
    "ceiling": (" r = Clip(x, zero, two0)\n", "no lightning indexer"),
    "squared": (" a = Relu(x)\n r = Mul(a, x)\n", "no lightning indexer"),
    "a size too large": (" b = Abs(x)\n a = Mul(b, two0)\n r = Add(x, a)\n", "no lightning"),
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_only_looks_like_a_relu_is_refused(kind: str) -> None:
    relu, reason = LOOKALIKES[kind]
    refused(indexer(", float slope", relu=relu, hidden=HIDDEN), reason)
