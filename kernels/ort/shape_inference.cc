#include "shape_inference.h"

#include "kv_cache_pack.h"

namespace sfa {
namespace {

constexpr int64_t kUnknown = -1;

bool Small(int64_t dim) { return 0 <= dim && dim <= INT32_MAX; }

// Shape of an input. Its names point into an info object that belongs to the context.
class Shape {
 public:
  explicit Shape(const OrtApi* api) : api_(api) {}

  OrtStatus* Read(const OrtShapeInferContext* context, size_t index) {
    size_t count = 0;
    SFA_ORT_TRY(api_->ShapeInferContext_GetInputCount(context, &count));
    absent = index >= count;
    if (absent) return nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    SFA_ORT_TRY(api_->ShapeInferContext_GetInputTypeShape(context, index, &info));
    if (info == nullptr) return nullptr;
    SFA_ORT_TRY(api_->GetDimensionsCount(info, &rank));
    if (rank > kMaxRank) rank = 0;
    if (rank == 0) return nullptr;
    SFA_ORT_TRY(api_->GetTensorElementType(info, &type));
    SFA_ORT_TRY(api_->GetDimensions(info, dims, rank));
    return api_->GetSymbolicDimensions(info, names, rank);
  }

  // A scalar is no legal input, so rank 0 means unknown. An input left out in the middle looks
  // like one of unknown rank and type.
  bool known() const { return rank > 0 && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
  int64_t last() const { return dims[rank - 1]; }
  void SetLast(int64_t value) { Set(rank - 1, value); }
  void Set(size_t axis, int64_t value) {
    dims[axis] = value;
    names[axis] = "";
  }

  bool absent = false;
  size_t rank = 0;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  int64_t dims[kMaxRank] = {};  // kUnknown: perhaps named
  const char* names[kMaxRank] = {};

 private:
  const OrtApi* api_;
};

// A dimension without name and size would be written as the size -1, so it gets a name of its own.
class FreshNames {
 public:
  const char* Next() {
    static uint32_t counter = 0;
    char* name = names_[used_++];
    snprintf(name, sizeof names_[0], "sfa_onnx_dim_%u",
             __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED));
    return name;
  }

 private:
  char names_[kMaxRank][32];
  size_t used_ = 0;
};

// Always of output 0, which every node has. A node may leave out the others, the context does not
// tell, and runtimes (1.24 to 1.27 were seen to abort) write where it has none.
OrtStatus* SetOutput(const OrtApi* api, const OrtShapeInferContext* context, Shape* shape,
                     ONNXTensorElementDataType type) {
  FreshNames fresh;
  for (size_t i = 0; i < shape->rank; ++i) {
    const bool named = shape->names[i] != nullptr && *shape->names[i] != '\0';
    if (!named) shape->names[i] = shape->dims[i] < 0 ? fresh.Next() : "";
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  SFA_ORT_TRY(api->CreateTensorTypeAndShapeInfo(&info));
  OrtStatus* status = api->SetTensorElementType(info, type);
  if (status == nullptr) status = api->SetDimensions(info, shape->dims, shape->rank);
  if (status == nullptr) status = api->SetSymbolicDimensions(info, shape->names, shape->rank);
  if (status == nullptr) status = api->ShapeInferContext_SetOutputTypeShape(context, 0, info);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

int64_t IntAttribute(const OrtApi* api, const OrtShapeInferContext* context, const char* name,
                     int64_t fallback) {
  const OrtOpAttr* attribute = nullptr;
  int64_t value = fallback;
  size_t written = 0;
  OrtStatus* status = api->ShapeInferContext_GetAttribute(context, name, &attribute);
  if (status == nullptr) {
    status = api->ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof value, &written);
  }
  if (status == nullptr) return value;
  // Absent, or not an int: the kernel's constructor complains about that.
  api->ReleaseStatus(status);
  return fallback;
}

}  // namespace

OrtStatusPtr InferAttention(const OrtApi* api, OrtShapeInferContext* context, AttentionOp op) {
  Shape query(api);
  SFA_ORT_TRY(query.Read(context, 0));
  if (!query.known()) return nullptr;
  if (op != AttentionOp::kFloatCache) {
    const int64_t fallback = op == AttentionOp::kKvQuant ? 64 : 0;
    const int64_t rope = IntAttribute(api, context, "rope_head_dim", fallback);
    // The output is narrower than the query, so the query's symbol must not stay.
    query.SetLast(0 <= rope && rope < query.last() ? query.last() - rope : kUnknown);
  }
  return SetOutput(api, context, &query, query.type);
}

OrtStatusPtr InferIndexer(const OrtApi* api, OrtShapeInferContext* context) {
  Shape query(api);
  SFA_ORT_TRY(query.Read(context, 0));
  if (!query.known() || query.rank < 3) return nullptr;
  const int64_t count = IntAttribute(api, context, "sparse_count", 2048);
  query.Set(query.rank - 2, 1);
  query.SetLast(Small(count) ? count : kUnknown);
  return SetOutput(api, context, &query, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
}

OrtStatusPtr InferSameAsFirst(const OrtApi* api, OrtShapeInferContext* context) {
  Shape first(api);
  SFA_ORT_TRY(first.Read(context, 0));
  return first.known() ? SetOutput(api, context, &first, first.type) : nullptr;
}

OrtStatusPtr InferPack(const OrtApi* api, OrtShapeInferContext* context) {
  Shape nope(api), rope(api);
  SFA_ORT_TRY(nope.Read(context, kNope));
  SFA_ORT_TRY(rope.Read(context, kRope));
  if (!nope.known()) return nullptr;
  const int64_t tile = IntAttribute(api, context, "tile_size", 128);
  int64_t rope_bytes = kUnknown;
  if (rope.absent) {
    rope_bytes = 0;
  } else if (rope.known() && Small(rope.last())) {
    rope_bytes = rope.last() * ItemSize(rope.type);
  }
  const bool known = Small(nope.last()) && tile > 0 && rope_bytes != kUnknown;
  nope.SetLast(known ? nope.last() + rope_bytes + nope.last() / tile * 4 : kUnknown);
  return SetOutput(api, context, &nope, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
}

}  // namespace sfa
