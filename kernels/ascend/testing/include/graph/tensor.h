// Stand-in, see graph/types.h.
#ifndef SFA_ONNX_TESTING_GRAPH_TENSOR_H_
#define SFA_ONNX_TESTING_GRAPH_TENSOR_H_

#include <cstddef>
#include <memory>
#include <vector>

#include "graph/types.h"

namespace ge {
class ShapeImpl;
class Shape {
 public:
  Shape();
  explicit Shape(const std::vector<int64_t>& dims);

 private:
  std::shared_ptr<ShapeImpl> impl_;
  friend struct Access;
};

class TensorDescImpl;
class TensorDesc {
 public:
  TensorDesc();
  explicit TensorDesc(Shape shape, Format format = FORMAT_ND, DataType dt = DT_FLOAT);
  TensorDesc(const TensorDesc& desc);

 private:
  std::shared_ptr<TensorDescImpl> impl;
  friend struct Access;
};

class TensorImpl;
class Tensor {
 public:
  Tensor();
  Tensor(const TensorDesc& tensor_desc, const uint8_t* data, size_t size);

 private:
  std::shared_ptr<TensorImpl> impl;
  friend struct Access;
};
}  // namespace ge

#endif  // SFA_ONNX_TESTING_GRAPH_TENSOR_H_
