#include "shape_inference.h"

#include "kv_cache_pack.h"

namespace sfa {
namespace {

// Shape of an input; names are kept by the runtime's info object, so it lives as long as this.
class Shape {
 public:
  explicit Shape(const OrtApi* api) : api_(api) {}
  ~Shape() {
    if (info_ != nullptr) api_->ReleaseTensorTypeAndShapeInfo(info_);
  }
  Shape(const Shape&) = delete;
  Shape& operator=(const Shape&) = delete;

  OrtStatus* Read(const OrtShapeInferContext* context, size_t index) {
    size_t count = 0;
    SFA_ORT_TRY(api_->ShapeInferContext_GetInputCount(context, &count));
    if (index >= count) return nullptr;
    SFA_ORT_TRY(api_->ShapeInferContext_GetInputTypeShape(context, index, &info_));
    if (info_ == nullptr) return nullptr;
    SFA_ORT_TRY(api_->GetDimensionsCount(info_, &rank));
    if (rank > kMaxRank) rank = 0;
    if (rank == 0) return nullptr;
    SFA_ORT_TRY(api_->GetTensorElementType(info_, &type));
    SFA_ORT_TRY(api_->GetDimensions(info_, dims, rank));
    return api_->GetSymbolicDimensions(info_, names, rank);
  }

  bool known() const { return rank > 0; }  // a scalar is no legal input, so 0 means unknown
  int64_t last() const { return dims[rank - 1]; }
  void SetLast(int64_t value) {
    dims[rank - 1] = value;
    names[rank - 1] = "";
  }

  size_t rank = 0;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  int64_t dims[kMaxRank] = {};  // -1: not known, perhaps named
  const char* names[kMaxRank] = {};

 private:
  const OrtApi* api_;
  OrtTensorTypeAndShapeInfo* info_ = nullptr;
};

OrtStatus* SetOutput(const OrtApi* api, const OrtShapeInferContext* context, Shape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  SFA_ORT_TRY(api->CreateTensorTypeAndShapeInfo(&info));
  for (size_t i = 0; i < shape->rank; ++i) {
    if (shape->names[i] == nullptr) shape->names[i] = "";  // null is not understood as unnamed
  }
  OrtStatus* status = api->SetDimensions(info, shape->dims, shape->rank);
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
  if (op != AttentionOp::kFloatCache && query.last() >= 0) {
    const int64_t fallback = op == AttentionOp::kKvQuant ? 64 : 0;
    const int64_t nope = query.last() - IntAttribute(api, context, "rope_head_dim", fallback);
    query.SetLast(nope > 0 ? nope : -1);
  } else if (op != AttentionOp::kFloatCache) {
    query.SetLast(-1);  // not the query's symbol: the output is narrower
  }
  return SetOutput(api, context, &query);
}

OrtStatusPtr InferPack(const OrtApi* api, OrtShapeInferContext* context) {
  Shape nope(api), rope(api);
  SFA_ORT_TRY(nope.Read(context, kNope));
  SFA_ORT_TRY(rope.Read(context, kRope));
  if (!nope.known()) return nullptr;
  const int64_t tile = IntAttribute(api, context, "tile_size", 128);
  // An absent rope cannot be told from one of unknown rank here: leave the width open then.
  const bool known = nope.last() >= 0 && rope.known() && rope.last() >= 0 && tile > 0 &&
                     rope.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  nope.SetLast(known ? nope.last() + rope.last() * ItemSize(rope.type) + nope.last() / tile * 4
                     : -1);
  return SetOutput(api, context, &nope);
}

}  // namespace sfa
