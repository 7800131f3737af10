// Test double of GE's builder: says on stdout what it was asked, writes a file for the model, and
// fails in the step that DOUBLE_FAILS names.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ge/ge_ir_build.h"
#include "parser/onnx_parser.h"

namespace ge {
namespace {
graphStatus Done(const char* step) {
  const char* failing = std::getenv("DOUBLE_FAILS");
  return failing != nullptr && std::strcmp(failing, step) == 0 ? GRAPH_FAILED : GRAPH_SUCCESS;
}
void Tell(const char* what, const std::map<AscendString, AscendString>& options) {
  for (const auto& option : options) {
    std::printf("%s %s=%s\n", what, option.first.GetString(), option.second.GetString());
  }
}
}  // namespace

AscendString::AscendString(const char_t* const name) : name_(new std::string(name)) {}
const char_t* AscendString::GetString() const { return name_ ? name_->c_str() : ""; }
bool AscendString::operator<(const AscendString& other) const {
  return std::strcmp(GetString(), other.GetString()) < 0;
}

graphStatus aclgrphBuildInitialize(std::map<AscendString, AscendString>& global_options) {
  Tell("global", global_options);
  return Done("initialize");
}
void aclgrphBuildFinalize() { std::puts("finalize"); }
graphStatus aclgrphParseONNX(const char* model_file, const std::map<AscendString, AscendString>&,
                             Graph&) {
  std::printf("parse %s\n", model_file);
  return Done("parse");
}
graphStatus aclgrphBuildModel(const Graph&, const std::map<AscendString, AscendString>& options,
                              ModelBufferData& model) {
  Tell("build", options);
  model.length = 4;
  return Done("build");
}
graphStatus aclgrphSaveModel(const char_t* output_file, const ModelBufferData&) {
  std::FILE* file = std::fopen((std::string(output_file) + ".om").c_str(), "wb");
  if (file == nullptr) return GRAPH_FAILED;
  std::fputs("om", file);
  std::fclose(file);
  return Done("save");
}
}  // namespace ge
