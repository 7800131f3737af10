// The part shared by all our operators: read a node, check it against its table, fill a GE
// operator.
#ifndef SFA_ONNX_ASCEND_PARSE_H_
#define SFA_ONNX_ASCEND_PARSE_H_

#include <string>
#include <vector>

#include "attribute_table.h"
#include "attributes.h"
#include "graph/operator.h"
#include "register/register.h"

namespace sfa_onnx {

// What one ONNX node says, after its checks.
struct Node {
  std::string name;
  std::string origin_type;  // "ai.onnx::18::NPUSparseFlashAttention"
  std::vector<Attribute> attributes;
  std::vector<bool> connected;  // one per ONNX input; false for ""
  size_t outputs = 0;           // up to the last one that has a name
};

// Reads `source` and checks it against `table`; false after a log line.
bool ReadNode(const ge::Operator& source, const OpTable& table, Node* node);

// Every attribute of the table set on `target`, explicitly; false after a log line.
bool SetAttributes(const Node& node, const OpTable& table, ge::Operator& target);

// The keys CANN looks a node up by: "<own domain>::1::X" and "ai.onnx::11..18::X".
std::vector<ge::AscendString> OriginTypes(const OpTable& table);

}  // namespace sfa_onnx

#endif  // SFA_ONNX_ASCEND_PARSE_H_
