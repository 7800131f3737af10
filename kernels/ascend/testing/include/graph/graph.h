// Stand-in, see graph/types.h.
#ifndef SFA_ONNX_TESTING_GRAPH_GRAPH_H_
#define SFA_ONNX_TESTING_GRAPH_GRAPH_H_

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "graph/operator.h"

namespace ge {
class GraphImpl;

class Graph {
 public:
  explicit Graph(const std::string& name);
  explicit Graph(const char_t* name);
  Graph() = default;
  ~Graph() = default;
  Graph& SetInputs(const std::vector<Operator>& inputs);
  Graph& SetOutputs(const std::vector<Operator>& outputs);
  Graph& SetOutputs(const std::vector<std::pair<Operator, std::vector<size_t>>>& output_indexs);

 private:
  std::shared_ptr<GraphImpl> impl_;
  friend struct Access;
};
}  // namespace ge

#endif  // SFA_ONNX_TESTING_GRAPH_GRAPH_H_
