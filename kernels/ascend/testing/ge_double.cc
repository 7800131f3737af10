// A test double of the part of CANN that our plug-in talks to: operators that remember their
// attributes, the registry, prototypes that exist by name. Tests drive it through the C functions
// at the end: they hand over a node the way the parser does and read back what was set, as JSON.
//
// Build it with either string ABI; it leaves out every std::string overload, so a plug-in that used
// one would not load.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <sstream>

#include "graph/graph.h"
#include "graph/operator.h"
#include "graph/operator_factory.h"
#include "register/register.h"

namespace ge {

AscendString::AscendString(const char_t* const name)
    : name_(name == nullptr ? nullptr : std::make_shared<std::string>(name)) {}
const char_t* AscendString::GetString() const {
  return name_ == nullptr ? nullptr : name_->c_str();
}

class ShapeImpl {
 public:
  std::vector<int64_t> dims;
};
class TensorDescImpl {
 public:
  std::vector<int64_t> dims;
  int type = 0;
};
class TensorImpl {
 public:
  TensorDescImpl desc;
  std::vector<uint8_t> data;
};

// An attribute as JSON text, with its GE type in front ("int:3"), and as raw text for strings.
struct Value {
  std::string json;
  std::string raw;
  int64_t number = 0;
  std::vector<std::string> list;
  char kind = '?';
};
class OperatorImpl {
 public:
  std::string name, type;
  std::map<std::string, Value> attributes;
  std::vector<std::pair<std::string, std::shared_ptr<OperatorImpl>>> inputs;
  std::string dynamic;
};
class GraphImpl {
 public:
  std::vector<Operator> inputs, outputs;
};

struct Access {
  static std::shared_ptr<OperatorImpl>& Of(Operator& op) { return op.impl_; }
  static const std::shared_ptr<OperatorImpl>& Of(const Operator& op) { return op.impl_; }
  static std::shared_ptr<GraphImpl>& Of(Graph& graph) { return graph.impl_; }
  static const TensorImpl& Of(const Tensor& tensor) { return *tensor.impl; }
  static const TensorDescImpl& Of(const TensorDesc& desc) { return *desc.impl; }
  static const ShapeImpl& Of(const Shape& shape) { return *shape.impl_; }
};

Shape::Shape() : impl_(std::make_shared<ShapeImpl>()) {}
Shape::Shape(const std::vector<int64_t>& dims) : Shape() { impl_->dims = dims; }
TensorDesc::TensorDesc() : impl(std::make_shared<TensorDescImpl>()) {}
TensorDesc::TensorDesc(Shape shape, Format, DataType dt) : TensorDesc() {
  impl->dims = Access::Of(shape).dims;
  impl->type = dt;
}
TensorDesc::TensorDesc(const TensorDesc& desc) : impl(desc.impl) {}
Tensor::Tensor() : impl(std::make_shared<TensorImpl>()) {}
Tensor::Tensor(const TensorDesc& tensor_desc, const uint8_t* data, size_t size) : Tensor() {
  impl->desc = Access::Of(tensor_desc);
  impl->data.assign(data, data + size);
}

namespace {
std::string Quote(const std::string& text) {
  std::string out = "\"";
  char buffer[8];
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20) {
      std::snprintf(buffer, sizeof buffer, "\\u%04x", c);
      out += buffer;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + "\"";
}

Value Number(const char* kind, int64_t number) {
  Value value;
  value.kind = kind[0];
  value.number = number;
  value.json = Quote(kind + std::string(":") + std::to_string(number));
  return value;
}

Value Put(std::shared_ptr<OperatorImpl>& impl, const char* name, Value value) {
  if (impl != nullptr) impl->attributes[name] = value;
  return value;
}
}  // namespace

Operator::Operator(const char_t* name, const char_t* type)
    : impl_(std::make_shared<OperatorImpl>()) {
  impl_->name = name;
  impl_->type = type;
}
graphStatus Operator::GetName(AscendString& name) const {
  if (impl_ == nullptr) return GRAPH_FAILED;
  name = AscendString(impl_->name.c_str());
  return GRAPH_SUCCESS;
}
graphStatus Operator::GetOpType(AscendString& type) const {
  if (impl_ == nullptr) return GRAPH_FAILED;
  type = AscendString(impl_->type.c_str());
  return GRAPH_SUCCESS;
}
Operator& Operator::SetInput(const char_t* dst_name, const Operator& src_oprt) {
  if (impl_ != nullptr) impl_->inputs.emplace_back(dst_name, Access::Of(src_oprt));
  return *this;
}
Operator& Operator::SetAttr(const char_t* name, int64_t attr_value) {
  Put(impl_, name, Number("int", attr_value));
  return *this;
}
Operator& Operator::SetAttr(const char_t* name, float32_t attr_value) {
  Value value;
  char text[64];
  std::snprintf(text, sizeof text, "float:%a", static_cast<double>(attr_value));
  value.kind = 'f';
  value.json = Quote(text);
  Put(impl_, name, value);
  return *this;
}
Operator& Operator::SetAttr(const char_t* name, bool attr_value) {
  Put(impl_, name, Number("bool", attr_value));
  return *this;
}
Operator& Operator::SetAttr(const char_t* name, const AscendString& attr_value) {
  Value value;
  value.kind = 's';
  value.raw = attr_value.GetString() == nullptr ? "" : attr_value.GetString();
  value.json = Quote("string:" + value.raw);
  Put(impl_, name, value);
  return *this;
}
Operator& Operator::SetAttr(const char_t* name, const std::vector<AscendString>& attr_values) {
  Value value;
  value.kind = 'l';
  for (const AscendString& item : attr_values) value.list.push_back(item.GetString());
  Put(impl_, name, value);
  return *this;
}
Operator& Operator::SetAttr(const char_t* name, const DataType& attr_value) {
  Put(impl_, name, Number("type", attr_value));
  return *this;
}
Operator& Operator::SetAttr(const char_t* name, const Tensor& attr_value) {
  const TensorImpl& tensor = Access::Of(attr_value);
  std::ostringstream text;
  text << "tensor:" << tensor.desc.type << ":[";
  for (int64_t dim : tensor.desc.dims) text << dim << ",";
  text << "]:";
  for (size_t at = 0; tensor.desc.type == DT_INT64 && at < tensor.data.size(); at += 8) {
    int64_t item;
    std::memcpy(&item, &tensor.data[at], 8);
    text << item << ",";
  }
  for (size_t at = 0; tensor.desc.type == DT_FLOAT && at < tensor.data.size(); at += 4) {
    float item;
    std::memcpy(&item, &tensor.data[at], 4);
    char hex[32];
    std::snprintf(hex, sizeof hex, "%a,", static_cast<double>(item));
    text << hex;
  }
  Value value;
  value.kind = 't';
  value.json = Quote(text.str());
  Put(impl_, name, value);
  return *this;
}
graphStatus Operator::GetAttr(const char_t* name, int64_t& attr_value) const {
  const auto found = impl_->attributes.find(name);
  if (found == impl_->attributes.end() || found->second.kind != 'i') return GRAPH_FAILED;
  attr_value = found->second.number;
  return GRAPH_SUCCESS;
}
graphStatus Operator::GetAttr(const char_t* name, AscendString& attr_value) const {
  const auto found = impl_->attributes.find(name);
  if (found == impl_->attributes.end() || found->second.kind != 's') return GRAPH_FAILED;
  attr_value = AscendString(found->second.raw.c_str());
  return GRAPH_SUCCESS;
}
graphStatus Operator::GetAttr(const char_t* name, std::vector<AscendString>& attr_values) const {
  const auto found = impl_->attributes.find(name);
  if (found == impl_->attributes.end() || found->second.kind != 'l') return GRAPH_FAILED;
  attr_values.clear();
  for (const std::string& item : found->second.list) attr_values.emplace_back(item.c_str());
  return GRAPH_SUCCESS;
}
void Operator::DynamicInputRegister(const char_t* name, const uint32_t num, bool) {
  impl_->dynamic += std::string("in:") + name + ":" + std::to_string(num) + " ";
}
void Operator::DynamicOutputRegister(const char_t* name, const uint32_t num, bool) {
  impl_->dynamic += std::string("out:") + name + ":" + std::to_string(num) + " ";
}

namespace {
std::set<std::string>& MissingPrototypes() {
  static std::set<std::string> missing;
  return missing;
}
}  // namespace

Operator OperatorFactory::CreateOperator(const char_t* const operator_name,
                                         const char_t* const operator_type) {
  if (MissingPrototypes().count(operator_type) != 0) return Operator();
  return Operator(operator_name, operator_type);
}

Graph::Graph(const char_t*) : impl_(std::make_shared<GraphImpl>()) {}
Graph& Graph::SetInputs(const std::vector<Operator>& inputs) {
  impl_->inputs = inputs;
  return *this;
}
Graph& Graph::SetOutputs(
    const std::vector<std::pair<Operator, std::vector<size_t>>>& output_indexs) {
  for (const auto& output : output_indexs) impl_->outputs.push_back(output.first);
  return *this;
}

}  // namespace ge

