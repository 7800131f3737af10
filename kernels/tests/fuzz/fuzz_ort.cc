// libFuzzer on the binding, inside a real onnxruntime: nodes with attributes, inputs, types, shapes
// and values as the bytes say. Session and run succeed or are refused with a text; nothing is read
// or written outside the tensors.
#include <math.h>

#include "cases.h"
#include "model_bytes.h"
#include "runtime.h"

namespace sfa_fuzz {
namespace {

constexpr int kFloat = 1, kInt8 = 3, kInt32 = 6, kHalf = 10, kBFloat16 = 16;
using Dims = std::vector<int64_t>;

size_t ItemSize(int type) { return type == kInt8 ? 1 : type == kFloat || type == kInt32 ? 4 : 2; }

// A node, its inputs and what feeds them.
class Node {
 public:
  Node(Reader& r, const char* op) : r_(r) { node_.Text(4, op); }

  void Attribute(const Message& attribute) {
    if (r_.Uniform(0, 40)) node_.Sub(5, attribute);
  }
  void Int(const char* name, int64_t value) {
    const int pick = r_.Uniform(0, 60);
    if (pick == 1) return Attribute(FloatAttribute(name, 0.5f));
    if (pick == 2) return Attribute(IntsAttribute(name, value));
    Attribute(IntAttribute(name, pick == 3 ? r_.Wild64() : value));
  }
  void Float(const char* name, float value) {
    const float odd[] = {-1, 0, 1e38f, INFINITY, -INFINITY, NAN};
    const int pick = r_.Uniform(0, 40);
    if (pick == 7) return Attribute(IntAttribute(name, 3));
    Attribute(FloatAttribute(name, pick < 6 ? odd[pick] : value));
  }
  void Layout(const char* name, int layout) {
    const char* names[] = {"BSND", "TND",  "PA_BSND",
                           "",     "bsnd", "a layout that nobody has ever had"};
    Attribute(TextAttribute(name, names[r_.Uniform(0, 40) ? layout : r_.Uniform(0, 5)]));
  }

  // An input; `kept` says how often an optional one is left out.
  void Input(const char* name, int type, Dims dims, bool optional = false, int around = -1) {
    if (optional && r_.Uniform(0, 5) == 0) {
      node_.Text(1, "");
      return;
    }
    Disturb(&dims);
    size_t count = 1;
    for (const int64_t d : dims) count *= static_cast<size_t>(d);
    if (count > 1 << 18) count = 0, dims = {0};
    Fed fed = {name, type, dims, {}};
    if (around >= 0) {
      const Ints values = SomeInts(r_, count, around);
      fed.bytes.resize(4 * count);
      if (count) memcpy(fed.bytes.data(), values.data(), 4 * count);
    } else {
      fed.bytes = r_.Bytes(count * ItemSize(type));
    }
    node_.Text(1, name);
    const int rank = r_.Uniform(0, 3) ? static_cast<int>(dims.size()) : -1;
    graph_.Sub(11, ValueInfo(name, type, rank));
    feeds_.push_back(std::move(fed));
  }
  void Absent() { node_.Text(1, ""); }

  void Output(const char* name, int type) {
    node_.Text(2, name);
    results_.Sub(12, ValueInfo(name, type, -1));
    outputs_.push_back(name);
  }

  void Run(const char* domain) {
    node_.Text(7, r_.Uniform(0, 9) ? domain : "");
    Message graph = Message().Sub(1, node_).Text(2, "g");
    const std::string bytes = graph.bytes() + graph_.bytes() + results_.bytes();
    OpenAndRun(ModelOf(bytes), r_.Flag(), feeds_, outputs_);
  }

 private:
  static std::string ModelOf(const std::string& graph) {
    Message model = Message().Int(1, 8).Text(7, graph);
    for (const char* domain : {"", "npu", "sfa_onnx"}) {
      model.Sub(8, Message().Text(1, domain).Int(2, *domain ? 1 : 17));
    }
    return model.bytes();
  }

