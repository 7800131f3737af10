// Stand-in, see graph/types.h.
#ifndef SFA_ONNX_TESTING_PARSER_ONNX_PARSER_H_
#define SFA_ONNX_TESTING_PARSER_ONNX_PARSER_H_

#include <map>

#include "graph/ascend_string.h"
#include "graph/graph.h"

namespace ge {
graphStatus aclgrphParseONNX(const char* model_file,
                             const std::map<AscendString, AscendString>& parser_params,
                             Graph& graph);
}  // namespace ge

#endif  // SFA_ONNX_TESTING_PARSER_ONNX_PARSER_H_
