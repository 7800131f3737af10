// sfa_onnx::KvCachePack has no GE operator of its own: it expands to built-in ones.
//
//   mode      when                     becomes
//   quantise  no `scale` input         Cast, Reshape, Abs, ReduceMax, (clip: Mul, Neg, Maximum,
//                                      Minimum,) Mul, DivNoNan, Mul, Round, Cast: int8 and scales
//   copy      `scale` is connected     nothing: int8 rows and scales are taken as they are
//   both      rope, scale -> bytes     Bitcast (bfloat16 through float32) and Reshape;
//             the row                  ConcatD of nope | rope | scales on the last axis
//
// Differs from the CPU operator where the device does: a tile with NaN/Inf, or whose 1/scale
// overflows, has the device's result instead of the defined one.
#ifndef SFA_ONNX_ASCEND_KV_CACHE_PACK_H_
#define SFA_ONNX_ASCEND_KV_CACHE_PACK_H_

#include "graph/graph.h"
#include "parse.h"

namespace sfa_onnx {

domi::Status ParseKvCachePack(const ge::Operator& source, ge::Operator& target);
domi::Status ExpandKvCachePack(const ge::Operator& node, ge::Graph& graph);

}  // namespace sfa_onnx

#endif  // SFA_ONNX_ASCEND_KV_CACHE_PACK_H_
