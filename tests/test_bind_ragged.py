"""Sequences packed along one axis, Attention nodes with merged heads, and why sites are refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

import sfa_onnx
from tests.zoo.catalogue import cases
from tests.zoo.judge import judge


@pytest.mark.parametrize("kind", ["packed-dynamo", "paged-dynamo", "paged-dynamo-dyn"])
def test_sequences_that_the_graph_tells_apart_by_prefix_sums(kind: str) -> None:
    """Prefix sums of queries and of keys are drawn as such; fused and original agree in runs."""
    (case,) = cases(f"^ragged-{kind}$")
    verdict = judge(case)
    assert verdict.ok, verdict.failure or verdict.reasons
    assert verdict.fused == 1


@pytest.mark.parametrize("opset", [23, 24])
def test_attention_nodes_with_merged_heads(opset: int) -> None:
    """[B, S, N * D] inputs: heads are told by q_num_heads and kv_num_heads."""
    (case,) = cases(f"^hand-attention-{opset}$")
    verdict = judge(case)
    assert verdict.ok, verdict.failure or verdict.reasons


def test_an_attention_node_with_merged_heads_and_a_cap_is_refused() -> None:
    """What the operator does not do is named, whatever the rank of the inputs."""
    (case,) = cases("^hand-attention-23$")
    model = case.make()
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    node.attribute.append(onnx.helper.make_attribute("softcap", 5.0))
    (site,) = sfa_onnx.fuse(model).sites
    assert site.status == "refused"
    assert "soft-cap" in site.reason


def test_a_softmax_times_the_reciprocal_of_its_sum() -> None:
    (case,) = cases("^hand-softmax-reciprocal$")
    verdict = judge(case)
    assert verdict.ok, verdict.failure or verdict.reasons


def test_a_reciprocal_of_more_than_the_sum_is_refused_for_it() -> None:
    """exp(s) / (sum(exp(s)) + epsilon) adds up to less than one."""
    (case,) = cases("^hand-softmax-reciprocal$")
    model = case.make()
    nodes = model.graph.node
    at = next(i for i, n in enumerate(nodes) if n.op_type == "Reciprocal")
    total = nodes[at].input[0]
    epsilon = onnx.numpy_helper.from_array(np.array(0.1, np.float32), "epsilon")
    model.graph.initializer.append(epsilon)
    nodes[at].input[0] = "padded_sum"
    nodes.insert(at, onnx.helper.make_node("Add", [total, "epsilon"], ["padded_sum"]))
    (site,) = sfa_onnx.fuse(model).sites
    assert site.status == "refused"
    assert "divided by their sum and 0.1 (an epsilon" in site.reason


@pytest.mark.parametrize(
    "name",
    [
        "int8-miss-zero-point-dynamo",
        "int8-miss-nonlinear-dequant-dynamo",
        "dense-miss-mask-soft-dynamo",
        "dense-miss-mask-bonus-dynamo",
    ],
)
def test_a_refusal_names_what_is_in_the_way(name: str) -> None:
    """The reason is the step that differs from the operator, not what it made unrecognisable."""
    (case,) = cases(f"^{name}$")
    verdict = judge(case)
    assert case.reason
    assert verdict.ok, verdict.failure


def test_starts_that_are_summed_up_in_the_graph() -> None:
    """Where sequences begin cannot be told, but rows are read at one finished index tensor."""

    class Summed(torch.nn.Module):
        def forward(self, q, kv, chosen, ends, lengths):
            owner = (torch.arange(7)[:, None] >= ends).sum(-1)
            start = (lengths.cumsum(0) - lengths)[owner]
            rows = kv[chosen + start[:, None]]
            score = torch.matmul(q, rows.transpose(-1, -2)) * 0.25
            return torch.matmul(score.softmax(-1), rows)

    q, kv, chosen = torch.randn(7, 2, 16), torch.randn(60, 16), torch.randint(0, 10, (7, 6))
    ends, lengths = torch.tensor([2, 3, 7]), torch.tensor([20, 10, 30])
    with torch.no_grad():
        program = torch.onnx.export(
            Summed().eval(), (q, kv, chosen, ends, lengths), dynamo=True, verbose=False
        )
    report = sfa_onnx.fuse(program.model_proto)
    (site,) = report.sites
    assert site.status == "fused", site.reason
    assert any("stays as it is" in a for a in site.record.assumptions)
