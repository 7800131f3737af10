// Stand-in, see graph/types.h.
#ifndef SFA_ONNX_TESTING_GE_GE_IR_BUILD_H_
#define SFA_ONNX_TESTING_GE_GE_IR_BUILD_H_

#include <cstdint>
#include <map>
#include <memory>

#include "graph/ascend_string.h"
#include "graph/graph.h"

namespace ge {
struct ModelBufferData {
  std::shared_ptr<uint8_t> data = nullptr;
  uint64_t length;
};

graphStatus aclgrphBuildInitialize(std::map<AscendString, AscendString>& global_options);
void aclgrphBuildFinalize();
graphStatus aclgrphBuildModel(const Graph& graph,
                              const std::map<AscendString, AscendString>& build_options,
                              ModelBufferData& model);
graphStatus aclgrphSaveModel(const char_t* output_file, const ModelBufferData& model);
}  // namespace ge

#endif  // SFA_ONNX_TESTING_GE_GE_IR_BUILD_H_
