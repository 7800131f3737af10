// Shapes of query, key, lengths and block table, as attention and indexers have them.
#ifndef SFA_ONNX_KERNELS_ORT_SEQUENCE_CHECKS_H_
#define SFA_ONNX_KERNELS_ORT_SEQUENCE_CHECKS_H_

#include "message.h"
#include "sfa_core.h"
#include "tensor.h"

namespace sfa {

// Complaints about single tensors. All functions return false after a complaint.
class ShapeChecks {
 public:
  explicit ShapeChecks(Message* error) : error_(error) {}

  // "input key: shape [..]: " - the beginning of every complaint about a tensor.
  Message* About(const Tensor& t) const;
  bool Rank(const Tensor& t, size_t rank, const char* expected) const;
  bool Dim(const Tensor& t, size_t axis, int64_t expected, const char* meaning) const;
  // Present or absent as it must be.
  bool Need(const Tensor& t, const char* why) const;
  bool Forbid(const Tensor& t, const char* why) const;
  bool FitsInt32(const Tensor& t) const;
  // `rank` dimensions, the leading ones as `like` has them.
  bool Leading(const Tensor& t, size_t rank, const Tensor& like) const;

 protected:
  Message* const error_;
};

// What the core wants to know about the sequences of a call.
struct SequenceSizes {
  int64_t batch, query_s, query_t;
  int64_t key_s, block_num, block_size, block_table_cols;
};

// The checks in the order in which they are to be called; each fills its part of `sizes`.
class SequenceChecks : public ShapeChecks {
 public:
  // `layout_name`: the attribute that names the key's layout.
  SequenceChecks(int layout_query, int layout_key, const char* layout_name, Message* error)
      : ShapeChecks(error),
        token_query_(layout_query == SFA_CORE_TND),
        layout_key_(layout_key),
        layout_name_(layout_name) {}

  bool Query(const Tensor& query, const char* bsnd, const char* tnd);
  bool Lengths(const Tensor& query, const Tensor& key);
  // Rank, head and batch of a tensor that lies like the key.
  bool KeyShape(const Tensor& t) const;
  bool Key(const Tensor& key);
  bool BlockTable(const Tensor& table);

  bool paged() const { return layout_key_ == SFA_CORE_PA_BSND; }

  SequenceSizes sizes = {};

 private:
  const bool token_query_;
  const int layout_key_;
  const char* const layout_name_;
};

inline const int32_t* Ints(const Tensor& t) {
  return t.present ? static_cast<const int32_t*>(t.data) : nullptr;
}

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_SEQUENCE_CHECKS_H_
