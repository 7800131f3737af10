"""Sinks in the ATC flavour: a factor behind the float operator, refused by name elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from sfa_onnx import runtime
from sfa_onnx.ascend import flavour
from sfa_onnx.ascend.checks import check
from sfa_onnx.errors import ContractError
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT
from tests.attention_cases import BF16, make_case
from tests.op_models import needs_library, op_model


@needs_library
@pytest.mark.parametrize("layouts", [("BSND", "BSND"), ("TND", "TND")], ids="-".join)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BF16], ids=str)
def test_the_factor_is_the_sink(layouts, dtype):
    for sparse_mode in (0, 3):
        case = make_case(
            SPARSE_FLASH_ATTENTION, layouts, dtype=dtype, sparse_mode=sparse_mode, sinks=True
        )
        case.inputs["sinks"][:3] = -np.inf, 30, np.inf
        atc = flavour.to_atc(op_model(case, symbolic=False))
        node = next(n for n in atc.graph.node if n.op_type == SPARSE_FLASH_ATTENTION.name)
        assert len(node.input) == len(SPARSE_FLASH_ATTENTION.ge_inputs)
        assert len(node.output) == 3
        if dtype == BF16:
            continue  # onnxruntime's CPU provider has no bfloat16 for what stands behind
        feeds = {n: a for n, a in case.inputs.items() if n != "value"}
        got = runtime.run(atc, feeds)["attention_out"].astype(np.float64)
        want = case.reference().astype(np.float64)
        np.testing.assert_allclose(got, want, rtol=4e-3, atol=2e-3 * np.abs(want).max())
        assert not got[np.all(want == 0, -1)].any()


@pytest.mark.parametrize(
    ("op", "layouts", "text"),
    [
        (SPARSE_FLASH_ATTENTION_ANTIQUANT, ("BSND", "BSND"), "sinks over an int8 cache"),
        (SPARSE_FLASH_ATTENTION, ("BSND", "PA_BSND"), "sinks over a paged cache"),
    ],
)
def test_elsewhere_they_are_refused_by_name(op, layouts, text):
    model = op_model(make_case(op, layouts, sinks=True))
    with pytest.raises(ContractError, match=f"'site': {text}; no released CANN"):
        flavour.to_atc(model)
    assert "sinks" in {f.rule for f in check(model, cann="9.1").findings}


def test_a_softmax_that_is_used_would_lack_the_sink():
    case = make_case(SPARSE_FLASH_ATTENTION, ("BSND", "BSND"), sinks=True, lse=True)
    with pytest.raises(ContractError, match="softmax_max and softmax_sum would lack the sink"):
        flavour.to_atc(op_model(case))
