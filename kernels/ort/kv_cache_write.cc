#include "kv_cache_write.h"

#include <stdlib.h>

#include "message.h"
#include "sequence_checks.h"
#include "shape_inference.h"
#include "tensor.h"

namespace sfa {
namespace {

enum WriteInput { kPages, kNewRows, kSlots, kWriteInputs };
constexpr const char* kWriteNames[kWriteInputs] = {"pages", "rows", "slot_mapping"};

struct WriteOp : OrtCustomOp {
  ONNXTensorElementDataType row;
};

const WriteOp& Self(const OrtCustomOp* op) { return *static_cast<const WriteOp*>(op); }

struct WriteKernel {
  const OrtApi* api;
};

OrtStatusPtr Create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo*, void** kernel) {
  auto* made = static_cast<WriteKernel*>(malloc(sizeof(WriteKernel)));
  if (made == nullptr) return api->CreateStatus(ORT_FAIL, "out of memory");
  *made = WriteKernel{api};
  *kernel = made;
  return nullptr;
}

// pages [block_num, block_size, 1, D], rows [n, 1, D], slot_mapping [n].
bool Describe(const Tensor* in, sfa_core_write_params* p, Message* error) {
  const Tensor &pages = in[kPages], &rows = in[kNewRows], &slots = in[kSlots];
  const ShapeChecks check(error);
  if (!check.Rank(pages, 4, "[block_num,block_size,1,D]") || !check.FitsInt32(pages) ||
      !check.Dim(pages, 2, 1, "one head") || !check.Rank(rows, 3, "[n,1,D]") ||
      !check.Dim(rows, 1, 1, "one head") ||
      !check.Dim(rows, 2, pages.last(), "width, as the pages'") || !check.Rank(slots, 1, "[n]") ||
      !check.Dim(slots, 0, rows.dims[0], "as many as rows")) {
    return false;
  }
  if (pages.last() == 0) return check.About(pages)->Add("expected rows of at least one element");
  *p = sfa_core_write_params{};
  p->struct_size = sizeof *p;
  p->slots = pages.dims[0] * pages.dims[1];
  p->row_bytes = pages.last() * ItemSize(pages.type);
  p->rows = rows.dims[0];
  p->pages = pages.data;
  p->new_rows = rows.data;
  p->slot_mapping = Ints(slots);
  return true;
}

OrtStatusPtr Compute(void* kernel, OrtKernelContext* context) {
  const OrtApi* api = static_cast<const WriteKernel*>(kernel)->api;
  Tensor in[kWriteInputs];
  for (int i = 0; i < kWriteInputs; ++i) {
    SFA_ORT_TRY(ReadInput(api, context, i, kWriteNames[i], &in[i]));
  }
  sfa_core_write_params params;
  Message error;
  if (!Describe(in, &params, &error)) return Refuse(api, error);
  OrtValue* out = nullptr;
  SFA_ORT_TRY(api->KernelContext_GetOutput(context, 0, in[kPages].dims, in[kPages].rank, &out));
  SFA_ORT_TRY(api->GetTensorMutableData(out, &params.out));
  sfa_core_error core = {};
  if (sfa_core_cache_write(&params, &core) == SFA_CORE_OK) return nullptr;
  return CoreError(api, core);
}

void Destroy(void* kernel) { free(kernel); }

const char* Name(const OrtCustomOp*) { return "KvCacheWrite"; }
const char* Provider(const OrtCustomOp*) { return "CPUExecutionProvider"; }
size_t InputCount(const OrtCustomOp*) { return kWriteInputs; }
size_t OutputCount(const OrtCustomOp*) { return 1; }
ONNXTensorElementDataType InputType(const OrtCustomOp* op, size_t index) {
  return index == kSlots ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : Self(op).row;
}
ONNXTensorElementDataType OutputType(const OrtCustomOp* op, size_t) { return Self(op).row; }
OrtCustomOpInputOutputCharacteristic Kind(const OrtCustomOp*, size_t) {
  return INPUT_OUTPUT_REQUIRED;
}
OrtMemType DefaultMemory(const OrtCustomOp*, size_t) { return OrtMemTypeDefault; }
int NoVariadic(const OrtCustomOp*) { return 0; }
int FirstVersion(const OrtCustomOp*) { return 1; }
int LastVersion(const OrtCustomOp*) { return INT32_MAX; }

// The output may lie where the pages lie, when nobody else reads them.
int g_pages_index = kPages, g_output_index = 0;
size_t MayInplace(int** input, int** output) {
  *input = &g_pages_index;
  *output = &g_output_index;
  return 1;
}
void KeepInplace(int*, int*) {}

const OrtApi* g_write_api = nullptr;  // shape functions get no table
OrtStatusPtr Shape(const OrtCustomOp*, OrtShapeInferContext* context) {
  return InferSameAsFirst(g_write_api, context);
}

constexpr WriteOp Write(ONNXTensorElementDataType row, bool in_place) {
  WriteOp op{};
  op.version = in_place ? 18 : kOrtApiFloor;
  op.row = row;
  op.GetName = Name;
  op.GetExecutionProviderType = Provider;
  op.GetInputType = InputType;
  op.GetInputTypeCount = InputCount;
  op.GetInputCharacteristic = Kind;
  op.GetInputMemoryType = DefaultMemory;
  op.GetOutputType = OutputType;
  op.GetOutputTypeCount = OutputCount;
  op.GetOutputCharacteristic = Kind;
  op.GetVariadicInputMinArity = NoVariadic;
  op.GetVariadicInputHomogeneity = NoVariadic;
  op.GetVariadicOutputMinArity = NoVariadic;
  op.GetVariadicOutputHomogeneity = NoVariadic;
  op.GetStartVersion = FirstVersion;
  op.GetEndVersion = LastVersion;
  op.CreateKernelV2 = Create;
  op.KernelComputeV2 = Compute;
  op.KernelDestroy = Destroy;
  op.InferOutputShapeFn = Shape;
  if (in_place) {
    op.GetMayInplace = MayInplace;
    op.ReleaseMayInplace = KeepInplace;
  }
  return op;
}

struct WriteOps {
  WriteOp ops[4];
};
constexpr WriteOps All(bool in_place) {
  return {{Write(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, in_place),
           Write(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, in_place),
           Write(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, in_place),
           Write(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, in_place)}};
}
constexpr WriteOps kWriteOps[] = {All(false), All(true)};

}  // namespace

OrtStatus* AddKvCacheWrite(const OrtApi* api, OrtCustomOpDomain* domain, bool in_place) {
  __atomic_store_n(&g_write_api, api, __ATOMIC_RELEASE);
  for (const WriteOp& op : kWriteOps[in_place].ops) {
    SFA_ORT_TRY(api->CustomOpDomain_Add(domain, &op));
  }
  return nullptr;
}

}  // namespace sfa
