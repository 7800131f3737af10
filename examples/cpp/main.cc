// Runs one decode step of two models on the same inputs and prints how far their outputs differ.
//
//   decode LIBRARY ORIGINAL.onnx FUSED.onnx [PAST]
//
// LIBRARY is what `sfa-onnx doctor --library` prints. The models are those of the demo
// (`sfa-onnx demo -o tour`): float16 tensors and an int64 position; open sizes are taken as 1 for
// the batch and PAST (2047) for everything else.
#include <onnxruntime_c_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

const OrtApi* ort = nullptr;

// A status that is not null is an error: what onnxruntime says, and the end.
void Check(OrtStatus* status) {
  if (status == nullptr) return;
  std::fprintf(stderr, "onnxruntime: %s\n", ort->GetErrorMessage(status));
  ort->ReleaseStatus(status);
  std::exit(1);
}

// Bytes of one element of the types that the demo's models have; 0 for all others.
size_t ElementBytes(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return 2;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return 8;
    default:
      return 0;
  }
}

float FromHalf(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const float sign = (bits & 0x8000) != 0 ? -1.0F : 1.0F;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

// Type and sizes of one input; open sizes as the head of this file says.
struct Input {
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> dims;
  std::vector<uint8_t> bytes;
};

Input Describe(OrtSession* session, OrtAllocator* allocator, size_t index, int64_t past) {
  char* name = nullptr;
  Check(ort->SessionGetInputName(session, index, allocator, &name));
  OrtTypeInfo* info = nullptr;
  Check(ort->SessionGetInputTypeInfo(session, index, &info));
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  Check(ort->CastTypeInfoToTensorInfo(info, &tensor));
  Input input{name, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}, {}};
  Check(ort->GetTensorElementType(tensor, &input.type));
  size_t rank = 0;
  Check(ort->GetDimensionsCount(tensor, &rank));
  input.dims.resize(rank);
  Check(ort->GetDimensions(tensor, input.dims.data(), rank));
  for (size_t axis = 0; axis < rank; ++axis) {
    if (input.dims[axis] < 0) input.dims[axis] = axis == 0 ? 1 : past;
  }
  ort->ReleaseTypeInfo(info);
  Check(ort->AllocatorFree(allocator, name));
  return input;
}

// Fills the input: the position with PAST, everything else with numbers between 1/32 and 1, of
// both signs, which depend on nothing but the input's name.
void Fill(Input* input, int64_t past) {
  size_t count = 1;
  for (const int64_t dim : input->dims) count *= static_cast<size_t>(dim);
  const size_t width = ElementBytes(input->type);
  if (width == 0) {
    std::fprintf(stderr, "input %s: expected float16, float or int64\n", input->name.c_str());
    std::exit(1);
  }
  input->bytes.resize(count * width);
  uint32_t state = 2463534242U;
  for (const char letter : input->name) state = state * 31U + static_cast<uint8_t>(letter);
  for (size_t i = 0; i < count; ++i) {
    state = state * 1664525U + 1013904223U;
    const auto half = static_cast<uint16_t>(((state >> 16) & 0x83FFU) |
                                            ((10U + ((state >> 8) & 0xFFU) % 5U) << 10));
    const float value = FromHalf(half);
    uint8_t* to = input->bytes.data() + i * width;
    if (input->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) std::memcpy(to, &past, width);
    if (input->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) std::memcpy(to, &half, width);
    if (input->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) std::memcpy(to, &value, width);
  }
}

// The elements of an output as float; empty when it is of another type.
std::vector<float> Elements(OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(ort->GetTensorTypeAndShape(value, &info));
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  size_t count = 0;
  Check(ort->GetTensorElementType(info, &type));
  Check(ort->GetTensorShapeElementCount(info, &count));
  ort->ReleaseTensorTypeAndShapeInfo(info);
  void* data = nullptr;
  Check(ort->GetTensorMutableData(value, &data));
  std::vector<float> out;
  for (size_t i = 0; i < count; ++i) {
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
      out.push_back(FromHalf(static_cast<uint16_t*>(data)[i]));
    } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      out.push_back(static_cast<float*>(data)[i]);
    }
  }
  return out;
}

