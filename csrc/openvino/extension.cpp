// Fused programs as an operation of OpenVINO, for hosts in C++: core.add_extension("libquincunx_openvino.so"), then
// read_model of an .onnx or .xml file that holds them. OpenVINO's C++ interface changes with every release, so this is built
// for the one that loads it, over the C interface of libquincunx (CMakeLists.txt beside this); from Python,
// quincunx.openvino does the same without that.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/convert.hpp>
#include <openvino/op/op.hpp>

#include <memory>
#include <vector>

#include "../capi/quincunx.h"

namespace {

using Loaded = std::shared_ptr<const qx_program>;

Loaded load(const void* bytes, size_t size) {
  qx_program* program = nullptr;
  OPENVINO_ASSERT(qx_load(bytes, size, &program) == QX_OK, "quincunx: ", qx_error());
  return Loaded(program, [](const qx_program* found) { qx_free(const_cast<qx_program*>(found)); });
}

std::vector<qx_shape> shapes_of(const Loaded& program, bool outputs) {
  std::vector<qx_shape> found(outputs ? qx_outputs(program.get()) : qx_inputs(program.get()));
  for (size_t i = 0; i < found.size(); ++i) {
    const int code = (outputs ? qx_output_shape : qx_input_shape)(program.get(), i, &found[i]);
    OPENVINO_ASSERT(code == QX_OK, "quincunx: ", qx_error());
  }
  return found;
}

qx_map map_of(const ov::Tensor& tensor) {
  const int32_t dtype = tensor.get_element_type() == ov::element::bf16 ? QX_BFLOAT16 : QX_FLOAT32;
  return qx_map{const_cast<void*>(static_cast<const void*>(tensor.data())), tensor.get_byte_size(), dtype, QX_NCHW};
}

// programs read and write no float16, to which OpenVINO converts all maps of a model where it computes in it
ov::Tensor float32_for(const ov::Tensor& tensor) {
  return tensor.get_element_type() == ov::element::f16 ? ov::Tensor(ov::element::f32, tensor.get_shape()) : tensor;
}

void convert(const ov::Tensor& from, const ov::Tensor& to) {
  if (from.get_element_type() == to.get_element_type()) return;  // the same tensor
  ov::TensorVector outputs{to};
  OPENVINO_ASSERT(ov::op::v0::Convert().evaluate(outputs, {from}), "quincunx: cannot convert ",
                  from.get_element_type(), " to ", to.get_element_type());
}

// in the threads of the stream that runs the model
void in_stream_threads(void*, int64_t count, void (*body)(void*, int64_t), void* argument) {
  ov::parallel_for(count, [&](int64_t index) { body(argument, index); });
}

class Program : public ov::op::Op {
 public:
  // as OpenVINO names the operation that quincunx.openvino makes in Python: both read the same .xml files
  OPENVINO_OP("QuincunxProgram", "extension");
  Program() = default;
  explicit Program(const ov::OutputVector& inputs) : Op(inputs) { constructor_validate_and_infer_types(); }

  void validate_and_infer_types() override {
    if (program_ == nullptr) {
      const auto constant = ov::as_type_ptr<ov::op::v0::Constant>(input_value(0).get_node_shared_ptr());
      OPENVINO_ASSERT(constant != nullptr, "quincunx: the program, input 0, must be a constant of the model");
      program_ = load(constant->get_data_ptr(), constant->get_byte_size());
    }
    const std::vector<qx_shape> inputs = shapes_of(program_, false), outputs = shapes_of(program_, true);
    OPENVINO_ASSERT(get_input_size() == inputs.size() + 1, "quincunx: the program has ", inputs.size(),
                    " maps, the node ", get_input_size() - 1);
    ov::Dimension batch = ov::Dimension::dynamic();
    for (size_t i = 0; i < inputs.size(); ++i) {
      const ov::PartialShape given = get_input_partial_shape(i + 1);
      const ov::PartialShape wanted{ov::Dimension::dynamic(), inputs[i].channels, inputs[i].height, inputs[i].width};
      OPENVINO_ASSERT(given.compatible(wanted), "quincunx: map ", i, " must be ", wanted, ", got ", given);
      OPENVINO_ASSERT(served(get_input_element_type(i + 1)), "quincunx: map ", i,
                      " must be float32, bfloat16 or float16, got ", get_input_element_type(i + 1));
      if (given.rank().is_static() && given[0].is_static()) batch = given[0];
    }
    set_output_size(outputs.size());
    for (size_t i = 0; i < outputs.size(); ++i) {
      ov::PartialShape sizes{batch, outputs[i].channels, outputs[i].height, outputs[i].width};
      sizes.resize(outputs[i].rank);
      set_output_type(i, get_input_element_type(1), sizes);
    }
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    auto copy = std::make_shared<Program>();
    copy->program_ = program_;
    copy->set_arguments(inputs);
    copy->constructor_validate_and_infer_types();
    return copy;
  }

  bool visit_attributes(ov::AttributeVisitor&) override { return true; }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    ov::TensorVector given, results;
    std::vector<qx_map> in, out;
    for (size_t i = 1; i < inputs.size(); ++i) {
      given.push_back(float32_for(inputs[i]));
      convert(inputs[i], given.back());
      in.push_back(map_of(given.back()));
    }
    const std::vector<qx_shape> shapes = shapes_of(program_, true);
    const size_t batch = inputs[1].get_shape()[0];
    for (size_t i = 0; i < shapes.size(); ++i) {
      ov::Shape sizes{batch, size_t(shapes[i].channels), size_t(shapes[i].height), size_t(shapes[i].width)};
      sizes.resize(shapes[i].rank);
      outputs[i].set_shape(sizes);
      results.push_back(float32_for(outputs[i]));
      out.push_back(map_of(results.back()));
    }
    const qx_host host{parallel_get_max_threads(), nullptr, &in_stream_threads};
    const int code = qx_run(program_.get(), &host, int64_t(batch), in.data(), in.size(), out.data(), out.size());
    OPENVINO_ASSERT(code == QX_OK, "quincunx: ", qx_error());
    for (size_t i = 0; i < results.size(); ++i) convert(results[i], outputs[i]);
    return true;
  }

 private:
  static bool served(const ov::element::Type& type) {
    return type == ov::element::f32 || type == ov::element::bf16 || type == ov::element::f16 ||
           type == ov::element::dynamic;
  }

  Loaded program_;
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS((std::vector<ov::Extension::Ptr>{
    std::make_shared<ov::OpExtension<Program>>(),
    std::make_shared<ov::frontend::onnx::ConversionExtension>(
        "Program", "quincunx", [](const ov::frontend::NodeContext& node) -> ov::OutputVector {
          ov::OutputVector inputs;
          for (size_t i = 0; i < node.get_input_size(); ++i) inputs.push_back(node.get_input(static_cast<int>(i)));
          return std::make_shared<Program>(inputs)->outputs();
        })}));
