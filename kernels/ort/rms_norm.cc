#include "rms_norm.h"

#include <math.h>
#include <stdlib.h>

#include "attributes.h"
#include "half.h"
#include "message.h"
#include "tensor.h"

namespace sfa {
namespace {

typedef long long ll;

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kBFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
constexpr float kEpsilon = 1e-6f;  // what CANN's parser plug-ins always write
constexpr int kMostInputs = 3;
constexpr int kRowsPerTask = 16;

constexpr const char* kPlainNames[] = {"x", "gamma"};
constexpr const char* kAddNames[] = {"x1", "x2", "gamma"};

// One op for one choice of types.
struct NormOp : OrtCustomOp {
  bool adds;  // x = x1 + x2 first
  ONNXTensorElementDataType x, gamma;
};

const NormOp& Self(const OrtCustomOp* op) { return *static_cast<const NormOp*>(op); }

struct NormKernel {
  const OrtApi* api;
  bool adds;
  float epsilon;
};

// y = x / sqrt(mean(x^2) + epsilon) * gamma over the last `width` elements, in float32.
struct NormCall {
  const void *x1, *x2, *gamma;  // x2: null without an addition
  void *y, *rstd, *sum;         // rstd, sum: null where not asked for
  int x_type, gamma_type;
  int64_t rows, width;
  float epsilon;
};

float Sum(const NormCall& c, int64_t i) {
  const float left = load_as_f32(c.x1, i, c.x_type);
  if (c.x2 == nullptr) return left;
  // The residual is kept in the type of x, and that is what is normalised.
  uint32_t rounded = 0;
  store_from_f32(&rounded, 0, c.x_type, left + load_as_f32(c.x2, i, c.x_type));
  return load_as_f32(&rounded, 0, c.x_type);
}

void NormRow(const NormCall& c, int64_t row) {
  const int64_t first = row * c.width;
  double squares = 0;
  for (int64_t i = 0; i < c.width; ++i) {
    const float x = Sum(c, first + i);
    squares += double(x) * x;
    if (c.sum != nullptr) store_from_f32(c.sum, first + i, c.x_type, x);
  }
  const float rstd = float(1.0 / sqrt(squares / double(c.width) + double(c.epsilon)));
  if (c.rstd != nullptr) static_cast<float*>(c.rstd)[row] = rstd;
  for (int64_t i = 0; i < c.width; ++i) {
    const float gamma = load_as_f32(c.gamma, i, c.gamma_type);
    store_from_f32(c.y, first + i, c.x_type, Sum(c, first + i) * rstd * gamma);
  }
}

void NormRows(void* data, size_t task) {
  const auto& call = *static_cast<const NormCall*>(data);
  const int64_t first = static_cast<int64_t>(task) * kRowsPerTask;
  for (int64_t i = first; i < call.rows && i < first + kRowsPerTask; ++i) NormRow(call, i);
}

// gamma's shape is the end of x's; x2 has x's shape.
bool CheckShapes(const Tensor* in, bool adds, Message* error) {
  const Tensor &x = in[0], &gamma = in[adds ? 2 : 1];
  bool ends = gamma.rank >= 1 && gamma.rank <= x.rank;
  for (size_t i = 0; ends && i < gamma.rank; ++i) {
    ends = gamma.dims[i] == x.dims[x.rank - gamma.rank + i] && gamma.dims[i] > 0;
  }
  if (!ends) {
    error->Add("input gamma: shape ");
    error->AddShape(gamma.dims, gamma.rank);
    error->Add(": expected the last dimensions of ");
    return error->AddShape(x.dims, x.rank);
  }
  if (!adds) return true;
  bool same = in[1].rank == x.rank;
  for (size_t i = 0; same && i < x.rank; ++i) same = in[1].dims[i] == x.dims[i];
  if (same) return true;
  error->Add("input x2: shape ");
  error->AddShape(in[1].dims, in[1].rank);
  error->Add(": expected x1's shape ");
  return error->AddShape(x.dims, x.rank);
}

OrtStatus* Output(const OrtApi* api, OrtKernelContext* context, size_t index, const int64_t* dims,
                  size_t rank, void** data) {
  size_t count = 0;
  *data = nullptr;
  SFA_ORT_TRY(api->KernelContext_GetOutputCount(context, &count));
  if (index >= count) return nullptr;
  OrtValue* value = nullptr;
  SFA_ORT_TRY(api->KernelContext_GetOutput(context, index, dims, rank, &value));
  return value == nullptr ? nullptr : api->GetTensorMutableData(value, data);
}

OrtStatus* Outputs(const OrtApi* api, OrtKernelContext* context, const Tensor& x,
                   const Tensor& gamma, bool adds, NormCall* call) {
  int64_t kept[kMaxRank];  // rstd: x's shape, ones where gamma reaches
  for (size_t i = 0; i < x.rank; ++i) kept[i] = i + gamma.rank < x.rank ? x.dims[i] : 1;
  SFA_ORT_TRY(Output(api, context, 0, x.dims, x.rank, &call->y));
  SFA_ORT_TRY(Output(api, context, 1, kept, x.rank, &call->rstd));
  return adds ? Output(api, context, 2, x.dims, x.rank, &call->sum) : nullptr;
}

// ---- the face towards the runtime ----

OrtStatusPtr Create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                    void** kernel) {
  float epsilon = kEpsilon;
  if (OrtStatus* absent = api->KernelInfoGetAttribute_float(info, "epsilon", &epsilon)) {
    api->ReleaseStatus(absent);
    epsilon = kEpsilon;
  }
  if (!(epsilon >= 0)) {
    Message error;
    error.Add("attribute epsilon: %g, expected 0 or more", double(epsilon));
    return Refuse(api, error);
  }
  auto* made = static_cast<NormKernel*>(malloc(sizeof(NormKernel)));
  if (made == nullptr) return api->CreateStatus(ORT_FAIL, "out of memory");
  *made = NormKernel{api, Self(op).adds, epsilon};
  *kernel = made;
  return nullptr;
}

OrtStatusPtr Compute(void* kernel, OrtKernelContext* context) {
  const auto& self = *static_cast<const NormKernel*>(kernel);
  Tensor in[kMostInputs];
  const int count = self.adds ? 3 : 2;
  for (int i = 0; i < count; ++i) {
    const char* name = self.adds ? kAddNames[i] : kPlainNames[i];
    SFA_ORT_TRY(ReadInput(self.api, context, i, name, &in[i]));
  }
  Message error;
  if (!CheckShapes(in, self.adds, &error)) return Refuse(self.api, error);
  const Tensor &x = in[0], &gamma = in[count - 1];
  NormCall call = {};
  call.x1 = x.data;
  call.x2 = self.adds ? in[1].data : nullptr;
  call.gamma = gamma.data;
  call.x_type = CoreType(x.type);
  call.gamma_type = CoreType(gamma.type);
  call.epsilon = self.epsilon;
  call.rows = call.width = 1;
  for (size_t i = 0; i < x.rank; ++i) {
    (i + gamma.rank < x.rank ? call.rows : call.width) *= x.dims[i];
  }
  SFA_ORT_TRY(Outputs(self.api, context, x, gamma, self.adds, &call));
  const size_t tasks = static_cast<size_t>((call.rows + kRowsPerTask - 1) / kRowsPerTask);
  if (tasks == 0) return nullptr;
  if (tasks > 1) {
    return self.api->KernelContext_ParallelFor(context, NormRows, tasks, tasks, &call);
  }
  NormRows(&call, 0);
  return nullptr;
}

void Destroy(void* kernel) { free(kernel); }

const char* Name(const OrtCustomOp* op) { return Self(op).adds ? "NPUAddRmsNorm" : "NPURmsNorm"; }
const char* Provider(const OrtCustomOp*) { return "CPUExecutionProvider"; }
size_t InputCount(const OrtCustomOp* op) { return Self(op).adds ? 3 : 2; }
size_t OutputCount(const OrtCustomOp* op) { return Self(op).adds ? 3 : 2; }
ONNXTensorElementDataType InputType(const OrtCustomOp* op, size_t index) {
  return index + 1 == InputCount(op) ? Self(op).gamma : Self(op).x;
}
ONNXTensorElementDataType OutputType(const OrtCustomOp* op, size_t index) {
  return index == 1 ? kFloat : Self(op).x;
}
OrtCustomOpInputOutputCharacteristic InputKind(const OrtCustomOp*, size_t) {
  return INPUT_OUTPUT_REQUIRED;
}
OrtCustomOpInputOutputCharacteristic OutputKind(const OrtCustomOp*, size_t index) {
  return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}
OrtMemType DefaultMemory(const OrtCustomOp*, size_t) { return OrtMemTypeDefault; }
int NoVariadic(const OrtCustomOp*) { return 0; }
int FirstVersion(const OrtCustomOp*) { return 1; }
int LastVersion(const OrtCustomOp*) { return INT32_MAX; }

constexpr NormOp Norm(bool adds, ONNXTensorElementDataType x, ONNXTensorElementDataType gamma) {
  NormOp op{};
  op.version = kOrtApiFloor;
  op.adds = adds;
  op.x = x;
  op.gamma = gamma;
  op.GetName = Name;
  op.GetExecutionProviderType = Provider;
  op.GetInputType = InputType;
  op.GetInputTypeCount = InputCount;
  op.GetInputCharacteristic = InputKind;
  op.GetInputMemoryType = DefaultMemory;
  op.GetOutputType = OutputType;
  op.GetOutputTypeCount = OutputCount;
  op.GetOutputCharacteristic = OutputKind;
  op.GetVariadicInputMinArity = NoVariadic;
  op.GetVariadicInputHomogeneity = NoVariadic;
  op.GetVariadicOutputMinArity = NoVariadic;
  op.GetVariadicOutputHomogeneity = NoVariadic;
  op.GetStartVersion = FirstVersion;
  op.GetEndVersion = LastVersion;
  op.CreateKernelV2 = Create;
  op.KernelComputeV2 = Compute;
  op.KernelDestroy = Destroy;
  return op;
}

// The rows of the NPU operators' type tables.
constexpr NormOp kNorms[] = {
    Norm(false, kFloat, kFloat),       Norm(false, kHalf, kHalf),
    Norm(false, kBFloat16, kBFloat16), Norm(false, kHalf, kFloat),
    Norm(false, kBFloat16, kFloat),    Norm(true, kFloat, kFloat),
    Norm(true, kHalf, kHalf),          Norm(true, kBFloat16, kBFloat16),
};

}  // namespace

OrtStatus* AddRmsNorms(const OrtApi* api, OrtCustomOpDomain* domain) {
  for (const NormOp& op : kNorms) SFA_ORT_TRY(api->CustomOpDomain_Add(domain, &op));
  return nullptr;
}

}  // namespace sfa
