// Stand-in, see graph/types.h.
#ifndef SFA_ONNX_TESTING_GRAPH_ASCEND_STRING_H_
#define SFA_ONNX_TESTING_GRAPH_ASCEND_STRING_H_

#include <cstddef>
#include <memory>
#include <string>

#include "graph/types.h"

namespace ge {
class AscendString {
 public:
  AscendString() = default;
  AscendString(const char_t* const name);
  const char_t* GetString() const;
  bool operator<(const AscendString& other) const;

 private:
  std::shared_ptr<std::string> name_;
};
}  // namespace ge

#endif  // SFA_ONNX_TESTING_GRAPH_ASCEND_STRING_H_
