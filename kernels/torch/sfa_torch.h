// A torch operator's CPU kernel as a C function: what a further call of a known form goes through
// instead of Python.
//
// torch calls a Python kernel with a tuple and a dictionary. The function made here describes them
// in a few hundred bytes (types, shapes, numbers, texts; not addresses) and looks for the same
// description among those that `sfa_torch_keep` was told of. If it is there, the call's parameter
// block is copied, the addresses are put in and the core runs, without the interpreter lock.
// Whatever is unusual, new or wrong goes to the Python function `slow`, which checks, computes,
// raises, and may tell of the new form.
//
// No header of Python or torch is needed: the caller hands over the functions, all of Python's
// stable ABI and of torch's C shim. All entry points want the interpreter lock.
#ifndef SFA_ONNX_KERNELS_TORCH_SFA_TORCH_H_
#define SFA_ONNX_KERNELS_TORCH_SFA_TORCH_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sfa_core.h"

#ifdef __cplusplus
extern "C" {
#endif

struct _object;  // Python's own name of it
typedef struct _object sfa_py;
struct AtenTensorOpaque;
typedef struct AtenTensorOpaque* sfa_tensor;  // torch's AtenTensorHandle

typedef struct sfa_torch_api {
  uint32_t struct_size;  // sizeof(sfa_torch_api)
  int32_t cpu;           // aoti_torch_device_type_cpu()
  int32_t strided;       // aoti_torch_layout_strided()
  int32_t reserved;      // 0

  // Python's objects.
  sfa_py *none, *true_, *int_, *float_, *str, *bool_;  // the last four are types
  sfa_py *tensor, *parameter;                          // the types that are taken as they are
  sfa_py *cdata, *requires_grad;                       // names of attributes
  sfa_py *forward, *level;  // torch.autograd.forward_ad, the name of its level: -1 outside
  // torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr: whatever its name says, it copies the
  // handle in the capsule, which stays with its owner.
  sfa_py* wrap;

  // Python's functions by their names.
  sfa_py* (*PyObject_Type)(sfa_py*);
  sfa_py* (*PyObject_GetAttr)(sfa_py*, sfa_py*);
  sfa_py* (*PyObject_CallFunctionObjArgs)(sfa_py*, ...);
  ptrdiff_t (*PyTuple_Size)(sfa_py*);
  sfa_py* (*PyTuple_GetItem)(sfa_py*, ptrdiff_t);
  sfa_py* (*PyTuple_New)(ptrdiff_t);
  int (*PyTuple_SetItem)(sfa_py*, ptrdiff_t, sfa_py*);
  int (*PyDict_Next)(sfa_py*, ptrdiff_t*, sfa_py**, sfa_py**);
  sfa_py* (*PyList_GetItem)(sfa_py*, ptrdiff_t);
  long long (*PyLong_AsLongLong)(sfa_py*);
  void* (*PyLong_AsVoidPtr)(sfa_py*);
  double (*PyFloat_AsDouble)(sfa_py*);
  const char* (*PyUnicode_AsUTF8AndSize)(sfa_py*, ptrdiff_t*);
  sfa_py* (*PyBytes_FromStringAndSize)(const char*, ptrdiff_t);
  sfa_py* (*PyErr_Occurred)(void);
  void (*PyErr_Clear)(void);
  void (*Py_IncRef)(sfa_py*);
  void (*Py_DecRef)(sfa_py*);
  void* (*PyEval_SaveThread)(void);
  void (*PyEval_RestoreThread)(void*);
  sfa_py* (*PyCapsule_New)(void*, const char*, void (*)(sfa_py*));
  void* (*PyCapsule_GetPointer)(sfa_py*, const char*);
  sfa_py* (*PyCFunction_NewEx)(const void*, sfa_py*, sfa_py*);

  // torch's C shim; a status other than 0 is an error.
  int32_t (*aoti_torch_get_device_type)(sfa_tensor, int32_t*);
  int32_t (*aoti_torch_get_layout)(sfa_tensor, int32_t*);
  int32_t (*aoti_torch_is_contiguous)(sfa_tensor, bool*);
  int32_t (*aoti_torch_get_dtype)(sfa_tensor, int32_t*);
  int32_t (*aoti_torch_get_dim)(sfa_tensor, int64_t*);
  int32_t (*aoti_torch_get_sizes)(sfa_tensor, int64_t**);
  int32_t (*aoti_torch_get_data_ptr)(sfa_tensor, void**);
  int32_t (*aoti_torch_empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t,
                                      int32_t, sfa_tensor*);
  int32_t (*aoti_torch_delete_tensor_object)(sfa_tensor);
  bool (*aoti_torch_grad_mode_is_enabled)(void);
  int32_t (*torch_get_num_threads)(uint32_t*);
} sfa_torch_api;

enum { SFA_TORCH_INPUTS = 12, SFA_TORCH_RESULTS = 3, SFA_TORCH_RANK = 4 };

typedef struct sfa_torch_result {
  int32_t field;     // byte offset of its address in the block; -1: the core knows nothing of it
  int32_t dtype;     // torch's number
  int32_t itemsize;  // bytes
  int32_t rank;
  int32_t zeroed;  // 0, 1: filled with zeros before the call
  int32_t reserved;
  int64_t sizes[SFA_TORCH_RANK];
} sfa_torch_result;

// Which function of the core a call is for, and which block it has.
typedef enum sfa_torch_kind {
  SFA_TORCH_ATTENTION = 0,
  SFA_TORCH_INDEXER = 1,
  SFA_TORCH_PACK = 2,
} sfa_torch_kind;

// A checked call without its addresses.
typedef struct sfa_torch_form {
  uint32_t struct_size;  // sizeof(sfa_torch_form)
  int32_t kind;          // sfa_torch_kind
  int32_t inputs, results;
  int32_t single;  // 1: the first result itself is returned, else a tuple
  int32_t reserved;
  int32_t place[SFA_TORCH_INPUTS];  // of each input among the values of tuple and dictionary
  int32_t field[SFA_TORCH_INPUTS];  // byte offset of its address in the block
  sfa_torch_result result[SFA_TORCH_RESULTS];
  union {
    sfa_core_params attention;
    sfa_core_indexer_params indexer;
    sfa_core_pack_params pack;
  } block;
} sfa_torch_form;

// A kernel: a Python callable. `slow` is called with (description or None, what `setting` held,
// tuple, dictionary or None); `setting` is a list of one text or None, part of each description.
// Both are kept, and the first `api` for all kernels. NULL: api has another size, or memory is
// short.
SFA_CORE_API sfa_py* sfa_torch_kernel(const sfa_torch_api* api, sfa_py* slow, sfa_py* setting);

// Tells the kernel of a form under a description that it gave to `slow`; returns 1 if it is kept.
// `kernel_self` is the kernel's __self__.
SFA_CORE_API int sfa_torch_keep(sfa_py* kernel_self, const char* key, int64_t size,
                                const sfa_torch_form* form);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // SFA_ONNX_KERNELS_TORCH_SFA_TORCH_H_
