// Stand-in, see graph/types.h.
#ifndef SFA_ONNX_TESTING_GRAPH_OPERATOR_H_
#define SFA_ONNX_TESTING_GRAPH_OPERATOR_H_

#include <memory>
#include <string>
#include <vector>

#include "graph/ascend_string.h"
#include "graph/tensor.h"
#include "graph/types.h"

namespace ge {
class OperatorImpl;

class Operator {
 public:
  Operator() {}
  explicit Operator(const std::string& type);
  explicit Operator(const char_t* type);
  Operator(const std::string& name, const std::string& type);
  Operator(const char_t* name, const char_t* type);
  virtual ~Operator() = default;

  std::string GetName() const;
  graphStatus GetName(AscendString& name) const;
  std::string GetOpType() const;
  graphStatus GetOpType(AscendString& type) const;

  Operator& SetInput(const std::string& dst_name, const Operator& src_oprt);
  Operator& SetInput(const char_t* dst_name, const Operator& src_oprt);

  // The overloads with std::string are there to be stepped around, as in CANN: a call that picked
  // one would not link, because the double leaves them out.
  Operator& SetAttr(const std::string& name, int64_t attr_value);
  Operator& SetAttr(const std::string& name, float32_t attr_value);
  Operator& SetAttr(const std::string& name, bool attr_value);
  Operator& SetAttr(const std::string& name, const std::string& attr_value);
  graphStatus GetAttr(const std::string& name, std::string& attr_value) const;

  Operator& SetAttr(const char_t* name, int64_t attr_value);
  Operator& SetAttr(const char_t* name, int32_t attr_value);
  Operator& SetAttr(const char_t* name, uint32_t attr_value);
  Operator& SetAttr(const char_t* name, float32_t attr_value);
  Operator& SetAttr(const char_t* name, bool attr_value);
  Operator& SetAttr(const char_t* name, const char_t* attr_value);
  Operator& SetAttr(const char_t* name, const AscendString& attr_value);
  Operator& SetAttr(const char_t* name, const std::vector<AscendString>& attr_values);
  Operator& SetAttr(const char_t* name, const Tensor& attr_value);
  Operator& SetAttr(const char_t* name, const DataType& attr_value);
  graphStatus GetAttr(const char_t* name, int64_t& attr_value) const;
  graphStatus GetAttr(const char_t* name, AscendString& attr_value) const;
  graphStatus GetAttr(const char_t* name, std::vector<AscendString>& attr_values) const;

  void DynamicInputRegister(const char_t* name, const uint32_t num, bool is_push_back = true);
  void DynamicOutputRegister(const char_t* name, const uint32_t num, bool is_push_back = true);

 private:
  std::shared_ptr<OperatorImpl> impl_;
  friend struct Access;
};
}  // namespace ge

#endif  // SFA_ONNX_TESTING_GRAPH_OPERATOR_H_
