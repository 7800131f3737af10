#include "parse.h"

#include <cmath>

#include "log.h"

namespace sfa_onnx {
namespace {

constexpr int kFirstOpset = 11;
constexpr int kLastOpset = 18;
// The 6-digit text of a FLOAT and its exact companion may differ by the rounding of that text.
constexpr float kTextTolerance = 1e-5F;

std::string Text(const ge::AscendString& text) {
  const char* raw = text.GetString();
  return raw == nullptr ? std::string() : std::string(raw);
}

bool IsCompanion(const OpTable& table, const std::string& name) {
  for (size_t i = 0; i < table.companion_count; ++i) {
    if (name == table.companions[i]) return true;
  }
  return false;
}

const AttributeSpec* FindSpec(const OpTable& table, const std::string& name) {
  for (size_t i = 0; i < table.attribute_count; ++i) {
    if (name == table.attributes[i].name) return &table.attributes[i];
  }
  return nullptr;
}

bool CheckKnown(const Node& node, const OpTable& table) {
  for (size_t i = 0; i < node.attributes.size(); ++i) {
    const Attribute& attribute = node.attributes[i];
    const char* name = attribute.name.c_str();
    if (FindAttribute(node.attributes, name) != &attribute) {
      SFA_LOG_ERROR(node.name.c_str(), "attribute %s is given twice", name);
      return false;
    }
    const AttributeSpec* spec = FindSpec(table, attribute.name);
    if (spec == nullptr && !IsCompanion(table, attribute.name)) {
      SFA_LOG_ERROR(node.name.c_str(), "unknown attribute %s of %s", name, table.onnx_type);
      return false;
    }
    if (spec != nullptr && attribute.type != spec->type) {
      SFA_LOG_ERROR(node.name.c_str(), "attribute %s is %s, expected %s", name,
                    TypeName(attribute.type), TypeName(spec->type));
      return false;
    }
  }
  return true;
}

bool CheckComplete(const Node& node, const OpTable& table) {
  for (size_t i = 0; i < table.attribute_count; ++i) {
    const char* name = table.attributes[i].name;
    if (FindAttribute(node.attributes, name) == nullptr) {
      // The GE prototype's default would win without a word, and most of them are illegal calls.
      SFA_LOG_ERROR(node.name.c_str(), "attribute %s of %s is missing; sfa-onnx writes all of them",
                    name, table.onnx_type);
      return false;
    }
  }
  return true;
}

bool CheckInputs(const Node& node, const OpTable& table) {
  if (node.connected.size() > table.input_count) {
    SFA_LOG_ERROR(node.name.c_str(), "%zu inputs, %s has %zu", node.connected.size(),
                  table.onnx_type, table.input_count);
    return false;
  }
  for (size_t i = 0; i < table.input_count; ++i) {
    const bool present = i < node.connected.size() && node.connected[i];
    if (table.inputs[i].required && !present) {
      SFA_LOG_ERROR(node.name.c_str(), "required input %zu (%s) of %s is missing", i,
                    table.inputs[i].name, table.onnx_type);
      return false;
    }
  }
  return true;
}

// Up to 9.1 the parser drops an output that GE's operator lacks together with whoever reads it.
bool CheckOutputs(const Node& node, const OpTable& table) {
  if (node.outputs <= table.output_count) return true;
  SFA_LOG_ERROR(node.name.c_str(), "%zu outputs, %s has %zu", node.outputs, table.onnx_type,
                table.output_count);
  return false;
}

// A FLOAT to the last bit: from `<name>_exact` (FLOATS, one element) when the node carries it.
bool ExactFloat(const Node& node, const Attribute& attribute, float* out) {
  *out = attribute.f;
  if (!std::isfinite(attribute.f)) {
    SFA_LOG_ERROR(node.name.c_str(), "attribute %s is %g, expected a finite number",
                  attribute.name.c_str(), static_cast<double>(attribute.f));
    return false;
  }
  const std::string companion_name = attribute.name + "_exact";
  const Attribute* companion = FindAttribute(node.attributes, companion_name.c_str());
  if (companion == nullptr) return true;
  if (companion->type != kFloats || companion->floats.size() != 1) {
    SFA_LOG_ERROR(node.name.c_str(), "attribute %s is %s of %zu elements, expected FLOATS of one",
                  companion_name.c_str(), TypeName(companion->type), companion->floats.size());
    return false;
  }
  const float exact = companion->floats[0];
  if (!(std::fabs(exact - attribute.f) <= kTextTolerance * std::fabs(exact))) {
    SFA_LOG_ERROR(node.name.c_str(), "%s is %g, but %s says %g", attribute.name.c_str(),
                  static_cast<double>(attribute.f), companion_name.c_str(),
                  static_cast<double>(exact));
    return false;
  }
  *out = exact;
  return true;
}

}  // namespace

bool ReadNode(const ge::Operator& source, const OpTable& table, Node* node) {
  ge::AscendString text;
  if (source.GetName(text) == ge::GRAPH_SUCCESS) node->name = Text(text);
  if (source.GetOpType(text) == ge::GRAPH_SUCCESS) node->origin_type = Text(text);
  ge::AscendString attributes;  // absent when the node has none
  std::string error;
  if (source.GetAttr("attribute", attributes) == ge::GRAPH_SUCCESS &&
      attributes.GetString() != nullptr &&
      !ReadAttributes(attributes.GetString(), &node->attributes, &error)) {
    SFA_LOG_ERROR(node->name.c_str(), "attributes are not readable: %s", error.c_str());
    return false;
  }
  std::vector<ge::AscendString> inputs;
  if (source.GetAttr("input", inputs) == ge::GRAPH_SUCCESS) {
    for (const ge::AscendString& input : inputs) node->connected.push_back(!Text(input).empty());
  }
  std::vector<ge::AscendString> outputs;
  if (source.GetAttr("output", outputs) == ge::GRAPH_SUCCESS) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!Text(outputs[i]).empty()) node->outputs = i + 1;
    }
  }
  return CheckKnown(*node, table) && CheckComplete(*node, table) && CheckInputs(*node, table) &&
         CheckOutputs(*node, table);
}

