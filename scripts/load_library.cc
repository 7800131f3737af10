// Loads the operator library given as argument and prints the kernel path that it takes here.
#include <dlfcn.h>

#include <cstdio>

int main(int argc, char** argv) {
  void* library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr;
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  auto isa = reinterpret_cast<const char* (*)()>(dlsym(library, "sfa_core_isa"));
  if (isa == nullptr || dlsym(library, "RegisterCustomOps") == nullptr) {
    std::fprintf(stderr, "%s: a symbol is missing\n", argv[1]);
    return 1;
  }
  std::puts(isa());
  return 0;
}
