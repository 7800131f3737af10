// The indexer on every aarch64: float words, and int8 as int32.
#include "indexer_neon.h"

namespace sfa {

const IndexerPath* indexer_neon(bool int8) {
  static constexpr IndexerPath floats = indexer_table<FloatWords<4, 24, 24>>("neon");
  static constexpr IndexerPath bytes = indexer_table<IntWords<4, 24>>("neon");
  return int8 ? &bytes : &floats;
}

}  // namespace sfa