// One run of the model: its outputs by name.
std::map<std::string, std::vector<float>> Run(OrtEnv* env, const char* library, const char* model,
                                              int64_t past) {
  OrtSessionOptions* options = nullptr;
  Check(ort->CreateSessionOptions(&options));
  // The one line that makes the operators known. The handle of the library is onnxruntime's own.
  Check(ort->RegisterCustomOpsLibrary_V2(options, library));
  OrtSession* session = nullptr;
  Check(ort->CreateSession(env, model, options, &session));
  OrtAllocator* allocator = nullptr;
  Check(ort->GetAllocatorWithDefaultOptions(&allocator));
  OrtMemoryInfo* memory = nullptr;
  Check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));

  size_t inputs = 0, outputs = 0;
  Check(ort->SessionGetInputCount(session, &inputs));
  Check(ort->SessionGetOutputCount(session, &outputs));
  std::vector<Input> fed;
  for (size_t i = 0; i < inputs; ++i) fed.push_back(Describe(session, allocator, i, past));
  std::vector<const char*> in_names;
  std::vector<OrtValue*> in_values;
  for (Input& input : fed) {
    Fill(&input, past);
    OrtValue* value = nullptr;
    Check(ort->CreateTensorWithDataAsOrtValue(memory, input.bytes.data(), input.bytes.size(),
                                              input.dims.data(), input.dims.size(), input.type,
                                              &value));
    in_names.push_back(input.name.c_str());
    in_values.push_back(value);
  }
  std::vector<char*> out_names(outputs, nullptr);
  for (size_t i = 0; i < outputs; ++i) {
    Check(ort->SessionGetOutputName(session, i, allocator, &out_names[i]));
  }
  std::vector<OrtValue*> out_values(outputs, nullptr);
  Check(ort->Run(session, nullptr, in_names.data(), in_values.data(), inputs, out_names.data(),
                 outputs, out_values.data()));

  std::map<std::string, std::vector<float>> result;
  for (size_t i = 0; i < outputs; ++i) {
    result[out_names[i]] = Elements(out_values[i]);
    ort->ReleaseValue(out_values[i]);
    Check(ort->AllocatorFree(allocator, out_names[i]));
  }
  for (OrtValue* value : in_values) ort->ReleaseValue(value);
  ort->ReleaseMemoryInfo(memory);
  ort->ReleaseSession(session);
  ort->ReleaseSessionOptions(options);
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: decode LIBRARY ORIGINAL.onnx FUSED.onnx [PAST]\n");
    return 2;
  }
  const int64_t past = argc > 4 ? std::atoll(argv[4]) : 2047;
  const OrtApiBase* base = OrtGetApiBase();
  ort = base->GetApi(ORT_API_VERSION);
  if (ort == nullptr) {
    std::fprintf(stderr, "onnxruntime %s is older than the header this was built with (%d)\n",
                 base->GetVersionString(), ORT_API_VERSION);
    return 1;
  }
  std::printf("onnxruntime %s\n", base->GetVersionString());
  OrtEnv* env = nullptr;
  Check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "decode", &env));
  const auto before = Run(env, argv[1], argv[2], past);
  const auto after = Run(env, argv[1], argv[3], past);
  ort->ReleaseEnv(env);

  bool same = true;
  for (const auto& [name, expected] : before) {
    const auto found = after.find(name);
    if (found == after.end() || found->second.size() != expected.size()) {
      std::printf("%-12s missing, or of another size\n", name.c_str());
      same = false;
      continue;
    }
    float difference = 0, scale = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      difference = std::fmax(difference, std::fabs(expected[i] - found->second[i]));
      scale = std::fmax(scale, std::fabs(expected[i]));
    }
    std::printf("%-12s %8zu elements, largest %.4g, largest difference %.2g\n", name.c_str(),
                expected.size(), scale, difference);
    same = same && difference <= 2e-3F * scale;  // two steps of float16
  }
  std::puts(same ? "the fused model gives the same" : "the models differ");
  return same ? 0 : 3;
}
