// Attributes of a node, read once when its kernel is created.
//
// Custom ops cannot declare attributes to the runtime: nobody else fills in a default or notices a
// wrong type, and a wrong type looks like a missing attribute. So every read that fails is probed
// for the other types before the default is taken.
#ifndef SFA_ONNX_KERNELS_ORT_ATTRIBUTES_H_
#define SFA_ONNX_KERNELS_ORT_ATTRIBUTES_H_

#include "message.h"
#include "ort_abi.h"

namespace sfa {

constexpr int64_t kRequired = INT64_MIN;  // in place of a default

class AttributeReader {
 public:
  AttributeReader(const OrtApi* api, const OrtKernelInfo* info, Message* error)
      : api_(api), info_(info), error_(error) {}

  // Begins the message with the node's type and name: the runtime does not say which node it is
  // when a kernel cannot be created.
  void NameNode(const char* op_type);

  // A finite float; an int is taken as one (`scale_value=1` is easily written in Python).
  bool Float(const char* name, float* value);
  // A FLOATS attribute of one finite element, if there is one; else *value stays as it is.
  bool OptionalExactFloat(const char* name, float* value);
  bool Int(const char* name, int64_t fallback, int64_t* value);
  // An int that must be `legal`, or one of two.
  bool IntOf(const char* name, int64_t fallback, int64_t legal, int64_t* value = nullptr);
  bool IntOf2(const char* name, int64_t fallback, int64_t legal, int64_t or_legal, int64_t* value);
  bool IntInRange(const char* name, int64_t fallback, int64_t low, int64_t high, int64_t* value);
  // The position of the string in `choices` (null-terminated list); absent: choices[0].
  bool Choice(const char* name, const char* const* choices, int* value);

 private:
  bool Ok(OrtStatus* status);
  bool ReadString(const char* name, char* text, size_t size);
  // What type the attribute has although it is not the one asked for; null when it is absent.
  const char* OtherType(const char* name);
  bool Missing(const char* name, const char* expected);

  const OrtApi* api_;
  const OrtKernelInfo* info_;
  Message* error_;
};

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_ATTRIBUTES_H_
