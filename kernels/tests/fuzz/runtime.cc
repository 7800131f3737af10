#include "runtime.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

namespace sfa_fuzz {
namespace {

struct OrtEnv;
struct OrtSession;
struct OrtMemoryInfo;

// Entries of OrtApi by their index, which never changes.
class Runtime {
 public:
  Runtime() {
    const char* path = getenv("SFA_FUZZ_ONNXRUNTIME");
    void* library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (library == nullptr) {
      fprintf(stderr, "SFA_FUZZ_ONNXRUNTIME: %s\n", path ? dlerror() : "is not set");
      exit(2);
    }
    base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"))();
    table_ = reinterpret_cast<void* const*>(base->GetApi(kOrtApiFloor));
    constexpr int kFatal = 4;
    Must(Call<OrtStatus* (*)(int, const char*, OrtEnv**)>(3)(kFatal, "fuzz", &env));
    Must(Call<OrtStatus* (*)(int, int, OrtMemoryInfo**)>(69)(0, 0, &memory));
  }

  template <class F>
  F Call(int index) const {
    return reinterpret_cast<F>(table_[index]);
  }

  // The text of a status, which goes; "" of success.
  std::string Text(OrtStatus* status) const {
    if (status == nullptr) return "";
    const std::string text = Call<const char* (*)(const OrtStatus*)>(2)(status);
    Call<void (*)(OrtStatus*)>(93)(status);
    return text.empty() ? "?" : text;
  }

  void Must(OrtStatus* status) const {
    const std::string text = Text(status);
    if (text.empty()) return;
    fprintf(stderr, "%s\n", text.c_str());
    exit(2);
  }

  const OrtApiBase* base = nullptr;
  OrtEnv* env = nullptr;
  OrtMemoryInfo* memory = nullptr;

 private:
  void* const* table_ = nullptr;
};

const Runtime& TheRuntime() {
  static const Runtime* const runtime = new Runtime;
  return *runtime;
}

// Something of the runtime's, released by entry `kRelease`.
template <class T, int kRelease>
struct Owned {
  T* it = nullptr;
  Owned() = default;
  Owned(Owned&& other) noexcept : it(other.it) { other.it = nullptr; }
  ~Owned() {
    if (it != nullptr) TheRuntime().Call<void (*)(T*)>(kRelease)(it);
  }
};
using Options = Owned<OrtSessionOptions, 100>;
using Session = Owned<OrtSession, 95>;
using Value = Owned<OrtValue, 96>;

std::string Configure(Options* options, bool npu_rounding) {
  const Runtime& ort = TheRuntime();
  ort.Must(ort.Call<OrtStatus* (*)(OrtSessionOptions**)>(10)(&options->it));
  using Simple = OrtStatus* (*)(OrtSessionOptions*);
  ort.Must(ort.Call<Simple>(17)(options->it));  // no memory pattern
  ort.Must(ort.Call<Simple>(19)(options->it));  // no arena: outputs are the sanitizer's to watch
  using Number = OrtStatus* (*)(OrtSessionOptions*, int);
  ort.Must(ort.Call<Number>(22)(options->it, 4));
  ort.Must(ort.Call<Number>(24)(options->it, 1));
  if (npu_rounding) {
    using Entry = OrtStatus* (*)(OrtSessionOptions*, const char*, const char*);
    ort.Must(ort.Call<Entry>(130)(options->it, "sfa_onnx.rounding", "npu"));
    int has = 0;
    ort.Must(reinterpret_cast<const OrtApi*>(ort.base->GetApi(kOrtApiFloor))
                 ->HasSessionConfigEntry(options->it, "sfa_onnx.rounding", &has));
    if (!has) abort();
  }
  return ort.Text(RegisterCustomOps(options->it, ort.base));
}

}  // namespace

std::string OpenAndRun(const std::string& model, bool npu_rounding, std::vector<Fed>& feeds,
                       const std::vector<std::string>& outputs) {
  const Runtime& ort = TheRuntime();
  Options options;
  if (std::string refused = Configure(&options, npu_rounding); !refused.empty()) return refused;
  Session session;
  using Create =
      OrtStatus* (*)(OrtEnv*, const void*, size_t, const OrtSessionOptions*, OrtSession**);
  OrtStatus* status =
      ort.Call<Create>(8)(ort.env, model.data(), model.size(), options.it, &session.it);
  if (status != nullptr) return ort.Text(status);

  std::vector<Value> values(feeds.size()), results(outputs.size());
  std::vector<const char*> names, wanted;
  std::vector<const OrtValue*> given;
  using Wrap =
      OrtStatus* (*)(const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t, int, OrtValue**);
  for (size_t i = 0; i < feeds.size(); ++i) {
    Fed& f = feeds[i];
    status = ort.Call<Wrap>(49)(ort.memory, f.bytes.data(), f.bytes.size(), f.dims.data(),
                                f.dims.size(), f.type, &values[i].it);
    if (status != nullptr) return ort.Text(status);
    names.push_back(f.name.c_str());
    given.push_back(values[i].it);
  }
  std::vector<OrtValue*> made(outputs.size(), nullptr);
  for (const auto& name : outputs) wanted.push_back(name.c_str());
  using Run = OrtStatus* (*)(OrtSession*, const void*, const char* const*, const OrtValue* const*,
                             size_t, const char* const*, size_t, OrtValue**);
  status = ort.Call<Run>(9)(session.it, nullptr, names.data(), given.data(), given.size(),
                            wanted.data(), wanted.size(), made.data());
  for (size_t i = 0; i < made.size(); ++i) results[i].it = made[i];
  return ort.Text(status);
}

}  // namespace sfa_fuzz
