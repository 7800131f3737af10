// Stand-in, see graph/types.h.
#ifndef SFA_ONNX_TESTING_GRAPH_OPERATOR_FACTORY_H_
#define SFA_ONNX_TESTING_GRAPH_OPERATOR_FACTORY_H_

#include "graph/operator.h"

namespace ge {
class OperatorFactory {
 public:
  static Operator CreateOperator(const std::string& operator_name,
                                 const std::string& operator_type);
  static Operator CreateOperator(const char_t* const operator_name,
                                 const char_t* const operator_type);
};
}  // namespace ge

#endif  // SFA_ONNX_TESTING_GRAPH_OPERATOR_FACTORY_H_
