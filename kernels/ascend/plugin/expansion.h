// Operators of ours that become several built-in GE operators: what their expansions share.
#ifndef SFA_ONNX_ASCEND_EXPANSION_H_
#define SFA_ONNX_ASCEND_EXPANSION_H_

#include <string>
#include <utility>
#include <vector>

#include "graph/graph.h"
#include "graph/operator_factory.h"
#include "graph/tensor.h"
#include "log.h"

namespace sfa_onnx {

// Attribute by which the parser finds the expansion of a node.
constexpr const char* kOriginalType = "original_type";

// Makes the nodes of one expansion; the first failure is remembered and ends the work.
class Builder {
 public:
  // `onnx_type`: the operator expanded, for messages; `node`: its name, which begins all names.
  Builder(const char* onnx_type, const char* node)
      : onnx_type_(onnx_type), prefix_(node), node_(node) {}

  ge::Operator Make(const char* type, const char* suffix) {
    const std::string name = prefix_ + "_" + suffix;
    ge::Operator op = ge::OperatorFactory::CreateOperator(name.c_str(), type);
    ge::AscendString made;
    if (op.GetName(made) != ge::GRAPH_SUCCESS || made.GetString() == nullptr ||
        name != made.GetString()) {
      if (ok_)
        SFA_LOG_ERROR(node_, "%s needs GE operator %s, which has no prototype", onnx_type_, type);
      ok_ = false;
    }
    return op;
  }

  ge::Operator Data(size_t index) {
    const std::string suffix = "input" + std::to_string(index);
    ge::Operator data = Make("Data", suffix.c_str());
    data.SetAttr("index", static_cast<int64_t>(index));
    inputs_.push_back(data);
    return data;
  }

  template <typename T>
  ge::Operator Const(const char* suffix, ge::DataType type, const std::vector<T>& values,
                     bool scalar = false) {
    std::vector<int64_t> dims;
    if (!scalar) dims.push_back(static_cast<int64_t>(values.size()));
    const ge::TensorDesc desc(ge::Shape(dims), ge::FORMAT_ND, type);
    const ge::Tensor tensor(desc, reinterpret_cast<const uint8_t*>(values.data()),
                            values.size() * sizeof(T));
    ge::Operator constant = Make("Const", suffix);
    constant.SetAttr("value", tensor);
    return constant;
  }

  ge::Operator Unary(const char* type, const char* suffix, const ge::Operator& x) {
    ge::Operator op = Make(type, suffix);
    op.SetInput("x", x);
    return op;
  }

  ge::Operator Binary(const char* type, const char* suffix, const ge::Operator& x1,
                      const ge::Operator& x2) {
    ge::Operator op = Make(type, suffix);
    op.SetInput("x1", x1);
    op.SetInput("x2", x2);
    return op;
  }

  ge::Operator Cast(const char* suffix, const ge::Operator& x, ge::DataType type) {
    ge::Operator op = Unary("Cast", suffix, x);
    op.SetAttr("dst_type", static_cast<int64_t>(type));
    return op;
  }

  ge::Operator Reshape(const char* suffix, const ge::Operator& x, const ge::Operator& shape) {
    ge::Operator op = Unary("Reshape", suffix, x);
    op.SetInput("shape", shape);
    return op;
  }

  ge::Operator Concat(const char* suffix, const std::vector<ge::Operator>& parts, int64_t axis) {
    ge::Operator op = Make("ConcatD", suffix);
    op.DynamicInputRegister("x", static_cast<uint32_t>(parts.size()));
    for (size_t i = 0; i < parts.size(); ++i) {
      const std::string port = "x" + std::to_string(i);
      op.SetInput(port.c_str(), parts[i]);
    }
    op.SetAttr("concat_dim", axis);
    op.SetAttr("N", static_cast<int64_t>(parts.size()));
    return op;
  }

  ge::Operator Slice(const char* suffix, const ge::Operator& x, int64_t begin, int64_t end,
                     int64_t axis) {
    const std::string base(suffix);
    ge::Operator op = Unary("StridedSliceV2", suffix, x);
    op.SetInput("begin", Const<int64_t>((base + "_begin").c_str(), ge::DT_INT64, {begin}));
    op.SetInput("end", Const<int64_t>((base + "_end").c_str(), ge::DT_INT64, {end}));
    op.SetInput("axes", Const<int64_t>((base + "_axes").c_str(), ge::DT_INT64, {axis}));
    op.SetInput("strides", Const<int64_t>((base + "_step").c_str(), ge::DT_INT64, {1}));
    return op;
  }

  // The dims of x, int64.
  ge::Operator Shape(const char* suffix, const ge::Operator& x) {
    ge::Operator op = Unary("Shape", suffix, x);
    op.SetAttr("dtype", static_cast<int64_t>(ge::DT_INT64));
    return op;
  }

  // [lead ..., tail ...] where `lead` are the dims of x but the last.
  ge::Operator ShapeWith(const char* suffix, const ge::Operator& lead, std::vector<int64_t> tail) {
    const std::string base(suffix);
    const ge::Operator end = Const<int64_t>((base + "_tail").c_str(), ge::DT_INT64, tail);
    return Concat(suffix, {lead, end}, 0);
  }

  // The bytes of x, [..., n * itemsize] int8.
  ge::Operator Bytes(const char* suffix, const ge::Operator& x, const ge::Operator& rows) {
    const std::string base(suffix);
    ge::Operator bits = Unary("Bitcast", (base + "_bits").c_str(), x);
    bits.SetAttr("type", ge::DT_INT8);
    return Reshape(suffix, bits, rows);
  }

  // Makes `graph` of what was built, with one output; false when a node could not be made.
  bool Finish(const ge::Operator& output, ge::Graph& graph) const {
    if (!ok_) return false;
    std::vector<std::pair<ge::Operator, std::vector<size_t>>> outputs;
    outputs.emplace_back(output, std::vector<size_t>{0});
    graph.SetInputs(inputs_).SetOutputs(outputs);
    return true;
  }

 private:
  const char* onnx_type_;
  std::string prefix_;
  const char* node_;
  std::vector<ge::Operator> inputs_;
  bool ok_ = true;
};

}  // namespace sfa_onnx

#endif  // SFA_ONNX_ASCEND_EXPANSION_H_
