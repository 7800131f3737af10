// The ops' faces towards the runtime, and the one symbol that it looks up.
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "indexer.h"
#include "kv_cache_pack.h"
#include "kv_cache_write.h"
#include "message.h"
#include "ort_abi.h"
#include "rms_norm.h"
#include "shape_inference.h"

namespace sfa {
namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kBFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
constexpr auto kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;

// Shape functions get no table; the runtime's is the same for the whole process.
const OrtApi* g_api = nullptr;

// One op for one choice of element types. The runtime merges entries of one name into one schema.
struct Op : OrtCustomOp {
  const char* name;
  AttentionOp attention;
  IndexerOp indexer;
  ONNXTensorElementDataType first;   // query | query and key | nope
  ONNXTensorElementDataType second;  // key and value | weights | rope
  int rounding;                      // sfa_core_rounding
};

const Op& Self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

const char* Name(const OrtCustomOp* op) { return Self(op).name; }
const char* Provider(const OrtCustomOp*) { return "CPUExecutionProvider"; }
size_t One(const OrtCustomOp*) { return 1; }
OrtCustomOpInputOutputCharacteristic Required(const OrtCustomOp*, size_t) {
  return INPUT_OUTPUT_REQUIRED;
}
OrtMemType DefaultMemory(const OrtCustomOp*, size_t) { return OrtMemTypeDefault; }
int NoVariadic(const OrtCustomOp*) { return 0; }
int FirstVersion(const OrtCustomOp*) { return 1; }
int LastVersion(const OrtCustomOp*) { return INT32_MAX; }

// ---- attention ----

size_t AttentionInputCount(const OrtCustomOp*) { return kAttentionInputs; }

ONNXTensorElementDataType AttentionInputType(const OrtCustomOp* op, size_t index) {
  switch (InputsOf(Self(op).attention)[index]) {
    case kQuery:
    case kQueryRope:
      return Self(op).first;
    case kKey:
    case kValue:
    case kKeyRope:
      return Self(op).second;
    case kKeyScale:
    case kValueScale:
    case kSinks:
      return kFloat;
    default:
      return kInt32;
  }
}

OrtCustomOpInputOutputCharacteristic AttentionInputKind(const OrtCustomOp*, size_t index) {
  return index < 4 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

size_t FloatOutputCount(const OrtCustomOp*) { return kFloatOutputs; }

ONNXTensorElementDataType AttentionOutputType(const OrtCustomOp* op, size_t index) {
  return index == 0 ? Self(op).first : kFloat;
}

OrtCustomOpInputOutputCharacteristic AttentionOutputKind(const OrtCustomOp*, size_t index) {
  return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

OrtStatusPtr NewAttention(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                          void** kernel) {
  return CreateAttention(api, info, Self(op).attention, Self(op).rounding, kernel);
}

OrtStatusPtr AttentionShape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  return InferAttention(g_api, context, Self(op).attention);
}

// ---- the indexers ----

size_t IndexerInputCount(const OrtCustomOp* op) { return IndexerInputs(Self(op).indexer); }

ONNXTensorElementDataType IndexerInputType(const OrtCustomOp* op, size_t index) {
  switch (IndexerRoleOf(Self(op).indexer, index)) {
    case kIndexQuery:
    case kIndexKey:
      return Self(op).first;
    case kIndexWeights:
      return Self(op).second;
    case kIndexQueryScale:
    case kIndexKeyScale:
      return kHalf;
    default:
      return kInt32;
  }
}

OrtCustomOpInputOutputCharacteristic IndexerInputKind(const OrtCustomOp* op, size_t index) {
  return IndexerRoleOf(Self(op).indexer, index) < kIndexLengthsQuery ? INPUT_OUTPUT_REQUIRED
                                                                     : INPUT_OUTPUT_OPTIONAL;
}

size_t IndexerOutputCount(const OrtCustomOp* op) {
  return Self(op).indexer == IndexerOp::kFloat ? 2 : 1;
}

ONNXTensorElementDataType IndexerOutputType(const OrtCustomOp* op, size_t index) {
  return index == 0 ? kInt32 : Self(op).first;
}

OrtCustomOpInputOutputCharacteristic IndexerOutputKind(const OrtCustomOp*, size_t index) {
  return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

OrtStatusPtr NewIndexer(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                        void** kernel) {
  return CreateIndexer(api, info, Self(op).indexer, Self(op).rounding, kernel);
}

OrtStatusPtr IndexerShape(const OrtCustomOp*, OrtShapeInferContext* context) {
  return InferIndexer(g_api, context);
}

// ---- KvCachePack ----

size_t PackInputCount(const OrtCustomOp*) { return kPackInputs; }

ONNXTensorElementDataType PackInputType(const OrtCustomOp* op, size_t index) {
  return index == kNope ? Self(op).first : index == kRope ? Self(op).second : kFloat;
}

OrtCustomOpInputOutputCharacteristic PackInputKind(const OrtCustomOp*, size_t index) {
  return index == kNope ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

ONNXTensorElementDataType PackOutputType(const OrtCustomOp*, size_t) { return kInt8; }

OrtStatusPtr NewPack(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info,
                     void** kernel) {
  return CreatePack(api, info, kernel);
}

OrtStatusPtr PackShape(const OrtCustomOp*, OrtShapeInferContext* context) {
  return InferPack(g_api, context);
}

// ---- the tables ----

constexpr Op Common(const char* name, ONNXTensorElementDataType first,
                    ONNXTensorElementDataType second) {
  Op op{};
  op.version = kOrtApiFloor;
  op.name = name;
  op.first = first;
  op.second = second;
  op.GetName = Name;
  op.GetExecutionProviderType = Provider;
  op.GetOutputTypeCount = One;
  op.GetOutputCharacteristic = Required;
  op.GetInputMemoryType = DefaultMemory;
  op.GetVariadicInputMinArity = NoVariadic;
  op.GetVariadicInputHomogeneity = NoVariadic;
  op.GetVariadicOutputMinArity = NoVariadic;
  op.GetVariadicOutputHomogeneity = NoVariadic;
  op.GetStartVersion = FirstVersion;
  op.GetEndVersion = LastVersion;
  return op;
}

constexpr Op Attention(AttentionOp which, ONNXTensorElementDataType type, bool infer_shapes,
                       int rounding) {
  const bool floats = which == AttentionOp::kFloatCache;
  Op op = Common(NameOf(which), type, floats ? type : kInt8);
  op.attention = which;
  op.rounding = rounding;
  if (floats) op.GetOutputTypeCount = FloatOutputCount;
  op.GetOutputCharacteristic = AttentionOutputKind;
  op.GetInputType = AttentionInputType;
  op.GetInputTypeCount = AttentionInputCount;
  op.GetInputCharacteristic = AttentionInputKind;
  op.GetOutputType = AttentionOutputType;
  op.CreateKernelV2 = NewAttention;
  op.KernelComputeV2 = ComputeAttention;
  op.KernelDestroy = DestroyAttention;
  op.InferOutputShapeFn = infer_shapes ? AttentionShape : nullptr;
  return op;
}

constexpr Op Indexer(IndexerOp which, ONNXTensorElementDataType type,
                     ONNXTensorElementDataType weights, bool infer_shapes, int rounding) {
  Op op = Common(NameOf(which), type, weights);
  op.indexer = which;
  op.rounding = rounding;
  op.GetInputType = IndexerInputType;
  op.GetInputTypeCount = IndexerInputCount;
  op.GetInputCharacteristic = IndexerInputKind;
  op.GetOutputType = IndexerOutputType;
  op.GetOutputTypeCount = IndexerOutputCount;
  op.GetOutputCharacteristic = IndexerOutputKind;
  op.CreateKernelV2 = NewIndexer;
  op.KernelComputeV2 = ComputeIndexer;
  op.KernelDestroy = DestroyIndexer;
  op.InferOutputShapeFn = infer_shapes ? IndexerShape : nullptr;
  return op;
}

constexpr Op Pack(ONNXTensorElementDataType nope, ONNXTensorElementDataType rope,
                  bool infer_shapes) {
  Op op = Common(kPackName, nope, rope);
  op.GetInputType = PackInputType;
  op.GetInputTypeCount = PackInputCount;
  op.GetInputCharacteristic = PackInputKind;
  op.GetOutputType = PackOutputType;
  op.CreateKernelV2 = NewPack;
  op.KernelComputeV2 = ComputePack;
  op.KernelDestroy = DestroyPack;
  op.InferOutputShapeFn = infer_shapes ? PackShape : nullptr;
  return op;
}

constexpr ONNXTensorElementDataType kFloats[] = {kFloat, kHalf, kBFloat16};
constexpr ONNXTensorElementDataType kNopeTypes[] = {kFloat, kHalf, kBFloat16, kInt8};
constexpr int kAttentionOps = 9, kIndexerOps = 10, kPackOps = 12;

struct Table {
  Op npu[kAttentionOps + kIndexerOps];
  Op pack[kPackOps];
};

constexpr Table MakeTable(bool infer_shapes, int rounding) {
  Table table{};
  for (int t = 0; t < 3; ++t) {
    Op* row = &table.npu[3 * t];
    row[0] = Attention(AttentionOp::kAntiquant, kFloats[t], infer_shapes, rounding);
    row[1] = Attention(AttentionOp::kKvQuant, kFloats[t], infer_shapes, rounding);
    row[2] = Attention(AttentionOp::kFloatCache, kFloats[t], infer_shapes, rounding);
  }
  Op* indexers = table.npu + kAttentionOps;
  indexers[9] = Indexer(IndexerOp::kQuant, kInt8, kHalf, infer_shapes, rounding);
  for (int i = 0; i < 9; ++i) {
    indexers[i] =
        Indexer(IndexerOp::kFloat, kFloats[i / 3], kFloats[i % 3], infer_shapes, rounding);
  }
  for (int i = 0; i < kPackOps; ++i) {
    table.pack[i] = Pack(kNopeTypes[i / 3], kFloats[i % 3], infer_shapes);
  }
  return table;
}

// [infer shapes][rounding]
constexpr Table kTables[2][2] = {
    {MakeTable(false, SFA_CORE_ROUNDING_EXACT), MakeTable(false, SFA_CORE_ROUNDING_NPU)},
    {MakeTable(true, SFA_CORE_ROUNDING_EXACT), MakeTable(true, SFA_CORE_ROUNDING_NPU)},
};

// How the session's attention rounds: its config entry `sfa_onnx.rounding`, exact | npu.
constexpr const char* kRoundingKey = "sfa_onnx.rounding";

OrtStatus* ReadRounding(const OrtApi* api, const OrtSessionOptions* options, int* rounding) {
  *rounding = SFA_CORE_ROUNDING_EXACT;
  int has = 0;
  SFA_ORT_TRY(api->HasSessionConfigEntry(options, kRoundingKey, &has));
  if (!has) return nullptr;
  char value[32] = {};
  size_t size = 0;
  SFA_ORT_TRY(api->GetSessionConfigEntry(options, kRoundingKey, nullptr, &size));
  if (size <= sizeof value) {
    SFA_ORT_TRY(api->GetSessionConfigEntry(options, kRoundingKey, value, &size));
  }
  if (strcmp(value, "npu") == 0) *rounding = SFA_CORE_ROUNDING_NPU;
  if (*rounding == SFA_CORE_ROUNDING_NPU || strcmp(value, "exact") == 0) return nullptr;
  Message m;
  m.Add("session config entry %s: expected exact or npu, got '%s'", kRoundingKey, value);
  return api->CreateStatus(ORT_INVALID_ARGUMENT, m.text());
}

// Whether `version` is 1.`minor` or newer.
bool AtLeast(const char* version, long minor) {
  char* end = nullptr;
  const long major = strtol(version, &end, 10);
  return major > 1 || (major == 1 && *end == '.' && strtol(end + 1, nullptr, 10) >= minor);
}

// Runtimes 1.17 to 1.23 crash at session load when an op with a shape function has an input left
// out in the middle, and ours always has.
bool ShapeInferenceIsSafe(const char* version) { return AtLeast(version, 24); }

struct Registration {
  const OrtApi* api;
  OrtSessionOptions* options;
  const Table& ops;
  bool in_place;  // the runtime asks which outputs may lie in an input's memory
};

OrtStatus* AddAttention(const Registration& r, OrtCustomOpDomain* domain) {
  for (const Op& op : r.ops.npu) SFA_ORT_TRY(r.api->CustomOpDomain_Add(domain, &op));
  return AddRmsNorms(r.api, domain);
}

OrtStatus* AddCaches(const Registration& r, OrtCustomOpDomain* domain) {
  for (const Op& op : r.ops.pack) SFA_ORT_TRY(r.api->CustomOpDomain_Add(domain, &op));
  return AddKvCacheWrite(r.api, domain, r.in_place);
}

constexpr const char* kDomains[] = {"npu", "sfa_onnx", ""};

OrtStatus* MakeDomain(const Registration& r, int which, OrtCustomOpDomain** domain) {
  // Files for ATC have one opset import only: the same node types in ONNX's own domain. The price:
  // a model whose opset is newer than the runtime is refused for its first unknown node rather than
  // for its opset.
  SFA_ORT_TRY(r.api->CreateCustomOpDomain(kDomains[which], domain));
  if (which != 1) SFA_ORT_TRY(AddAttention(r, *domain));
  return which != 0 ? AddCaches(r, *domain) : nullptr;
}

// The domains of the runtime that came first, by rounding; they serve all its sessions. They are
// never released: sessions keep pointers into them, and the session options that could tell us when
// the last one goes do not. No lock, which a fork could leave taken: who is late drops its own.
OrtStatus* SharedDomain(const Registration& r, int rounding, int which,
                        OrtCustomOpDomain** domain) {
  static const OrtApi* first = nullptr;
  static OrtCustomOpDomain* shared[2][3] = {};
  const OrtApi* none = nullptr;
  __atomic_compare_exchange_n(&first, &none, r.api, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  if (__atomic_load_n(&first, __ATOMIC_ACQUIRE) != r.api) return MakeDomain(r, which, domain);
  OrtCustomOpDomain** place = &shared[rounding][which];
  *domain = __atomic_load_n(place, __ATOMIC_ACQUIRE);
  if (*domain != nullptr) return nullptr;
  SFA_ORT_TRY(MakeDomain(r, which, domain));
  OrtCustomOpDomain* other = nullptr;
  if (!__atomic_compare_exchange_n(place, &other, *domain, false, __ATOMIC_ACQ_REL,
                                   __ATOMIC_ACQUIRE)) {
    *domain = other;
  }
  return nullptr;
}

OrtStatus* TooOld(const OrtApiBase* base, const char* version) {
  const OrtApi* oldest = base->GetApi(1);  // makes the status; every runtime has it
  if (oldest == nullptr) abort();
  Message m;
  m.Add("sfa_onnx needs onnxruntime 1.%u or newer, this is %s: pip install -U onnxruntime",
        kOrtApiFloor, version);
  return oldest->CreateStatus(ORT_NOT_IMPLEMENTED, m.text());
}

}  // namespace
}  // namespace sfa

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  const char* version = base->GetVersionString();
  const OrtApi* api = base->GetApi(kOrtApiFloor);
  if (api == nullptr) return sfa::TooOld(base, version);
  __atomic_store_n(&sfa::g_api, api, __ATOMIC_RELEASE);
  int rounding = 0;
  SFA_ORT_TRY(sfa::ReadRounding(api, options, &rounding));
  const sfa::Registration r = {api, options,
                               sfa::kTables[sfa::ShapeInferenceIsSafe(version)][rounding],
                               sfa::AtLeast(version, 18)};
  for (int which = 0; which < 3; ++which) {
    OrtCustomOpDomain* domain = nullptr;
    SFA_ORT_TRY(sfa::SharedDomain(r, rounding, which, &domain));
    SFA_ORT_TRY(api->AddCustomOpDomain(options, domain));
  }
  return nullptr;
}
