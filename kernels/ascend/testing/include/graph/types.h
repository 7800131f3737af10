// Stand-in for CANN's header of this name: just what our plug-in uses, with the real signatures.
// Tests build against it; a user's build takes the header of the installed CANN instead.
#ifndef SFA_ONNX_TESTING_GRAPH_TYPES_H_
#define SFA_ONNX_TESTING_GRAPH_TYPES_H_

#include <cstdint>

namespace ge {
using char_t = char;
using float32_t = float;
using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0;
constexpr graphStatus GRAPH_FAILED = 0xFFFFFFFF;

enum DataType { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT8 = 2, DT_INT32 = 3, DT_INT64 = 9 };
enum Format { FORMAT_NCHW = 0, FORMAT_ND = 2 };
}  // namespace ge

using ge::char_t;

#endif  // SFA_ONNX_TESTING_GRAPH_TYPES_H_
