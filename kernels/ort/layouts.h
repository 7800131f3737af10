// The layout attributes, under the names that the ops give them.
#ifndef SFA_ONNX_KERNELS_ORT_LAYOUTS_H_
#define SFA_ONNX_KERNELS_ORT_LAYOUTS_H_

#include "attributes.h"
#include "sfa_core.h"

namespace sfa {

// Positions are sfa_core_layout.
constexpr const char* kLayouts[] = {"BSND", "TND", "PA_BSND", nullptr};
constexpr const char* kQueryLayouts[] = {"BSND", "TND", nullptr};

// layout_query and the attribute `key_name`.
inline bool ReadLayouts(AttributeReader* read, const char* key_name, int* query, int* key,
                        Message* error) {
  if (!read->Choice("layout_query", kQueryLayouts, query)) return false;
  if (!read->Choice(key_name, kLayouts, key)) return false;
  if (*key == SFA_CORE_PA_BSND || *key == *query) return true;
  return error->Add("attribute %s: expected PA_BSND or layout_query's %s, got %s", key_name,
                    kLayouts[*query], kLayouts[*key]);
}

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_LAYOUTS_H_
