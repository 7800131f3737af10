// The table of known forms of one operator name, and the call of one of them.
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "describe.h"

namespace sfa_torch {
namespace {

constexpr size_t kSlots = 1024, kKept = 512;  // a call whose shapes grow is a new form each time

struct Entry {
  uint64_t hash;
  size_t size;
  sfa_torch_form form;
  char key[];  // [size]
};

struct Kernel {
  size_t count;
  Entry* slots[kSlots];  // open addressing; null: free
};

// Of the first kernel: all have the same functions, and a capsule's destructor gets nothing else.
sfa_torch_api g_api;

uint64_t hash_of(const char* bytes, size_t size) {
  uint64_t hash = 14695981039346656037u;
  for (; size >= 8; bytes += 8, size -= 8) {
    uint64_t word;
    memcpy(&word, bytes, 8);
    hash = (hash ^ word) * 1099511628211u;
    hash ^= hash >> 29;
  }
  for (size_t i = 0; i < size; ++i) hash = (hash ^ (uint8_t)bytes[i]) * 1099511628211u;
  return hash ^ (hash >> 32);
}

// The slot that has this description, or the free one where it belongs.
Entry** find(Kernel* k, uint64_t hash, const char* key, size_t size) {
  for (size_t at = hash % kSlots;; at = (at + 1) % kSlots) {
    Entry* e = k->slots[at];
    if (e == nullptr || (e->hash == hash && e->size == size && memcmp(e->key, key, size) == 0))
      return &k->slots[at];
  }
}

void forget(Kernel* k) {
  for (Entry*& e : k->slots) {
    free(e);
    e = nullptr;
  }
  k->count = 0;
}

void destroy(sfa_py* capsule) {
  Kernel* k = (Kernel*)g_api.PyCapsule_GetPointer(capsule, nullptr);
  if (k == nullptr) return;
  forget(k);
  free(k);
}

Kernel* kernel_of(sfa_py* self) {
  return (Kernel*)g_api.PyCapsule_GetPointer(g_api.PyTuple_GetItem(self, 0), nullptr);
}

void adopt(const sfa_torch_api& api) {
  if (g_api.struct_size != 0) return;
  for (sfa_py* held :
       {api.none, api.true_, api.int_, api.float_, api.str, api.bool_, api.tensor, api.parameter,
        api.cdata, api.requires_grad, api.forward, api.level, api.wrap})
    api.Py_IncRef(held);
  g_api = api;
}

// Results of a call, as handles until they become Python's.
struct Made {
  sfa_tensor tensor[SFA_TORCH_RESULTS];
  int count = 0;
};

void drop(const sfa_torch_api& api, Made* made) {
  for (; made->count > 0; --made->count)
    api.aoti_torch_delete_tensor_object(made->tensor[made->count - 1]);
}

int64_t elements(const sfa_torch_result& r) {
  int64_t n = 1;
  for (int i = 0; i < r.rank; ++i) n *= r.sizes[i];
  return n;
}

bool make(const sfa_torch_api& api, const sfa_torch_result& r, char* block, Made* made) {
  int64_t strides[SFA_TORCH_RANK], step = 1;
  for (int i = r.rank - 1; i >= 0; --i) {
    strides[i] = step;
    step *= r.sizes[i] > 1 ? r.sizes[i] : 1;
  }
  sfa_tensor* tensor = &made->tensor[made->count];
  if (api.aoti_torch_empty_strided(r.rank, r.sizes, strides, r.dtype, api.cpu, 0, tensor) != 0)
    return false;
  ++made->count;
  void* data = nullptr;
  if (api.aoti_torch_get_data_ptr(*tensor, &data) != 0) return false;
  const size_t bytes = (size_t)(elements(r) * r.itemsize);
  if (r.zeroed && bytes > 0) memset(data, 0, bytes);
  if (r.field >= 0) memcpy(block + r.field, &data, sizeof data);
  return true;
}

int call_core(const sfa_torch_form& form, int32_t threads) {
  sfa_core_error error;
  switch (form.kind) {
    case SFA_TORCH_ATTENTION:
      return sfa_core_run_threads(&form.block.attention, threads, &error);
    case SFA_TORCH_INDEXER:
      return sfa_core_indexer_run_threads(&form.block.indexer, threads, &error);
    default:
      return sfa_core_pack(&form.block.pack, 0, form.block.pack.rows, &error);
  }
}

bool compute(const sfa_torch_api& api, const sfa_torch_form& form) {
  if (elements(form.result[0]) == 0) return true;
  uint32_t threads = 1;
  if (api.torch_get_num_threads(&threads) != 0) return false;
  void* state = api.PyEval_SaveThread();
  const int status = call_core(form, (int32_t)threads);
  api.PyEval_RestoreThread(state);
  return status == SFA_CORE_OK;
}

// A Python tensor of the one behind a handle.
sfa_py* wrap(const sfa_torch_api& api, sfa_tensor tensor) {
  sfa_py* capsule = api.PyCapsule_New(tensor, nullptr, nullptr);
  if (capsule == nullptr) return nullptr;
  sfa_py* made = api.PyObject_CallFunctionObjArgs(api.wrap, capsule, nullptr);
  api.Py_DecRef(capsule);
  return made;
}

// Null with a Python error set, should torch have none to give.
sfa_py* wrap_all(const sfa_torch_api& api, const Made& made) {
  sfa_py* results = api.PyTuple_New(made.count);
  for (int i = 0; results != nullptr && i < made.count; ++i) {
    sfa_py* tensor = wrap(api, made.tensor[i]);
    if (tensor != nullptr) {
      api.PyTuple_SetItem(results, i, tensor);
    } else {
      api.Py_DecRef(results);
      results = nullptr;
    }
  }
  return results;
}

// The call of a known form; null without a Python error: it has to be done in Python, which finds
// the words for what the core refuses.
sfa_py* run(const sfa_torch_api& api, const Description& d, const sfa_torch_form& known) {
  sfa_torch_form form = known;  // the table may change while the core runs
  char* block = (char*)&form.block;
  for (int i = 0; i < form.inputs; ++i)
    memcpy(block + form.field[i], &d.address[form.place[i]], sizeof(void*));
  Made made;
  bool good = true;
  for (int i = 0; good && i < form.results; ++i) good = make(api, form.result[i], block, &made);
  sfa_py* results = nullptr;
  if (good && compute(api, form))
    results = form.single ? wrap(api, made.tensor[0]) : wrap_all(api, made);
  drop(api, &made);
  return results;
}

sfa_py* call_slow(const sfa_torch_api& api, sfa_py* self, const Description* d, sfa_py* setting,
                  sfa_py* args, sfa_py* kwargs) {
  sfa_py* key = api.none;
  if (d != nullptr) {
    key = api.PyBytes_FromStringAndSize(d->bytes, (ptrdiff_t)d->size);
    if (key == nullptr) return nullptr;
  }
  sfa_py* done = api.PyObject_CallFunctionObjArgs(api.PyTuple_GetItem(self, 1), key, setting, args,
                                                  kwargs == nullptr ? api.none : kwargs, nullptr);
  if (d != nullptr) api.Py_DecRef(key);
  return done;
}

sfa_py* answer(const sfa_torch_api& api, sfa_py* self, sfa_py* args, sfa_py* kwargs) {
  Kernel* k = kernel_of(self);
  sfa_py* setting = api.PyTuple_GetItem(self, 2);
  if (setting != api.none) setting = api.PyList_GetItem(setting, 0);
  if (k == nullptr || setting == nullptr) return nullptr;
  Description d;
  const bool plain = describe(api, setting, args, kwargs, &d);
  const Entry* e = plain ? *find(k, hash_of(d.bytes, d.size), d.bytes, d.size) : nullptr;
  if (e != nullptr) {
    sfa_py* done = run(api, d, e->form);
    if (done != nullptr || api.PyErr_Occurred() != nullptr) return done;
  }
  api.Py_IncRef(setting);  // the list may be given another one meanwhile
  sfa_py* done = call_slow(api, self, plain ? &d : nullptr, setting, args, kwargs);
  api.Py_DecRef(setting);
  return done;
}

// What torch calls: METH_VARARGS | METH_KEYWORDS. The name may be given up during the call.
sfa_py* call(sfa_py* self, sfa_py* args, sfa_py* kwargs) {
  g_api.Py_IncRef(self);
  sfa_py* done = answer(g_api, self, args, kwargs);
  g_api.Py_DecRef(self);
  return done;
}

// Python's PyMethodDef, of its stable ABI.
struct Method {
  const char* name;
  sfa_py* (*function)(sfa_py*, sfa_py*, sfa_py*);
  int flags;
  const char* doc;
};
const Method kMethod = {"sfa_onnx_kernel", call, 0x1 | 0x2, nullptr};

bool is_whole(const sfa_torch_form& f) {
  bool good = f.kind >= SFA_TORCH_ATTENTION && f.kind <= SFA_TORCH_PACK && f.inputs >= 0 &&
              f.inputs <= SFA_TORCH_INPUTS && f.results >= 1 && f.results <= SFA_TORCH_RESULTS;
  const int32_t last = (int32_t)(sizeof f.block - sizeof(void*));
  for (int i = 0; good && i < f.inputs; ++i)
    good = f.place[i] >= 0 && f.place[i] < kValues && f.field[i] >= 0 && f.field[i] <= last;
  for (int i = 0; good && i < f.results; ++i)
    good = f.result[i].field <= last && f.result[i].rank >= 0 && f.result[i].rank <= SFA_TORCH_RANK;
  return good;
}

}  // namespace
}  // namespace sfa_torch

