// Fused programs as a custom operator of ONNX Runtime, through its C interface alone: one binary serves every release
// from 1.17 on.
//
//   domain "quincunx", operator "Program", version 1
//   inputs   program: uint8, a constant, the bytes of program_file.h; then float32 maps [N, C, H, W]
//   outputs  float32 maps [N, C, H, W], or [N, C] where the program says so
#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../program_file.h"
#include "onnxruntime_facts.h"
#include "thread_count.h"

namespace {

using quincunx::BorderMap;
using quincunx::Host;
using quincunx::ProgramFile;
using quincunx::require;

// what ONNX Runtime answered instead of doing it
struct Refused {
  OrtStatusPtr status;
};
void check(OrtStatusPtr status) {
  if (status != nullptr) throw Refused{status};
}

struct Kernel {
  Kernel(const OrtApi* api, const void* bytes, size_t size) : api(api), program(bytes, size) {}
  const OrtApi* api;
  ProgramFile program;
  quincunx::ThreadCount threads;  // of the session, which the interface does not tell
};

template <class F>
OrtStatusPtr guarded(const OrtApi* api, const F& call) noexcept {
  try {
    call();
    return nullptr;
  } catch (const Refused& refused) {
    return refused.status;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, (std::string("quincunx: ") + error.what()).c_str());
  }
}

struct Shape {
  Shape(const OrtApi* api, const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* about = nullptr;
    check(api->GetTensorTypeAndShape(value, &about));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
        about, api->ReleaseTensorTypeAndShapeInfo);
    size_t rank = 0;
    check(api->GetDimensionsCount(about, &rank));
    sizes.resize(rank);
    if (rank > 0) check(api->GetDimensions(about, sizes.data(), rank));
    check(api->GetTensorElementType(about, &type));
  }
  std::vector<int64_t> sizes;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
};

std::string text(const std::vector<int64_t>& sizes) {
  std::string found = "[";
  for (size_t i = 0; i < sizes.size(); ++i) found += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return found + "]";
}

void* data_of(const OrtApi* api, const OrtValue* value) {
  void* data = nullptr;
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return data;
}

// ---------------------------------------------------------------- threads of the session

struct Session {
  const OrtApi* api;
  const OrtKernelContext* context;
};
struct Body {
  void (*run)(void*, int64_t);
  void* argument;
};

void in_session_threads(void* context, int64_t count, void (*run)(void*, int64_t), void* argument) {
  const Session& session = *static_cast<const Session*>(context);
  Body body{run, argument};
  const auto each = [](void* given, size_t index) {
    const Body& found = *static_cast<const Body*>(given);
    found.run(found.argument, static_cast<int64_t>(index));
  };
  check(session.api->KernelContext_ParallelFor(session.context, each, static_cast<size_t>(count), 0, &body));
}

// ---------------------------------------------------------------- the kernel

OrtStatusPtr create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  return guarded(api, [&] {
    *kernel = nullptr;
    int constant = 0;
    const OrtValue* value = nullptr;
    check(api->KernelInfoGetConstantInput_tensor(info, 0, &constant, &value));
    require(constant != 0 && value != nullptr, "the program, input 0, must be a constant of the graph");
    const Shape shape(api, value);
    require(shape.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 && shape.sizes.size() == 1,
            "the program, input 0, must be uint8 of one dimension");
    auto found = std::make_unique<Kernel>(api, data_of(api, value), static_cast<size_t>(shape.sizes[0]));
    size_t inputs = 0, outputs = 0;
    check(api->KernelInfo_GetInputCount(info, &inputs));
    check(api->KernelInfo_GetOutputCount(info, &outputs));
    require(inputs == found->program.inputs().size() + 1 && outputs == found->program.outputs().size(),
            "the program has ", found->program.inputs().size(), " maps and ", found->program.outputs().size(),
            " outputs, the node ", inputs - 1, " and ", outputs);
    *kernel = found.release();
  });
}

