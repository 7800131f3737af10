"""Splicing: exactly the region is replaced, everything else stays byte for byte."""

import onnx
import pytest
from onnx import helper

from sfa_onnx.errors import ModelError
from sfa_onnx.files.model import hash_tensors_and_nodes
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION
from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.splice import check_region, splice
from tests.hand_sites import gather_site, several_sites


def _chain(text, nodes, replacement, outputs, support=(), anchor=None):
    """A toy model and a candidate over the named nodes (splicing knows no attention)."""
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = "n_" + node.output[0]
    names = [n.output[0] for n in model.graph.node]
    new = onnx.parser.parse_graph(replacement)
    candidate = Candidate(
        graph=model.graph,
        anchor=names.index(anchor or nodes[-1]),
        op=SPARSE_FLASH_ATTENTION,
        family="toy",
        nodes=tuple(names.index(n) for n in nodes),
        support=tuple(names.index(n) for n in support),
        operands=(),
        outputs=outputs,
        replacement=list(new.node),
    )
    return model, candidate


CHAIN = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[2] x) => (float[2] y, float[2] z)
<float[2] w = {1, 2}, float[2] shared = {3, 4}>
{
  before = Relu(x)
  a = Mul(before, w)
  b = Add(a, shared)
  y = Neg(b)
  z = Mul(y, shared)
}
"""
NEW = "r (float[2] before) => (float[2] y) { t = Abs(before) y = Sqrt(t) }"


def test_only_the_region_changes():
    model, candidate = _chain(CHAIN, ["a", "b", "y"], NEW, ("y",))
    model.graph.value_info.append(helper.make_tensor_value_info("a", 1, [2]))
    model.graph.value_info.append(helper.make_tensor_value_info("before", 1, [2]))
    index = GraphIndex.of(model)
    before = hash_tensors_and_nodes(model.graph)
    assert check_region(index, candidate) is None
    (result,) = splice(model, index, [candidate])
    after = hash_tensors_and_nodes(model.graph)
    assert [n.op_type for n in model.graph.node] == ["Relu", "Abs", "Sqrt", "Mul"]
    assert after[1][0] == before[1][0]
    assert after[1][3] == before[1][4]
    assert after[0] == {"shared": before[0]["shared"]}
    assert [v.name for v in model.graph.value_info] == ["before"]
    assert result.removed == ("n_a", "n_b", "n_y")
    assert result.added == tuple(n.name for n in model.graph.node[1:3])
    onnx.checker.check_model(model)


def test_inner_value_used_outside_is_refused_by_name():
    text = CHAIN.replace("z = Mul(y, shared)", "z = Mul(b, shared)")
    model, candidate = _chain(text, ["a", "b", "y"], NEW, ("y",))
    refusal = check_region(GraphIndex.of(model), candidate)
    assert "'b' is also used by 'n_z'" in refusal.reason


def test_inner_value_as_graph_output_is_refused():
    text = CHAIN.replace("float[2] z)", "float[2] z, float[2] b)")
    model, candidate = _chain(text, ["a", "b", "y"], NEW, ("y",))
    assert "'b' is an output of the graph" in check_region(GraphIndex.of(model), candidate).reason


@pytest.mark.parametrize("kind", ["If", "Loop"])
def test_captured_names_count_as_uses(kind):
    model, candidate = _chain(CHAIN, ["a", "b", "y"], NEW, ("y",))
    inner = helper.make_node("Identity", ["b"], ["inner"])
    if kind == "If":
        body = helper.make_graph(
            [inner], "body", [], [helper.make_tensor_value_info("inner", 1, [2])]
        )
        node = helper.make_node("If", ["cond"], ["w2"], "user", then_branch=body, else_branch=body)
    else:
        values = [helper.make_tensor_value_info(n, t, []) for n, t in (("i", 7), ("c", 9))]
        outs = [
            helper.make_tensor_value_info("c", 9, []),
            helper.make_tensor_value_info("inner", 1, [2]),
        ]
        body = helper.make_graph([inner], "body", values, outs)
        node = helper.make_node("Loop", ["n", ""], ["w2"], "user", body=body)
    model.graph.node.append(node)
    model.graph.output.add(name="w2")
    reason = check_region(GraphIndex.of(model), candidate).reason
    assert "'b' is captured by a sub-graph of 'user'" in reason


def test_readers_that_no_output_needs_go_with_the_region_and_others_stay():
    dead = "d1 = Sub(b, shared)\n  d2 = Exp(d1)\n  d3 = Relu(before)\n  d4 = Abs(y)\n  z ="
    model, candidate = _chain(CHAIN.replace("z =", dead), ["a", "b", "y"], NEW, ("y",))
    index = GraphIndex.of(model)
    assert check_region(index, candidate) is None
    (result,) = splice(model, index, [candidate])
    assert result.removed == ("n_a", "n_b", "n_y", "n_d1", "n_d2")
    left = [n.name for n in model.graph.node if n.name not in result.added]
    assert left == ["n_before", "n_d3", "n_d4", "n_z"]
    onnx.checker.check_model(model, full_check=True)


def test_a_weight_that_a_dead_node_reads_stays():
    text = CHAIN.replace("z =", "d = Add(before, w)\n  z =")
    model, candidate = _chain(text, ["a", "b", "y"], NEW, ("y",))
    splice(model, GraphIndex.of(model), [candidate])
    assert {t.name for t in model.graph.initializer} == {"w", "shared"}
    onnx.checker.check_model(model, full_check=True)


def test_reader_between_region_nodes_moves_the_insertion_forward():
    text = CHAIN.replace(
        "y = Neg(b)\n  z = Mul(y, shared)",
        "y = Neg(b)\n  z = Mul(y, shared)\n  q = Abs(y)\n  u = Exp(b)",
    )
    text = text.replace("float[2] z)", "float[2] z, float[2] u)")
    new = "r (float[2] before) => (float[2] y, float[2] u) { y = Abs(before) u = Sqrt(y) }"
    model, candidate = _chain(text, ["a", "b", "y", "u"], new, ("y", "u"))
    assert check_region(GraphIndex.of(model), candidate) is None
    splice(model, GraphIndex.of(model), [candidate])
    assert [n.op_type for n in model.graph.node] == ["Relu", "Abs", "Sqrt", "Mul", "Abs"]
    onnx.checker.check_model(model)


def test_output_read_before_an_input_exists_is_refused():
    text = CHAIN.replace(
        "z = Mul(y, shared)", "z = Mul(y, shared)\n  late = Relu(z)\n  u = Add(late, b)"
    )
    new = """r (float[2] before, float[2] late) => (float[2] y, float[2] u) {
      y = Add(before, late) u = Abs(y) }"""
    model, candidate = _chain(text, ["a", "b", "y", "u"], new, ("y", "u"))
    reason = check_region(GraphIndex.of(model), candidate).reason
    assert "is read by 'n_z' before all inputs" in reason
    assert "'n_late'" in reason


def test_new_names_are_unique():
    text = CHAIN.replace("before = Relu(x)", "t = Relu(x)\n  before = Relu(t)")
    model, candidate = _chain(text, ["a", "b", "y"], NEW, ("y",))
    candidate.replacement[0].name = "n_before"
    splice(model, GraphIndex.of(model), [candidate])
    values = [o for n in model.graph.node for o in n.output]
    names = [n.name for n in model.graph.node]
    assert len(set(values)) == len(values)
    assert len(set(names)) == len(names)
    assert "" not in names
    onnx.checker.check_model(model)


def test_shared_support_goes_once_nobody_reads_it():
    text = CHAIN.replace(
        "before = Relu(x)", "before = Relu(x)\n  mask = Abs(w)\n  other = Exp(w)"
    ).replace("a = Mul(before, w)", "a = Mul(before, mask)")
    model, candidate = _chain(text, ["a", "b", "y"], NEW, ("y",), support=["mask", "other"])
    (result,) = splice(model, GraphIndex.of(model), [candidate])
    ops = [n.op_type for n in model.graph.node]
    assert ops == ["Relu", "Exp", "Abs", "Sqrt", "Mul"]  # `other` was dead before: not our business
    assert "n_mask" in result.removed
    assert [t.name for t in model.graph.initializer] == ["w", "shared"]


def test_metadata_of_the_anchor_is_kept():
    model, candidate = gather_site()
    model.graph.node[candidate.anchor].metadata_props.add(key="namespace", value="layers.3")
    splice(model, GraphIndex.of(model), [candidate])
    assert all(n.metadata_props[0].value == "layers.3" for n in model.graph.node)


def test_domains_are_imported_once_and_conflicts_refused():
    model, candidate = gather_site()
    splice(model, GraphIndex.of(model), [candidate])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18), ("npu", 1)]
    model, candidate = gather_site()
    model.opset_import.add(domain="npu", version=1000)  # an optimiser's, used by no node
    splice(model, GraphIndex.of(model), [candidate])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18), ("npu", 1)]
    model, candidate = gather_site()
    model.opset_import.add(domain="npu", version=2)
    model.graph.node.append(helper.make_node("NPUOther", [], ["other"], domain="npu"))
    with pytest.raises(ModelError, match="version 2"):
        splice(model, GraphIndex.of(model), [candidate])


def test_many_sites_at_once():
    model, candidates = several_sites(4)
    index = GraphIndex.of(model)
    assert [check_region(index, c) for c in candidates] == [None] * 4
    results = splice(model, index, candidates[1:])
    assert len(results) == 3
    ops = [n.op_type for n in model.graph.node]
    assert ops.count("NPUSparseFlashAttention") == 3
    assert ops.count("Softmax") == 1
    onnx.checker.check_model(model)


def test_a_node_of_two_sites_is_an_error():
    model, candidates = several_sites(2)
    candidates[1].nodes = (*candidates[1].nodes, candidates[0].nodes[0])
    with pytest.raises(ModelError, match="belongs to the sites 'site0' and 'site1'"):
        splice(model, GraphIndex.of(model), candidates)


def test_a_site_may_feed_the_next():
    text = CHAIN.replace("z = Mul(y, shared)", "c = Mul(y, w)\n  z = Neg(c)")
    model, first = _chain(text, ["a", "b", "y"], NEW, ("y",))
    _, second = _chain(text, ["c", "z"], "r (float[2] y) => (float[2] z) { z = Tanh(y) }", ("z",))
    second.graph = model.graph
    splice(model, GraphIndex.of(model), [second, first])
    assert [n.op_type for n in model.graph.node] == ["Relu", "Abs", "Sqrt", "Tanh"]
    assert [t.name for t in model.graph.initializer] == ["w", "shared"][2:]
    onnx.checker.check_model(model)