using namespace sfa_torch;

sfa_py* sfa_torch_kernel(const sfa_torch_api* api, sfa_py* slow, sfa_py* setting) {
  if (api->struct_size != sizeof *api) return nullptr;
  adopt(*api);
  Kernel* k = (Kernel*)calloc(1, sizeof *k);
  if (k == nullptr) return nullptr;
  sfa_py* capsule = api->PyCapsule_New(k, nullptr, destroy);
  sfa_py* self = api->PyTuple_New(3);
  if (capsule == nullptr || self == nullptr) return nullptr;
  api->Py_IncRef(slow);
  api->Py_IncRef(setting);
  api->PyTuple_SetItem(self, 0, capsule);
  api->PyTuple_SetItem(self, 1, slow);
  api->PyTuple_SetItem(self, 2, setting);
  sfa_py* made = api->PyCFunction_NewEx(&kMethod, self, nullptr);
  api->Py_DecRef(self);
  return made;
}

int sfa_torch_keep(sfa_py* kernel_self, const char* key, int64_t size, const sfa_torch_form* form) {
  if (form->struct_size != sizeof *form || size < 0 || !is_whole(*form)) return 0;
  Kernel* k = kernel_of(kernel_self);
  if (k == nullptr) return 0;
  if (k->count >= kKept) forget(k);
  const uint64_t hash = hash_of(key, (size_t)size);
  Entry** slot = find(k, hash, key, (size_t)size);
  if (*slot != nullptr) return 1;  // another thread was first
  Entry* e = (Entry*)malloc(sizeof *e + (size_t)size);
  if (e == nullptr) return 0;
  e->hash = hash;
  e->size = (size_t)size;
  e->form = *form;
  memcpy(e->key, key, (size_t)size);
  *slot = e;
  ++k->count;
  return 1;
}
