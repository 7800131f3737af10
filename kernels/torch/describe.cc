// Types, shapes, numbers and texts of a call as bytes: two calls with the same bytes differ in
// addresses only. Each value starts with a letter for its kind, and what has no fixed size says it.
#include "describe.h"

#include <stdlib.h>
#include <string.h>

namespace sfa_torch {
namespace {

bool put(Description* d, const void* bytes, size_t size) {
  if (size > kBytes - d->size) return false;
  memcpy(d->bytes + d->size, bytes, size);
  d->size += size;
  return true;
}

template <typename T>
bool put(Description* d, char kind, T value) {
  return put(d, &kind, 1) && put(d, &value, sizeof value);
}

bool put_text(Description* d, const char* text, ptrdiff_t size) {
  return text != nullptr && put(d, 's', (int64_t)size) && put(d, text, (size_t)size);
}

bool put_str(const sfa_torch_api& api, Description* d, sfa_py* value) {
  ptrdiff_t size = 0;
  const char* text = api.PyUnicode_AsUTF8AndSize(value, &size);
  return put_text(d, text, size);
}

// An attribute that the tensor keeps alive or that is a number: looked at, not held.
sfa_py* peek(const sfa_torch_api& api, sfa_py* value, sfa_py* name) {
  sfa_py* found = api.PyObject_GetAttr(value, name);
  if (found != nullptr) api.Py_DecRef(found);
  return found;
}

// The C++ object of a Python tensor. torch's handle of a tensor is the address of a pointer to it.
void* tensor_of(const sfa_torch_api& api, sfa_py* value) {
  sfa_py* number = api.PyObject_GetAttr(value, api.cdata);
  if (number == nullptr) return nullptr;
  void* found = api.PyLong_AsVoidPtr(number);
  api.Py_DecRef(number);
  return found;
}

bool put_tensor(const sfa_torch_api& api, Description* d, sfa_py* value) {
  void* object = tensor_of(api, value);
  if (object == nullptr) return false;
  const sfa_tensor tensor = (sfa_tensor)&object;
  int32_t device = -1, layout = -1, dtype = -1;
  if (api.aoti_torch_get_device_type(tensor, &device) != 0 || device != api.cpu) return false;
  if (api.aoti_torch_get_layout(tensor, &layout) != 0 || layout != api.strided) return false;
  bool contiguous = false;
  if (api.aoti_torch_is_contiguous(tensor, &contiguous) != 0 || !contiguous) return false;
  if (d->graded) {
    const sfa_py* wanted = peek(api, value, api.requires_grad);
    if (wanted == nullptr || wanted == api.true_) return false;
  }
  int64_t rank = 0, *sizes = nullptr;
  void* data = nullptr;
  if (api.aoti_torch_get_dtype(tensor, &dtype) != 0 || api.aoti_torch_get_dim(tensor, &rank) != 0 ||
      api.aoti_torch_get_sizes(tensor, &sizes) != 0 ||
      api.aoti_torch_get_data_ptr(tensor, &data) != 0)
    return false;
  d->address[d->values] = data;
  return put(d, 't', dtype) && put(d, 'r', rank) && put(d, sizes, (size_t)rank * sizeof *sizes);
}

bool put_value(const sfa_torch_api& api, Description* d, sfa_py* value) {
  if (d->values == kValues) return false;
  d->address[d->values] = nullptr;
  bool known = false;
  sfa_py* type = api.PyObject_Type(value);
  api.Py_DecRef(type);  // the value keeps it
  if (value == api.none) {
    known = put(d, "n", 1);
  } else if (type == api.tensor || type == api.parameter) {
    known = put_tensor(api, d, value);
  } else if (type == api.int_) {
    const long long number = api.PyLong_AsLongLong(value);
    known = (number != -1 || api.PyErr_Occurred() == nullptr) && put(d, 'i', number);
  } else if (type == api.float_) {
    known = put(d, 'f', api.PyFloat_AsDouble(value));
  } else if (type == api.bool_) {
    known = put(d, 'b', (char)(value == api.true_));
  } else if (type == api.str) {
    known = put_str(api, d, value);
  }
  ++d->values;
  return known;
}

// Whether nobody asks for forward derivatives.
bool is_outside(const sfa_torch_api& api) {
  sfa_py* level = api.PyObject_GetAttr(api.forward, api.level);
  if (level == nullptr) return false;
  const long long found = api.PyLong_AsLongLong(level);
  api.Py_DecRef(level);
  return found == -1 && api.PyErr_Occurred() == nullptr;
}

bool put_all(const sfa_torch_api& api, Description* d, sfa_py* setting, sfa_py* args,
             sfa_py* kwargs) {
  d->graded = api.aoti_torch_grad_mode_is_enabled();
  if (d->graded && !is_outside(api)) return false;
  const char* holes = getenv("SFA_ONNX_HOLES");
  if (!(holes == nullptr ? put(d, "n", 1) : put_text(d, holes, (ptrdiff_t)strlen(holes))))
    return false;
  if (!(setting == api.none ? put(d, "n", 1) : put_str(api, d, setting))) return false;
  const ptrdiff_t count = api.PyTuple_Size(args);
  if (!put(d, 'a', (int64_t)count)) return false;
  for (ptrdiff_t i = 0; i < count; ++i)
    if (!put_value(api, d, api.PyTuple_GetItem(args, i))) return false;
  ptrdiff_t at = 0;
  sfa_py *name = nullptr, *value = nullptr;
  while (kwargs != nullptr && api.PyDict_Next(kwargs, &at, &name, &value) != 0)
    if (!put_str(api, d, name) || !put_value(api, d, value)) return false;
  return true;
}

}  // namespace

bool describe(const sfa_torch_api& api, sfa_py* setting, sfa_py* args, sfa_py* kwargs,
              Description* d) {
  const bool plain = put_all(api, d, setting, args, kwargs);
  if (!plain) api.PyErr_Clear();
  return plain;
}

}  // namespace sfa_torch
