// Error text in a fixed buffer: the library must not need the C++ runtime.
#ifndef SFA_ONNX_KERNELS_ORT_MESSAGE_H_
#define SFA_ONNX_KERNELS_ORT_MESSAGE_H_

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

namespace sfa {

class Message {
 public:
  // Appends printf-style; text past the end of the buffer is cut. Returns false, so that a check
  // can end with `return message->Add(...)`.
  __attribute__((format(printf, 2, 3))) bool Add(const char* format, ...) {
    va_list args;
    va_start(args, format);
    const int n = vsnprintf(text_ + used_, sizeof text_ - used_, format, args);
    va_end(args);
    if (n > 0) used_ += static_cast<size_t>(n);
    if (used_ >= sizeof text_) used_ = sizeof text_ - 1;
    return false;
  }

  // Appends a shape as [2,3,4].
  bool AddShape(const int64_t* dims, size_t rank) {
    Add("[");
    for (size_t i = 0; i < rank; ++i) Add(i ? ",%lld" : "%lld", static_cast<long long>(dims[i]));
    return Add("]");
  }

  bool empty() const { return used_ == 0; }
  const char* text() const { return text_; }

 private:
  char text_[1024] = {};
  size_t used_ = 0;
};

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_MESSAGE_H_