  // Another size, one axis less, one more.
  void Disturb(Dims* dims) {
    switch (r_.Uniform(0, 40)) {
      case 0:
        if (!dims->empty()) (*dims)[r_.Byte() % dims->size()] = r_.Uniform(0, 9);
        break;
      case 1:
        if (!dims->empty()) dims->pop_back();
        break;
      case 2:
        dims->insert(dims->begin(), r_.Uniform(0, 2));
        break;
      case 3:
        dims->assign(static_cast<size_t>(r_.Uniform(0, 18)), 1);
        break;
      default:
        break;
    }
  }

  Reader& r_;
  Message node_, graph_, results_;
  std::vector<Fed> feeds_;
  std::vector<std::string> outputs_;
};

struct Sizes {
  int64_t b, s1, s2, n, k, nope, rope, tile, page, pages, columns;
  int type, layout_query, layout_kv;

  explicit Sizes(Reader& r) {
    const int types[] = {kFloat, kHalf, kBFloat16};
    type = types[r.Uniform(0, 2)];
    layout_query = r.Uniform(0, 1);
    layout_kv = r.Flag() ? 2 : layout_query;
    b = r.Uniform(0, 3);
    s1 = r.Uniform(0, 3);
    s2 = r.Uniform(0, 40);
    n = r.Uniform(1, 9);
    k = r.Uniform(0, 20);
    tile = r.Flag() ? 16 : r.Uniform(1, 9);
    nope = tile * r.Uniform(1, 3);
    rope = r.Uniform(0, 18);
    page = r.Uniform(1, 17);
    pages = r.Uniform(0, 6);
    columns = s2 / page + 1;
  }
  Dims Query(int64_t heads, int64_t width) const {
    return layout_query == 1 ? Dims{b * s1, heads, width} : Dims{b, s1, heads, width};
  }
  Dims Keys(int64_t width) const {
    return layout_kv == 1   ? Dims{b * s2, 1, width}
           : layout_kv == 2 ? Dims{pages, page, 1, width}
                            : Dims{b, s2, 1, width};
  }
};

void Sequences(Node& node, const Sizes& s, bool table_first) {
  const int pages = static_cast<int>(s.pages);
  const bool paged = s.layout_kv == 2;
  const auto table = [&] {
    if (paged) return node.Input("table", kInt32, {s.b, s.columns}, true, pages);
    node.Absent();
  };
  if (table_first) table();
  node.Input("len_q", kInt32, {s.b}, true, static_cast<int>(s.s1));
  node.Input("len_kv", kInt32, {s.b}, true, static_cast<int>(s.s2));
  if (!table_first) table();
}

void FuzzAttention(Reader& r, int which) {
  const char* names[] = {"NPUSparseFlashAttentionAntiquant", "NPUKvQuantSparseFlashAttention",
                         "NPUSparseFlashAttention"};
  const Sizes s(r);
  const bool floats = which == 2;
  Node node(r, names[which]);
  node.Float("scale_value", 0.1f);
  node.Int("sparse_block_size", r.Flag() ? 1 : r.Uniform(1, 5));
  node.Layout("layout_query", s.layout_query);
  node.Layout("layout_kv", s.layout_kv);
  node.Int("sparse_mode", r.Flag() ? 3 : 0);
  node.Int("attention_mode", 2);
  if (floats) node.Int("return_softmax_lse", r.Flag());
  if (!floats) {
    for (const char* mode : {"key_quant_mode", "value_quant_mode"}) node.Int(mode, 2);
    node.Int("quant_scale_repo_mode", 1);
    node.Int("tile_size", s.tile);
    node.Int("rope_head_dim", s.rope);
  }
  const int64_t bytes = static_cast<int64_t>(ItemSize(s.type));
  const int64_t row = floats ? s.nope : s.nope + s.rope * bytes + 4 * (s.nope / s.tile);
  const int keys = floats ? s.type : kInt8;
  node.Input("query", s.type, s.Query(s.n, floats ? s.nope : s.nope + s.rope));
  node.Input("key", keys, s.Keys(row));
  node.Input("value", keys, s.Keys(row));
  node.Input("indices", kInt32, s.Query(1, s.k), false, static_cast<int>(s.s2));
  if (!floats) node.Absent(), node.Absent();
  Sequences(node, s, true);
  if (floats) {
    node.Input("query_rope", s.type, s.Query(s.n, s.rope), true);
    node.Input("key_rope", s.type, s.Keys(s.rope), true);
  }
  if (r.Flag()) node.Input("sinks", kFloat, {s.n}, true);
  node.Output("out", s.type);
  if (floats && r.Flag()) node.Output("most", kFloat), node.Output("sum", kFloat);
  node.Run("npu");
}

void FuzzIndexer(Reader& r, bool quant) {
  Sizes s(r);
  Node node(r, quant ? "NPUQuantLightningIndexer" : "NPULightningIndexer");
  node.Int("sparse_count", r.Uniform(1, 20));
  node.Int("sparse_mode", r.Flag() ? 3 : 0);
  node.Layout("layout_query", s.layout_query);
  node.Layout("layout_key", s.layout_kv);
  const bool values = !quant && r.Flag();
  if (quant) {
    node.Int("query_quant_mode", 0);
    node.Int("key_quant_mode", 0);
  } else {
    node.Int("return_values", values);
  }
  Dims heads = s.Query(s.n, 1), keys = s.Keys(1);
  heads.pop_back();
  keys.pop_back();
  const int type = quant ? kInt8 : s.type, types[] = {kFloat, kHalf, kBFloat16};
  node.Input("query", type, s.Query(s.n, s.nope));
  node.Input("key", type, s.Keys(s.nope));
  node.Input("weights", quant ? kHalf : types[r.Uniform(0, 2)], heads);
  if (quant) {
    node.Input("query_scale", kHalf, heads);
    node.Input("key_scale", kHalf, keys);
  }
  Sequences(node, s, false);
  node.Output("indices", kInt32);
  if (values) node.Output("scores", type);
  node.Run("npu");
}

void FuzzPack(Reader& r) {
  const Sizes s(r);
  const bool whole = r.Flag();
  Node node(r, "KvCachePack");
  node.Int("tile_size", s.tile);
  node.Input("nope", whole ? kInt8 : s.type, {s.b, s.s2, s.nope});
  node.Input("rope", s.type, {s.b, s.s2, s.rope}, true);
  if (whole) node.Input("scale", kFloat, {s.b, s.s2, s.nope / s.tile}, true);
  if (!whole && r.Flag()) node.Absent(), node.Input("clip", kFloat, {1}, true);
  node.Output("rows", kInt8);
  node.Run("sfa_onnx");
}

void FuzzWrite(Reader& r) {
  const Sizes s(r);
  const int type = r.Flag() ? kInt8 : s.type;
  Node node(r, "KvCacheWrite");
  node.Input("pages", type, {s.pages, s.page, 1, s.nope});
  node.Input("rows", type, r.Flag() ? Dims{s.b, s.nope} : Dims{s.b, 1, s.nope});
  node.Input("slots", kInt32, {s.b}, false, static_cast<int>(s.pages * s.page));
  node.Output("written", type);
  node.Run("sfa_onnx");
}

void FuzzNorm(Reader& r) {
  const Sizes s(r);
  const bool add = r.Flag();
  Node node(r, add ? "NPUAddRmsNorm" : "NPURmsNorm");
  node.Float("epsilon", 1e-6f);
  node.Input("x", s.type, {s.b, s.s1, s.nope});
  if (add) node.Input("y", s.type, {s.b, s.s1, s.nope});
  node.Input("gamma", s.type, {s.nope});
  node.Output("normed", s.type);
  node.Output("rstd", kFloat);
  if (add) node.Output("sum", s.type);
  node.Run("npu");
}

}  // namespace
}  // namespace sfa_fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sfa_fuzz::Reader r(data, size);
  const int which = r.Byte() % 8;
  if (which < 3) sfa_fuzz::FuzzAttention(r, which);
  if (which == 3 || which == 4) sfa_fuzz::FuzzIndexer(r, which == 3);
  if (which == 5) sfa_fuzz::FuzzPack(r);
  if (which == 6) sfa_fuzz::FuzzWrite(r);
  if (which == 7) sfa_fuzz::FuzzNorm(r);
  return 0;
}
