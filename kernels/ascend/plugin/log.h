// One log line per refusal, on stderr: atc shows it whatever its own log level is.
#ifndef SFA_ONNX_ASCEND_LOG_H_
#define SFA_ONNX_ASCEND_LOG_H_

#include <cstdio>

#define SFA_LOG_ERROR(node, format, ...) \
  std::fprintf(stderr, "[sfa_onnx plug-in] node %s: " format "\n", node, ##__VA_ARGS__)

#endif  // SFA_ONNX_ASCEND_LOG_H_
