// NEON bf16.
#include "internal.h"

namespace sfa {

const Path* neon_bf16_path() { return nullptr; }

}  // namespace sfa