namespace domi {

class OpRegistrationDataImpl {
 public:
  std::string ge_type;
  int framework = -1;
  std::vector<std::string> origins;
  ParseParamByOpFunc parse;
  ParseOpToGraphFunc expand;
};

namespace {
std::map<std::string, std::shared_ptr<OpRegistrationDataImpl>>& Registry() {
  static std::map<std::string, std::shared_ptr<OpRegistrationDataImpl>> registry;
  return registry;
}
}  // namespace

OpRegistrationData::OpRegistrationData(const char_t* om_optype)
    : impl_(std::make_shared<OpRegistrationDataImpl>()) {
  impl_->ge_type = om_optype;
}
OpRegistrationData::~OpRegistrationData() {}
OpRegistrationData& OpRegistrationData::FrameworkType(const domi::FrameworkType& fmk_type) {
  impl_->framework = fmk_type;
  return *this;
}
OpRegistrationData& OpRegistrationData::OriginOpType(
    const std::vector<ge::AscendString>& ori_op_type_list) {
  for (const ge::AscendString& origin : ori_op_type_list) {
    impl_->origins.push_back(origin.GetString());
  }
  return *this;
}
OpRegistrationData& OpRegistrationData::ParseParamsByOperatorFn(const ParseParamByOpFunc& fn) {
  impl_->parse = fn;
  return *this;
}
OpRegistrationData& OpRegistrationData::ParseOpToGraphFn(const ParseOpToGraphFunc& fn) {
  impl_->expand = fn;
  return *this;
}
OpRegistrationData& OpRegistrationData::ImplyType(const domi::ImplyType&) { return *this; }

OpReceiver::OpReceiver(OpRegistrationData& reg_data) {
  for (const std::string& origin : reg_data.impl_->origins) Registry()[origin] = reg_data.impl_;
}

}  // namespace domi

