#include "tensor.h"

namespace sfa {

OrtStatus* Refuse(const OrtApi* api, const Message& message) {
  return api->CreateStatus(ORT_INVALID_ARGUMENT, message.text());
}

OrtStatus* CoreError(const OrtApi* api, const sfa_core_error& error) {
  char text[512];
  sfa_core_describe(&error, text, sizeof text);
  const bool callers = error.status != SFA_CORE_NO_MEMORY;
  return api->CreateStatus(callers ? ORT_INVALID_ARGUMENT : ORT_FAIL, text);
}

int ItemSize(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return 1;
    default:
      return 2;
  }
}

int CoreType(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return SFA_CORE_F32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return SFA_CORE_F16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return SFA_CORE_I8;
    default:
      return SFA_CORE_BF16;
  }
}

namespace {

OrtStatus* ReadShape(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info, Tensor* tensor) {
  SFA_ORT_TRY(api->GetTensorElementType(info, &tensor->type));
  SFA_ORT_TRY(api->GetDimensionsCount(info, &tensor->rank));
  if (tensor->rank > kMaxRank) {
    Message m;
    m.Add("input %s: rank %zu: expected at most %zu dimensions", tensor->name, tensor->rank,
          kMaxRank);
    return Refuse(api, m);
  }
  return api->GetDimensions(info, tensor->dims, tensor->rank);
}

}  // namespace

OrtStatus* ReadInput(const OrtApi* api, const OrtKernelContext* context, size_t index,
                     const char* name, Tensor* tensor) {
  *tensor = Tensor{};
  tensor->name = name;
  // The runtime counts inputs up to the last one that is connected; an empty name gives null.
  size_t count = 0;
  SFA_ORT_TRY(api->KernelContext_GetInputCount(context, &count));
  if (index >= count) return nullptr;
  const OrtValue* value = nullptr;
  SFA_ORT_TRY(api->KernelContext_GetInput(context, index, &value));
  if (value == nullptr) return nullptr;

  OrtTensorTypeAndShapeInfo* info = nullptr;
  SFA_ORT_TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus* status = ReadShape(api, info, tensor);
  api->ReleaseTensorTypeAndShapeInfo(info);
  SFA_ORT_TRY(status);

  void* data = nullptr;
  SFA_ORT_TRY(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor->data = data;
  tensor->present = true;
  return nullptr;
}

}  // namespace sfa
