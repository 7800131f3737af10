// sfa_onnx::KvCacheWrite has no GE operator of its own: it expands to built-in ones that write in
// place.
//
//   pages         Reshape to [block_num * block_size, 1, D]
//   slot_mapping  Reshape to [n, 1]
//   the write     ScatterNdUpdate(var = flat pages, indices, updates = rows)
//   the result    Reshape to the pages' shape
//
// Never TensorMove, never TensorScatterUpdate: those copy the whole cache. ScatterNdUpdate takes
// indices from 0 on only, so `sfa-onnx atc` replaces padding in front of the node; which of two
// rows for one slot stays is not documented. ScatterPaKvCache would write a key and a value cache;
// for one cache alone its GE prototype has no form.
#ifndef SFA_ONNX_ASCEND_KV_CACHE_WRITE_H_
#define SFA_ONNX_ASCEND_KV_CACHE_WRITE_H_

#include "graph/graph.h"
#include "parse.h"

namespace sfa_onnx {

domi::Status ParseKvCacheWrite(const ge::Operator& source, ge::Operator& target);
domi::Status ExpandKvCacheWrite(const ge::Operator& node, ge::Graph& graph);

}  // namespace sfa_onnx

#endif  // SFA_ONNX_ASCEND_KV_CACHE_WRITE_H_