// ---- the tests' door ----------------------------------------------------------------------------

namespace {
std::string g_text;

void Describe(const ge::OperatorImpl& op, std::ostringstream& out) {
  out << "{\"name\": " << ge::Quote(op.name) << ", \"type\": " << ge::Quote(op.type)
      << ", \"dynamic\": " << ge::Quote(op.dynamic) << ", \"attrs\": {";
  const char* comma = "";
  for (const auto& attribute : op.attributes) {
    out << comma << ge::Quote(attribute.first) << ": "
        << (attribute.second.json.empty() ? "null" : attribute.second.json);
    comma = ", ";
  }
  out << "}, \"in\": [";
  comma = "";
  for (const auto& input : op.inputs) {
    out << comma << "[" << ge::Quote(input.first) << ", "
        << ge::Quote(input.second == nullptr ? "" : input.second->name) << "]";
    comma = ", ";
  }
  out << "]}";
}

void Collect(const std::shared_ptr<ge::OperatorImpl>& op,
             std::map<std::string, std::shared_ptr<ge::OperatorImpl>>& all) {
  if (op == nullptr || !all.emplace(op->name, op).second) return;
  for (const auto& input : op->inputs) Collect(input.second, all);
}

// A repeated field without an element is no attribute.
void SetNames(ge::Operator& source, const char* field, const char* const* names) {
  std::vector<ge::AscendString> list;
  for (; *names != nullptr; ++names) list.emplace_back(*names);
  if (!list.empty()) source.SetAttr(field, list);
}
}  // namespace

extern "C" {

// Every registered key, one per line as "key GeType".
const char* double_keys() {
  g_text.clear();
  for (const auto& entry : domi::Registry()) {
    const auto& data = *entry.second;
    if (data.framework != domi::ONNX) continue;
    g_text += entry.first + " " + data.ge_type + "\n";
  }
  return g_text.c_str();
}

void double_missing_prototype(const char* type) { ge::MissingPrototypes().insert(type); }
void double_all_prototypes() { ge::MissingPrototypes().clear(); }

// Parses one node. `attributes` null: the node has none. `inputs`, `outputs`: names, null at the
// end. `preset`: an int attribute the GE prototype already carries, or null. Returns JSON, or ""
// when the plug-in failed.
const char* double_parse(const char* origin, const char* name, const char* attributes,
                         const char* const* inputs, const char* const* outputs,
                         const char* preset) {
  g_text.clear();
  const auto found = domi::Registry().find(origin);
  if (found == domi::Registry().end()) return g_text.c_str();
  ge::Operator source(name, origin);
  if (attributes != nullptr) source.SetAttr("attribute", ge::AscendString(attributes));
  SetNames(source, "input", inputs);
  SetNames(source, "output", outputs);
  ge::Operator target(name, found->second->ge_type.c_str());
  if (preset != nullptr) target.SetAttr(preset, int64_t{1});
  if (found->second->parse(source, target) != domi::SUCCESS) return g_text.c_str();
  std::ostringstream out;
  out << "{\"node\": ";
  Describe(*ge::Access::Of(target), out);
  if (found->second->expand) {
    ge::Graph graph("one_to_many_graph");
    if (found->second->expand(target, graph) != domi::SUCCESS) return g_text.c_str();
    std::map<std::string, std::shared_ptr<ge::OperatorImpl>> all;
    for (const auto& op : ge::Access::Of(graph)->outputs) Collect(ge::Access::Of(op), all);
    out << ", \"output\": " << ge::Quote(ge::Access::Of(ge::Access::Of(graph)->outputs[0])->name);
    out << ", \"inputs\": " << ge::Access::Of(graph)->inputs.size() << ", \"graph\": [";
    const char* comma = "";
    for (const auto& op : all) {
      out << comma;
      Describe(*op.second, out);
      comma = ", ";
    }
    out << "]";
  }
  out << "}";
  g_text = out.str();
  return g_text.c_str();
}

}  // extern "C"
