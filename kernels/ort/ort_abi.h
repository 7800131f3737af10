// The part of ONNX Runtime's C ABI that this library calls.
//
// `OrtApi` is an append-only table of function pointers, so an entry's index never changes: naming
// the few entries we use by their index is all that is needed, and nothing third-party is vendored.
// With the official header at hand (SFA_ONNX_OFFICIAL_ORT_HEADER) that one is used instead. Either
// way the assertions at the end pin every index; tests/test_ort_versions.py and
// scripts/test-matrix.sh prove them against real runtimes.
#ifndef SFA_ONNX_KERNELS_ORT_ORT_ABI_H_
#define SFA_ONNX_KERNELS_ORT_ORT_ABI_H_

#include <stddef.h>
#include <stdint.h>

// The oldest runtime we run on: KernelContext_ParallelFor and shape inference came with 1.17.
constexpr uint32_t kOrtApiFloor = 17;

#ifdef SFA_ONNX_OFFICIAL_ORT_HEADER
#include <onnxruntime_c_api.h>
static_assert(ORT_API_VERSION >= 18, "the onnxruntime header must be 1.18 or newer");
#else

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtOpAttr;
struct OrtCustomOp;
typedef OrtStatus* OrtStatusPtr;

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };

enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16,
};

enum OrtCustomOpInputOutputCharacteristic { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };

enum OrtOpAttrType { ORT_OP_ATTR_INT = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };

// Function table. `gap_A_B` stands for entries A..B, which are not called.
struct OrtApi {
  OrtStatus* (*CreateStatus)(OrtErrorCode code, const char* message);
  void* gap_1_25[25];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain** domain);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
  void* gap_29_50[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** data);
  void* gap_52_56[5];
  OrtStatus* (*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo** info);
  OrtStatus* (*SetTensorElementType)(OrtTensorTypeAndShapeInfo* info,
                                     ONNXTensorElementDataType type);
  OrtStatus* (*SetDimensions)(OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t rank);
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info,
                                     ONNXTensorElementDataType* type);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* rank);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t rank);
  OrtStatus* (*GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo* info, const char** names,
                                      size_t rank);
  void* gap_64[1];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** info);
  void* gap_66_84[19];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name,
                                             float* value);
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name,
                                             int64_t* value);
  OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo* info, const char* name,
                                              char* value, size_t* size);
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext* context, size_t* count);
  OrtStatus* (*KernelContext_GetOutputCount)(const OrtKernelContext* context, size_t* count);
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index,
                                       const OrtValue** value);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index,
                                        const int64_t* dims, size_t rank, OrtValue** value);
  void* gap_92[1];
  void (*ReleaseStatus)(OrtStatus* status);
  void* gap_94_98[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
  void* gap_100_161[62];
  OrtStatus* (*KernelInfoGetAttributeArray_float)(const OrtKernelInfo* info, const char* name,
                                                  float* values, size_t* size);
  OrtStatus* (*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo* info, const char* name,
                                                  int64_t* values, size_t* size);
  void* gap_164_236[73];
  OrtStatus* (*HasSessionConfigEntry)(const OrtSessionOptions* options, const char* key, int* has);
  OrtStatus* (*GetSessionConfigEntry)(const OrtSessionOptions* options, const char* key,
                                      char* value, size_t* size);
  void* gap_239_243[5];
  OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo* info, char* name, size_t* size);
  void* gap_245_266[22];
  OrtStatus* (*ShapeInferContext_GetInputCount)(const OrtShapeInferContext* context, size_t* count);
  OrtStatus* (*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext* context,
                                                    size_t index, OrtTensorTypeAndShapeInfo** info);
  OrtStatus* (*ShapeInferContext_GetAttribute)(const OrtShapeInferContext* context,
                                               const char* name, const OrtOpAttr** attribute);
  OrtStatus* (*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext* context,
                                                     size_t index,
                                                     const OrtTensorTypeAndShapeInfo* info);
  OrtStatus* (*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo* info, const char** names,
                                      size_t rank);
  OrtStatus* (*ReadOpAttr)(const OrtOpAttr* attribute, OrtOpAttrType type, void* data, size_t bytes,
                           size_t* written);
  void* gap_273[1];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context,
                                          void (*task)(void*, size_t), size_t count, size_t batches,
                                          void* user_data);
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// What a custom op tells the runtime; null callbacks mean the default. Layout of API 18.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void (*KernelCompute)(void* kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp* op,
                                                                 size_t index);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp* op,
                                                                  size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatusPtr (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api,
                                 const OrtKernelInfo* info, void** kernel);
  OrtStatusPtr (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatusPtr (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
  // From API 18, looked at when `version` says so: outputs that may lie in an input's memory.
  size_t (*GetMayInplace)(int** input_index, int** output_index);
  void (*ReleaseMayInplace)(int* input_index, int* output_index);
  size_t (*GetAliasMap)(int** input_index, int** output_index);
  void (*ReleaseAliasMap)(int* input_index, int* output_index);
};

}  // extern "C"

