// Reader of the text that CANN's ONNX parser gives a ParseParamsByOperatorFn: the node's attributes
// as JSON. What the parser does to them (recorded on 8.5.0, 9.1.0 and the 2026-08 development
// line):
//   * the key of a zero number or an empty string is absent: it means 0, 0.0 or "";
//   * a FLOAT is a JSON string of 6 significant digits, or a JSON number when that text is longer
//     than 9 characters; FLOATS are numbers in full float32 precision;
//   * a STRING is C-escaped inside its JSON escaping (non-ASCII bytes as octal).
#ifndef SFA_ONNX_ASCEND_ATTRIBUTES_H_
#define SFA_ONNX_ASCEND_ATTRIBUTES_H_

#include <cstdint>
#include <string>
#include <vector>

namespace sfa_onnx {

// AttributeProto.type as it is numbered in ONNX files.
enum AttributeType { kUndefined = 0, kFloat = 1, kInt = 2, kString = 3, kFloats = 6 };

struct Attribute {
  std::string name;
  int type = kUndefined;
  int64_t i = 0;
  float f = 0.0F;
  std::string s;
  std::vector<float> floats;
};

// Fills `out`; on failure returns false and says in `error` what was wrong.
bool ReadAttributes(const char* text, std::vector<Attribute>* out, std::string* error);

const Attribute* FindAttribute(const std::vector<Attribute>& all, const char* name);

// "FLOAT", "INT" ... for messages.
const char* TypeName(int type);

}  // namespace sfa_onnx

#endif  // SFA_ONNX_ASCEND_ATTRIBUTES_H_
