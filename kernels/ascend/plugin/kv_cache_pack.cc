#include "kv_cache_pack.h"

#include "expansion.h"
#include "log.h"

namespace sfa_onnx {
namespace {

constexpr size_t kNope = 0;
constexpr size_t kRope = 1;
constexpr size_t kScale = 2;
constexpr size_t kClip = 3;
constexpr float kInverse127 = 1.0F / 127.0F;
// Attributes that carry the node's facts from parsing to expansion.
const char* const kInputMask = "sfa_input_mask";
const char* const kTileSize = "tile_size";
const char* const kRopeType = "rope_dtype";

struct Quantised {
  ge::Operator rows;    // [..., C] int8
  ge::Operator scales;  // [..., C/tile, 1] float32
};

// Mode "quantise": per tile limit = max|x| * clip, scale = limit/127, q = round(x / scale).
// As the vendor's own cache writer: a multiply by the reciprocal; an all-zero tile gives zeros.
Quantised Quantise(Builder& b, const ge::Operator& nope, const ge::Operator& whole,
                   const ge::Operator& lead, int64_t tile, bool clipped) {
  const ge::Operator tiled_shape = b.ShapeWith("tiled_shape", lead, {-1, tile});
  const ge::Operator wide = b.Cast("float", nope, ge::DT_FLOAT);
  ge::Operator x = b.Reshape("tiles", wide, tiled_shape);
  ge::Operator limit = b.Make("ReduceMax", "limit");
  limit.SetInput("x", b.Unary("Abs", "abs", x));
  limit.SetInput("axes", b.Const<int64_t>("limit_axes", ge::DT_INT64, {-1}));
  limit.SetAttr("keep_dims", true);
  if (clipped) {
    const ge::Operator alpha = b.Cast("clip", b.Data(kClip), ge::DT_FLOAT);
    limit = b.Binary("Mul", "clipped_limit", limit, alpha);
    const ge::Operator low = b.Unary("Neg", "low", limit);
    x = b.Binary("Minimum", "below", b.Binary("Maximum", "above", x, low), limit);
  }
  const ge::Operator factor = b.Const<float>("inverse_127", ge::DT_FLOAT, {kInverse127}, true);
  const ge::Operator one = b.Const<float>("one", ge::DT_FLOAT, {1.0F}, true);
  const ge::Operator scale = b.Binary("Mul", "scale", limit, factor);
  const ge::Operator inverse = b.Binary("DivNoNan", "inverse", one, scale);
  const ge::Operator steps = b.Binary("Mul", "steps", x, inverse);
  const ge::Operator rounded = b.Unary("Round", "rounded", steps);
  const ge::Operator q = b.Cast("int8", rounded, ge::DT_INT8);
  return {b.Reshape("nope_rows", q, whole), scale};
}

// 16-bit rope as bytes. Bitcast lists no bfloat16, so that one goes through float32, exactly: its
// two bytes are the upper half of the float's.
ge::Operator RopeBytes(Builder& b, const std::string& type, const ge::Operator& rows) {
  const ge::Operator rope = b.Data(kRope);
  if (type != "bfloat16") return b.Bytes("rope_rows", rope, rows);
  const ge::Operator wide = b.Cast("rope_float", rope, ge::DT_FLOAT);
  ge::Operator bits = b.Unary("Bitcast", "rope_bits", wide);
  bits.SetAttr("type", ge::DT_INT8);
  return b.Reshape("rope_rows", b.Slice("rope_half", bits, 2, 4, -1), rows);
}

bool Has(int64_t mask, size_t input) { return (mask >> input) & 1; }

bool CheckModes(const Node& node, const std::string& rope_type) {
  const auto has = [&](size_t i) { return i < node.connected.size() && node.connected[i]; };
  const char* name = node.name.c_str();
  if (has(kScale) && has(kClip)) {
    SFA_LOG_ERROR(name,
                  "KvCachePack has scale (int8 rows are copied) and clip (rows are quantised)");
    return false;
  }
  if (!has(kRope)) {
    SFA_LOG_ERROR(name, "KvCachePack without rope: the NPU operator takes rope_head_dim 64 only");
    return false;
  }
  if (!rope_type.empty() && rope_type != "float16" && rope_type != "bfloat16") {
    SFA_LOG_ERROR(name, "rope_dtype %s: the NPU operator reads float16 or bfloat16 rope",
                  rope_type.c_str());
    return false;
  }
  return true;
}

}  // namespace

domi::Status ParseKvCachePack(const ge::Operator& source, ge::Operator& target) {
  Node node;
  if (!ReadNode(source, kKvCachePack, &node)) return domi::FAILED;
  const Attribute* rope = FindAttribute(node.attributes, kRopeType);
  if (rope != nullptr && rope->type != kString) {
    SFA_LOG_ERROR(node.name.c_str(), "attribute rope_dtype is %s, expected STRING",
                  TypeName(rope->type));
    return domi::FAILED;
  }
  const std::string rope_type = rope == nullptr ? std::string() : rope->s;
  if (!CheckModes(node, rope_type)) return domi::FAILED;
  const int64_t tile = FindAttribute(node.attributes, kTileSize)->i;
  if (tile <= 0) {
    SFA_LOG_ERROR(node.name.c_str(), "tile_size %lld, expected a positive number",
                  static_cast<long long>(tile));
    return domi::FAILED;
  }
  int64_t mask = 0;
  for (size_t i = 0; i < node.connected.size(); ++i) {
    if (node.connected[i]) mask |= int64_t{1} << i;
  }
  target.SetAttr(kOriginalType, ge::AscendString(node.origin_type.c_str()));
  target.SetAttr(kTileSize, tile);
  target.SetAttr(kInputMask, mask);
  target.SetAttr(kRopeType, ge::AscendString(rope_type.c_str()));
  target.DynamicInputRegister("args", static_cast<uint32_t>(node.connected.size()));
  target.DynamicOutputRegister("output", 1);
  return domi::SUCCESS;
}

domi::Status ExpandKvCachePack(const ge::Operator& node, ge::Graph& graph) {
  ge::AscendString name;
  ge::AscendString rope_type;
  int64_t tile = 0;
  int64_t mask = 0;
  if (node.GetName(name) != ge::GRAPH_SUCCESS || name.GetString() == nullptr ||
      node.GetAttr(kTileSize, tile) != ge::GRAPH_SUCCESS ||
      node.GetAttr(kInputMask, mask) != ge::GRAPH_SUCCESS) {
    SFA_LOG_ERROR("?", "KvCachePack: the facts noted at parsing are gone");
    return domi::FAILED;
  }
  (void)node.GetAttr(kRopeType, rope_type);
  const char* rope = rope_type.GetString() == nullptr ? "" : rope_type.GetString();
  Builder b("KvCachePack", name.GetString());
  const ge::Operator nope = b.Data(kNope);
  const ge::Operator whole = b.Shape("shape", nope);
  const ge::Operator lead = b.Slice("lead", whole, 0, -1, 0);
  const ge::Operator rows = b.ShapeWith("row_shape", lead, {-1});
  const ge::Operator rope_rows = RopeBytes(b, rope, rows);
  std::vector<ge::Operator> parts;
  if (Has(mask, kScale)) {  // mode "copy": int8 rows and their scales as they are
    parts = {nope, rope_rows, b.Bytes("scale_rows", b.Data(kScale), rows)};
  } else {
    const Quantised q = Quantise(b, nope, whole, lead, tile, Has(mask, kClip));
    parts = {q.rows, rope_rows, b.Bytes("scale_rows", q.scales, rows)};
  }
  const ge::Operator packed = b.Concat("packed", parts, -1);
  return b.Finish(packed, graph) ? domi::SUCCESS : domi::FAILED;
}

}  // namespace sfa_onnx