#endif  // SFA_ONNX_OFFICIAL_ORT_HEADER

#define SFA_ORT_AT(name, index)                                  \
  static_assert(offsetof(OrtApi, name) == index * sizeof(void*), \
                "OrtApi::" #name " must be entry " #index)
SFA_ORT_AT(CreateStatus, 0);
SFA_ORT_AT(CreateCustomOpDomain, 26);
SFA_ORT_AT(CustomOpDomain_Add, 27);
SFA_ORT_AT(AddCustomOpDomain, 28);
SFA_ORT_AT(GetTensorMutableData, 51);
SFA_ORT_AT(CreateTensorTypeAndShapeInfo, 57);
SFA_ORT_AT(SetTensorElementType, 58);
SFA_ORT_AT(SetDimensions, 59);
SFA_ORT_AT(GetTensorElementType, 60);
SFA_ORT_AT(GetDimensionsCount, 61);
SFA_ORT_AT(GetDimensions, 62);
SFA_ORT_AT(GetSymbolicDimensions, 63);
SFA_ORT_AT(GetTensorTypeAndShape, 65);
SFA_ORT_AT(KernelInfoGetAttribute_float, 85);
SFA_ORT_AT(KernelInfoGetAttribute_int64, 86);
SFA_ORT_AT(KernelInfoGetAttribute_string, 87);
SFA_ORT_AT(KernelContext_GetInputCount, 88);
SFA_ORT_AT(KernelContext_GetOutputCount, 89);
SFA_ORT_AT(KernelContext_GetInput, 90);
SFA_ORT_AT(KernelContext_GetOutput, 91);
SFA_ORT_AT(ReleaseStatus, 93);
SFA_ORT_AT(ReleaseTensorTypeAndShapeInfo, 99);
SFA_ORT_AT(KernelInfoGetAttributeArray_float, 162);
SFA_ORT_AT(KernelInfoGetAttributeArray_int64, 163);
SFA_ORT_AT(HasSessionConfigEntry, 237);
SFA_ORT_AT(GetSessionConfigEntry, 238);
SFA_ORT_AT(KernelInfo_GetNodeName, 244);
SFA_ORT_AT(ShapeInferContext_GetInputCount, 267);
SFA_ORT_AT(ShapeInferContext_GetInputTypeShape, 268);
SFA_ORT_AT(ShapeInferContext_GetAttribute, 269);
SFA_ORT_AT(ShapeInferContext_SetOutputTypeShape, 270);
SFA_ORT_AT(SetSymbolicDimensions, 271);
SFA_ORT_AT(ReadOpAttr, 272);
SFA_ORT_AT(KernelContext_ParallelFor, 274);
#undef SFA_ORT_AT

static_assert(offsetof(OrtCustomOp, CreateKernelV2) == 17 * sizeof(void*));
static_assert(offsetof(OrtCustomOp, GetEndVersion) == 21 * sizeof(void*));
static_assert(offsetof(OrtCustomOp, ReleaseMayInplace) == 23 * sizeof(void*));
static_assert(ORT_INVALID_ARGUMENT == 2 && ORT_NOT_IMPLEMENTED == 9 && ORT_FAIL == 1);
static_assert(INPUT_OUTPUT_OPTIONAL == 1 && ORT_OP_ATTR_INT == 1);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 == 16);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == 10);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 == 6 && ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 == 3);

#endif  // SFA_ONNX_KERNELS_ORT_ORT_ABI_H_
