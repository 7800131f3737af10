// A model of one node as bytes: just enough of protobuf's wire format to write it down.
#ifndef SFA_ONNX_KERNELS_TESTS_FUZZ_MODEL_BYTES_H_
#define SFA_ONNX_KERNELS_TESTS_FUZZ_MODEL_BYTES_H_

#include <stdint.h>
#include <string.h>

#include <string>
#include <vector>

namespace sfa_fuzz {

// A message under construction; field numbers are those of onnx.proto.
class Message {
 public:
  Message& Int(int field, int64_t value) {
    Varint(static_cast<uint64_t>(field) << 3);
    Varint(static_cast<uint64_t>(value));
    return *this;
  }
  Message& Float(int field, float value) {
    Varint(static_cast<uint64_t>(field) << 3 | 5);
    char raw[4];
    memcpy(raw, &value, 4);
    bytes_.append(raw, 4);
    return *this;
  }
  Message& Text(int field, const std::string& value) {
    Varint(static_cast<uint64_t>(field) << 3 | 2);
    Varint(value.size());
    bytes_ += value;
    return *this;
  }
  Message& Sub(int field, const Message& value) { return Text(field, value.bytes_); }
  const std::string& bytes() const { return bytes_; }

 private:
  void Varint(uint64_t value) {
    for (; value >= 128; value >>= 7) bytes_ += static_cast<char>(value | 128);
    bytes_ += static_cast<char>(value);
  }

  std::string bytes_;
};

// AttributeProto: name 1, f 2, i 3, s 4, type 20; ints 8.
inline Message IntAttribute(const std::string& name, int64_t value) {
  return Message().Text(1, name).Int(3, value).Int(20, 2);
}
inline Message FloatAttribute(const std::string& name, float value) {
  return Message().Text(1, name).Float(2, value).Int(20, 1);
}
inline Message TextAttribute(const std::string& name, const std::string& value) {
  return Message().Text(1, name).Text(4, value).Int(20, 3);
}
inline Message IntsAttribute(const std::string& name, int64_t value) {
  return Message().Text(1, name).Int(8, value).Int(20, 7);
}

// ValueInfoProto of a tensor without a shape, or with `rank` open axes.
inline Message ValueInfo(const std::string& name, int type, int rank) {
  Message tensor = Message().Int(1, type);
  if (rank >= 0) {
    Message shape;
    for (int i = 0; i < rank; ++i) shape.Sub(1, Message());
    tensor.Sub(2, shape);
  }
  return Message().Text(1, name).Sub(2, Message().Sub(1, tensor));
}

}  // namespace sfa_fuzz

#endif  // SFA_ONNX_KERNELS_TESTS_FUZZ_MODEL_BYTES_H_
