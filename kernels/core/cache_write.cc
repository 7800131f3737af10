// sfa_onnx::KvCacheWrite: new rows into a paged cache.
#include <string.h>

#include "internal.h"

namespace sfa {
namespace {

int check_write(const sfa_core_write_params& p, sfa_core_error* err) {
  const Range ranges[] = {
      {"slots", p.slots, 0, kBig},
      {"row_bytes", p.row_bytes, 1, kInt},
      {"rows", p.rows, 0, kBig},
  };
  const int status = check_ranges(ranges, sizeof(ranges) / sizeof(ranges[0]), err);
  if (status != SFA_CORE_OK) return status;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (p.slot_mapping[i] < p.slots) continue;
    set_error(err, SFA_CORE_BAD_SLOT, "slot_mapping", p.slot_mapping[i], p.slots);
    err->slot = i;
    return err->status;
  }
  return SFA_CORE_OK;
}

}  // namespace
}  // namespace sfa

extern "C" int sfa_core_cache_write(const sfa_core_write_params* params, sfa_core_error* err) {
  const sfa_core_write_params& p = *params;
  sfa::set_error(err, SFA_CORE_OK, "", 0, 0);
  if (p.struct_size != sizeof p) {
    return sfa::set_error(err, SFA_CORE_BAD_PARAM, "struct_size", p.struct_size, sizeof p);
  }
  const int status = sfa::check_write(p, err);
  if (status != SFA_CORE_OK) return status;
  char* out = (char*)p.out;
  const size_t bytes = (size_t)p.row_bytes;
  if (out != p.pages && p.slots > 0) memcpy(out, p.pages, (size_t)p.slots * bytes);
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t slot = p.slot_mapping[i];
    if (slot >= 0) memcpy(out + slot * bytes, (const char*)p.new_rows + i * bytes, bytes);
  }
  return SFA_CORE_OK;
}
