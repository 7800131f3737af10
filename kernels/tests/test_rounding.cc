// Roundings of vectors to 16 bits against the scalar ones: every upper half, lower halves around
// ties.
#define SFA_LANES 4
#include "half.h"
#include "harness.h"
#include "vec.h"

namespace sfa_test {
namespace {

constexpr uint32_t kLower[] = {0,      1,      2,      0x1fff, 0x2000, 0x2001, 0x7ffe,
                               0x7fff, 0x8000, 0x8001, 0x8002, 0xfffe, 0xffff};

bool Same(float a, float b) { return a != a ? b != b : sfa::f32_bits(a) == sfa::f32_bits(b); }

void CheckBFloat16() {
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    for (const uint32_t lower : kLower) {
      const float x = sfa::bits_f32(upper << 16 | lower);
      const float want = sfa::bf16_f32(sfa::f32_bf16(x));
      const float careful = sfa::round_bf16(sfa::splat(x))[0];
      CHECK(Same(careful, want), "%a: %a, expected %a", x, careful, want);
      if (!sfa::moderate(x)) continue;
      const float quick = sfa::round_bf16_moderate(sfa::splat(x))[0];
      CHECK(quick == want, "%a: %a, expected %a", x, quick, want);
    }
  }
}

void CheckModerateProducts() {
  for (const float scale : {0x1p-126f, 0x1.fffffep-120f, 0x1.020408p-7f, 0x1.8p0f, 0x1p100f}) {
    for (int i = -128; i < 128; ++i) {
      const float x = static_cast<float>(i) * scale, want = sfa::bf16_f32(sfa::f32_bf16(x));
      const float quick = sfa::round_bf16_moderate(sfa::splat(x))[0];
      CHECK(quick == want, "%d * %a: %a, expected %a", i, scale, quick, want);
    }
  }
  for (const float scale : {0x1p-127f, 0x1.8p100f, HUGE_VALF, NAN}) {
    CHECK(!sfa::moderate(scale) && !sfa::moderate(-scale), "%a", scale);
  }
  CHECK(sfa::moderate(0) && sfa::moderate(-1), "zero and negative scales are moderate");
}

}  // namespace
}  // namespace sfa_test

int main() {
  sfa_test::CheckBFloat16();
  sfa_test::CheckModerateProducts();
  return sfa_test::g_failures ? 1 : 0;
}
