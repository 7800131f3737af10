#include "kv_cache_pack.h"

#include <stdlib.h>

#include "attributes.h"
#include "message.h"
#include "sfa_core.h"
#include "tensor.h"

namespace sfa {
namespace {

typedef long long ll;

constexpr const char* kNames[kPackInputs] = {"nope", "rope", "scale", "clip"};
constexpr int64_t kRowsPerTask = 64;

struct PackKernel {
  const OrtApi* api;
  int64_t tile_size;
};

// Same leading dimensions as nope, `last` in the last one (negative: any).
bool CheckRows(const Tensor& t, const Tensor& nope, int64_t last, Message* error) {
  bool same = t.rank == nope.rank;
  for (size_t i = 0; same && i + 1 < t.rank; ++i) same = t.dims[i] == nope.dims[i];
  if (same && (last < 0 || t.last() == last)) return true;
  error->Add("input %s: shape ", t.name);
  error->AddShape(t.dims, t.rank);
  error->Add(": expected nope's shape ");
  error->AddShape(nope.dims, nope.rank);
  if (last < 0) return error->Add(" up to the last dimension");
  return error->Add(" with %lld in the last dimension (nope / tile_size)", ll(last));
}

bool CheckNope(const Tensor& nope, int64_t tile, Message* error) {
  if (nope.rank >= 1 && nope.last() >= 1 && nope.last() <= INT32_MAX && nope.last() % tile == 0) {
    return true;
  }
  error->Add("input nope: shape ");
  error->AddShape(nope.dims, nope.rank);
  return error->Add(": expected [..., C] with C a positive multiple of tile_size %lld", ll(tile));
}

bool CheckScale(const Tensor& nope, const Tensor& scale, int64_t tile, Message* error) {
  const bool quantised = nope.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
  if (quantised && !scale.present) {
    return error->Add("input scale: expected, because nope is int8, but it is absent");
  }
  if (!quantised && scale.present) {
    return error->Add("input scale: expected to be absent, because a float nope is quantised here");
  }
  return !quantised || CheckRows(scale, nope, nope.last() / tile, error);
}

bool CheckClip(const Tensor& clip, Message* error) {
  if (!clip.present || clip.rank == 0 || (clip.rank == 1 && clip.dims[0] == 1)) return true;
  error->Add("input clip: shape ");
  error->AddShape(clip.dims, clip.rank);
  return error->Add(": expected a scalar");
}

// Checks the shapes and describes the rows to the core.
bool Describe(const PackKernel& kernel, const Tensor* in, sfa_core_pack_params* p, Message* error) {
  const Tensor &nope = in[kNope], &rope = in[kRope];
  if (!CheckNope(nope, kernel.tile_size, error)) return false;
  if (rope.present && !CheckRows(rope, nope, -1, error)) return false;
  if (rope.present && rope.last() > INT32_MAX) {
    return error->Add("input rope: last dimension %lld is above 2^31-1", ll(rope.last()));
  }
  if (!CheckScale(nope, in[kScale], kernel.tile_size, error)) return false;
  if (!CheckClip(in[kClip], error)) return false;
  *p = sfa_core_pack_params{};
  p->struct_size = sizeof *p;
  p->nope_dtype = CoreType(nope.type);
  p->rope_dtype = rope.present ? CoreType(rope.type) : SFA_CORE_F16;
  p->nope_dim = static_cast<int32_t>(nope.last());
  p->rope_dim = static_cast<int32_t>(rope.present ? rope.last() : 0);
  p->tile_size = static_cast<int32_t>(kernel.tile_size);
  p->clip = in[kClip].present ? *static_cast<const float*>(in[kClip].data) : 1.0f;
  p->rows = 1;
  for (size_t i = 0; i + 1 < nope.rank; ++i) p->rows *= nope.dims[i];
  p->nope = nope.data;
  p->rope = p->rope_dim ? rope.data : nullptr;
  p->scale = in[kScale].present ? static_cast<const float*>(in[kScale].data) : nullptr;
  return true;
}

struct PackCall {
  sfa_core_pack_params params;
  sfa_core_error error;  // of any one task that failed
  int failed;
};

void PackRows(void* data, size_t task) {
  auto* call = static_cast<PackCall*>(data);
  const int64_t first = static_cast<int64_t>(task) * kRowsPerTask;
  const int64_t left = call->params.rows - first;
  sfa_core_error error = {};
  const int status =
      sfa_core_pack(&call->params, first, left < kRowsPerTask ? left : kRowsPerTask, &error);
  if (status != SFA_CORE_OK && __atomic_exchange_n(&call->failed, 1, __ATOMIC_RELAXED) == 0) {
    call->error = error;
  }
}

OrtStatus* RunOnPool(const OrtApi* api, OrtKernelContext* context, PackCall* call) {
  // The empty range checks the parameters even where there is no row.
  call->failed = sfa_core_pack(&call->params, 0, 0, &call->error) != SFA_CORE_OK;
  const int64_t rows = call->failed ? 0 : call->params.rows;
  const size_t tasks = static_cast<size_t>((rows + kRowsPerTask - 1) / kRowsPerTask);
  if (tasks == 1) PackRows(call, 0);
  if (tasks > 1) {
    SFA_ORT_TRY(api->KernelContext_ParallelFor(context, PackRows, tasks, tasks, call));
  }
  return call->failed ? CoreError(api, call->error) : nullptr;
}

}  // namespace

OrtStatusPtr CreatePack(const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  Message error;
  int64_t tile = 0;
  AttributeReader read(api, info, &error);
  read.NameNode(kPackName);
  if (!read.IntInRange("tile_size", 128, 1, INT32_MAX, &tile)) return Refuse(api, error);
  auto* made = static_cast<PackKernel*>(malloc(sizeof(PackKernel)));
  if (made == nullptr) return api->CreateStatus(ORT_FAIL, "out of memory");
  *made = PackKernel{api, tile};
  *kernel = made;
  return nullptr;
}

OrtStatusPtr ComputePack(void* kernel, OrtKernelContext* context) {
  const auto& self = *static_cast<const PackKernel*>(kernel);
  Tensor in[kPackInputs];
  for (int i = 0; i < kPackInputs; ++i) {
    SFA_ORT_TRY(ReadInput(self.api, context, i, kNames[i], &in[i]));
  }
  PackCall call = {};
  sfa_core_pack_params& params = call.params;
  Message error;
  if (!Describe(self, in, &params, &error)) return Refuse(self.api, error);

  const Tensor& nope = in[kNope];
  int64_t shape[kMaxRank];
  for (size_t i = 0; i < nope.rank; ++i) shape[i] = nope.dims[i];
  shape[nope.rank - 1] =
      sfa_core_row_bytes(params.nope_dim, params.rope_dim, params.tile_size, params.rope_dtype);
  OrtValue* out = nullptr;
  SFA_ORT_TRY(self.api->KernelContext_GetOutput(context, 0, shape, nope.rank, &out));
  SFA_ORT_TRY(self.api->GetTensorMutableData(out, &params.out));
  return RunOnPool(self.api, context, &call);
}

void DestroyPack(void* kernel) { free(kernel); }

}  // namespace sfa