OrtStatusPtr compute(void* given, OrtKernelContext* context) {
  Kernel& kernel = *static_cast<Kernel*>(given);
  const OrtApi* api = kernel.api;
  return guarded(api, [&] {
    Session session{api, context};
    Host host{1, &session, &in_session_threads};
    host.threads = kernel.threads.at_call(host);
    std::vector<BorderMap> inputs, outputs;
    int64_t batch = -1;
    for (size_t i = 0; i < kernel.program.inputs().size(); ++i) {
      const ProgramFile::Shape& expected = kernel.program.inputs()[i];
      const OrtValue* value = nullptr;
      check(api->KernelContext_GetInput(context, i + 1, &value));
      const Shape shape(api, value);
      const std::vector<int64_t> rest{expected.channels, expected.height, expected.width};
      const bool fits = shape.sizes.size() == 4 && std::equal(rest.begin(), rest.end(), shape.sizes.begin() + 1) &&
                        shape.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      if (fits && i == 0) batch = shape.sizes[0];
      require(fits && shape.sizes[0] == batch, "map ", i, " must be float32 [N, ", expected.channels, ", ",
              expected.height, ", ", expected.width, "] with one N for all maps, got ", text(shape.sizes));
      inputs.push_back(BorderMap{data_of(api, value), true, false});
    }
    for (size_t i = 0; i < kernel.program.outputs().size(); ++i) {
      const ProgramFile::Shape& shape = kernel.program.outputs()[i];
      const int64_t sizes[4] = {batch, shape.channels, shape.height, shape.width};
      require(quincunx::countable({batch, shape.channels, shape.height, shape.width}), "the batch ", batch,
              " is impossible");
      OrtValue* value = nullptr;
      check(api->KernelContext_GetOutput(context, i, sizes, static_cast<size_t>(shape.rank), &value));
      outputs.push_back(BorderMap{data_of(api, value), true, false});
    }
    kernel.program.run(inputs.data(), outputs.data(), batch, host);
  });
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

// for callers that know neither version of these two functions' successors; none of ours does
void* create_old(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info) {
  void* kernel = nullptr;
  if (OrtStatusPtr status = create(op, api, info, &kernel)) api->ReleaseStatus(status);
  return kernel;
}
void compute_old(void* kernel, OrtKernelContext* context) {
  const OrtApi* api = static_cast<Kernel*>(kernel)->api;
  if (OrtStatusPtr status = compute(kernel, context)) api->ReleaseStatus(status);
}

OrtCustomOp make_operator() {
  OrtCustomOp op{};
  op.version = kOrtApi;
  op.CreateKernel = create_old;
  op.GetName = [](const OrtCustomOp*) { return "Program"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.KernelCompute = compute_old;
  op.KernelDestroy = destroy;
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
  return op;
}

// The domain for one copy of ONNX Runtime; it lives as long as the process, since sessions keep pointers to it.
OrtCustomOpDomain* domain_of(const OrtApi* api) {
  static const OrtCustomOp op = make_operator();
  static std::mutex lock;
  static std::vector<std::pair<const OrtApi*, OrtCustomOpDomain*>> known;
  const std::lock_guard<std::mutex> guard(lock);
  for (const auto& [of, domain] : known) {
    if (of == api) return domain;
  }
  OrtCustomOpDomain* domain = nullptr;
  check(api->CreateCustomOpDomain("quincunx", &domain));
  if (OrtStatusPtr status = api->CustomOpDomain_Add(domain, &op)) {
    api->ReleaseCustomOpDomain(domain);
    throw Refused{status};
  }
  known.emplace_back(api, domain);
  return domain;
}

}  // namespace

// ONNX Runtime calls this when a session's options name the library.
extern "C" __attribute__((visibility("default"))) OrtStatusPtr RegisterCustomOps(OrtSessionOptions* options,
                                                                                 const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApi);
  if (api == nullptr) {
    const std::string sentence = std::string("quincunx needs ONNX Runtime 1.17 or later, this is ") + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_FAIL, sentence.c_str());
  }
  return guarded(api, [&] { check(api->AddCustomOpDomain(options, domain_of(api))); });
}
