// AVX512-BF16.
#include "internal.h"

namespace sfa {

const Path* avx512_bf16_path() { return nullptr; }

}  // namespace sfa