bool SetAttributes(const Node& node, const OpTable& table, ge::Operator& target) {
  for (size_t i = 0; i < table.attribute_count; ++i) {
    const AttributeSpec& spec = table.attributes[i];
    const Attribute& attribute = *FindAttribute(node.attributes, spec.name);
    if (spec.type == kFloat) {
      float value = 0.0F;
      if (!ExactFloat(node, attribute, &value)) return false;
      target.SetAttr(spec.name, value);
    } else if (spec.type == kString) {
      target.SetAttr(spec.name, ge::AscendString(attribute.s.c_str()));
    } else if (spec.ge_bool) {
      if (attribute.i != 0 && attribute.i != 1) {
        SFA_LOG_ERROR(node.name.c_str(), "attribute %s is %lld, expected 0 or 1", spec.name,
                      static_cast<long long>(attribute.i));
        return false;
      }
      target.SetAttr(spec.name, attribute.i != 0);
    } else {
      target.SetAttr(spec.name, attribute.i);
    }
  }
  return true;
}

std::vector<ge::AscendString> OriginTypes(const OpTable& table) {
  std::vector<ge::AscendString> keys;
  const std::string own = std::string(table.domain) + "::1::" + table.onnx_type;
  keys.emplace_back(own.c_str());
  for (int opset = kFirstOpset; opset <= kLastOpset; ++opset) {
    const std::string key = "ai.onnx::" + std::to_string(opset) + "::" + table.onnx_type;
    keys.emplace_back(key.c_str());
  }
  return keys;
}

}  // namespace sfa_onnx
