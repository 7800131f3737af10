#include "kv_cache_write.h"

#include "expansion.h"
#include "log.h"

namespace sfa_onnx {
namespace {

constexpr size_t kPages = 0;
constexpr size_t kRows = 1;
constexpr size_t kSlots = 2;

}  // namespace

domi::Status ParseKvCacheWrite(const ge::Operator& source, ge::Operator& target) {
  Node node;
  if (!ReadNode(source, kKvCacheWrite, &node)) return domi::FAILED;
  target.SetAttr(kOriginalType, ge::AscendString(node.origin_type.c_str()));
  target.DynamicInputRegister("args", static_cast<uint32_t>(node.connected.size()));
  target.DynamicOutputRegister("output", 1);
  return domi::SUCCESS;
}

domi::Status ExpandKvCacheWrite(const ge::Operator& node, ge::Graph& graph) {
  ge::AscendString name;
  if (node.GetName(name) != ge::GRAPH_SUCCESS || name.GetString() == nullptr) {
    SFA_LOG_ERROR("?", "KvCacheWrite: a node without a name");
    return domi::FAILED;
  }
  Builder b("KvCacheWrite", name.GetString());
  const ge::Operator pages = b.Data(kPages);
  const ge::Operator rows = b.Data(kRows);
  const ge::Operator slots = b.Data(kSlots);
  const ge::Operator shape = b.Shape("shape", pages);
  const ge::Operator every = b.Const<int64_t>("every", ge::DT_INT64, {-1});
  const ge::Operator row = b.Slice("row", shape, 2, 4, 0);  // [1, D]
  const ge::Operator column = b.Const<int64_t>("column", ge::DT_INT64, {-1, 1});
  ge::Operator write = b.Make("ScatterNdUpdate", "write");
  write.SetInput("var", b.Reshape("flat", pages, b.Concat("flat_shape", {every, row}, 0)));
  write.SetInput("indices", b.Reshape("indices", slots, column));
  write.SetInput("updates", rows);
  write.SetAttr("use_locking", false);
  return b.Finish(b.Reshape("written", write, shape), graph) ? domi::SUCCESS : domi::FAILED;
}

}  // namespace sfa_onnx
