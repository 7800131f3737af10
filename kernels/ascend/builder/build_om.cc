// Parses an ONNX file and builds an .om through GE's own interface, with options that the atc
// command cannot set. Compiled by build_om.py against the CANN toolkit of the machine it runs on.
//
//   build_om MODEL.onnx OUTPUT [global:KEY VALUE | build:KEY VALUE]...
#include <cstdio>
#include <map>
#include <string>

#include "ge/ge_ir_build.h"
#include "graph/graph.h"
#include "parser/onnx_parser.h"

namespace {

using Options = std::map<ge::AscendString, ge::AscendString>;

bool Failed(const char* step, ge::graphStatus status) {
  if (status == ge::GRAPH_SUCCESS) return false;
  std::fprintf(stderr, "build_om: %s failed with status %u; CANN's log says why\n", step,
               static_cast<unsigned>(status));
  return true;
}

bool Read(int argc, char** argv, Options* global, Options* build) {
  for (int i = 3; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const bool is_global = name.rfind("global:", 0) == 0;
    if (!is_global && name.rfind("build:", 0) != 0) return false;
    const std::string key = name.substr(name.find(':') + 1);
    (is_global ? global : build)->emplace(key.c_str(), argv[i + 1]);
  }
  return argc % 2 == 1;
}

int Build(const char* model, const char* output, const Options& build) {
  ge::Graph graph;
  if (Failed("parsing the model", ge::aclgrphParseONNX(model, {}, graph))) return 1;
  ge::ModelBufferData data;
  if (Failed("building the model", ge::aclgrphBuildModel(graph, build, data))) return 1;
  if (Failed("saving the model", ge::aclgrphSaveModel(output, data))) return 1;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options global, build;
  if (argc < 3 || !Read(argc, argv, &global, &build)) {
    std::fprintf(stderr, "usage: build_om MODEL OUTPUT [global:KEY VALUE | build:KEY VALUE]...\n");
    return 2;
  }
  if (Failed("aclgrphBuildInitialize", ge::aclgrphBuildInitialize(global))) return 1;
  const int code = Build(argv[1], argv[2], build);
  ge::aclgrphBuildFinalize();
  return code;
}
