// Runs an exported file in OpenVINO with our kernels, from C++. csrc/openvino/CMakeLists.txt builds the extension for
// the release of OpenVINO at hand; then
//
//   c++ -O2 -std=c++17 -I<openvino>/include examples/host_openvino.cpp -L<openvino>/libs -lopenvino -o host_openvino
//   ./host_openvino model.onnx libquincunx_openvino.so THREADS N C H W < input.f32 > output.f32
#include <openvino/openvino.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc != 8) return std::fprintf(stderr, "host_openvino MODEL EXTENSION THREADS N C H W\n"), 1;
  try {
    ov::Core core;
    core.add_extension(std::string(argv[2]));  // this line is what our kernels need
    auto compiled = core.compile_model(argv[1], "CPU", ov::inference_num_threads(std::atoi(argv[3])),
                                       ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY));
    ov::Shape shape;
    for (int i = 4; i < 8; ++i) shape.push_back(std::strtoull(argv[i], nullptr, 10));
    ov::Tensor input(ov::element::f32, shape);
    if (std::fread(input.data(), 1, input.get_byte_size(), stdin) != input.get_byte_size()) {
      return std::fprintf(stderr, "the input is too short\n"), 1;
    }
    auto request = compiled.create_infer_request();
    request.set_input_tensor(input);
    double best = 1e9;
    for (int i = 0; i < 20; ++i) {
      const auto start = std::chrono::steady_clock::now();
      request.infer();
      best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::fprintf(stderr, "OpenVINO, %s threads: %.3f ms\n", argv[3], 1000 * best);
    const ov::Tensor output = request.get_output_tensor();
    std::fwrite(output.data(), 1, output.get_byte_size(), stdout);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
  return 0;
}
