// Stand-in, see graph/types.h.
#ifndef SFA_ONNX_TESTING_REGISTER_REGISTER_H_
#define SFA_ONNX_TESTING_REGISTER_REGISTER_H_

#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "graph/ascend_string.h"
#include "graph/graph.h"
#include "graph/operator.h"
#include "graph/types.h"

namespace domi {
using Status = uint32_t;
constexpr Status SUCCESS = 0;
constexpr Status FAILED = 0xFFFFFFFF;

enum FrameworkType { CAFFE = 0, MINDSPORE = 1, TENSORFLOW = 3, ANDROID_NN = 4, ONNX = 5 };
enum class ImplyType : unsigned int { BUILDIN = 0, TVM, CUSTOM };

using ParseParamByOpFunc = std::function<Status(const ge::Operator&, ge::Operator&)>;
using ParseOpToGraphFunc = std::function<Status(const ge::Operator&, ge::Graph&)>;
class OpRegistrationDataImpl;

class OpRegistrationData {
 public:
  OpRegistrationData(const std::string& om_optype);
  OpRegistrationData(const char_t* om_optype);
  ~OpRegistrationData();
  OpRegistrationData& FrameworkType(const domi::FrameworkType& fmk_type);
  OpRegistrationData& OriginOpType(const std::initializer_list<std::string>& ori_optype_list);
  OpRegistrationData& OriginOpType(const std::vector<ge::AscendString>& ori_op_type_list);
  OpRegistrationData& OriginOpType(const std::string& ori_optype);
  OpRegistrationData& OriginOpType(const char_t* ori_op_type);
  OpRegistrationData& ParseParamsByOperatorFn(const ParseParamByOpFunc& parse_param_by_op_fn);
  OpRegistrationData& ParseOpToGraphFn(const ParseOpToGraphFunc& parse_op_to_graph_fn);
  OpRegistrationData& ImplyType(const domi::ImplyType& imply_type);

 private:
  std::shared_ptr<OpRegistrationDataImpl> impl_;
  friend class OpReceiver;
};

class OpReceiver {
 public:
  OpReceiver(OpRegistrationData& reg_data);
  ~OpReceiver() = default;
};
}  // namespace domi

#define REGISTER_CUSTOM_OP(name) REGISTER_CUSTOM_OP_UNIQ_HELPER(__COUNTER__, (name))
#define REGISTER_CUSTOM_OP_UNIQ_HELPER(ctr, name) REGISTER_CUSTOM_OP_UNIQ(ctr, (name))
#define REGISTER_CUSTOM_OP_UNIQ(ctr, name) \
  static OpReceiver register_op##ctr __attribute__((unused)) = OpRegistrationData(name)

#endif  // SFA_ONNX_TESTING_REGISTER_REGISTER_H_
