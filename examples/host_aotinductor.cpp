// Runs a package of AOTInductor, as `quincunx export --out model.aoti.pt2` writes it, from C++ with libtorch and without
// Python. Build and run, with TORCH the folder of torch (python -c "import torch; print(torch.__path__[0])"):
//
//   c++ -O2 -std=c++20 -I$TORCH/include examples/host_aotinductor.cpp -L$TORCH/lib -ltorch -ltorch_cpu -lc10
//       -ldl -Wl,-rpath,$TORCH/lib -o host_aotinductor
//   ./host_aotinductor model.aoti.pt2 LIBRARY THREADS N C H W < input.f32 > output.f32
//
// LIBRARY is the operators' library, quincunx/_native.abi3.so, for a package with our kernels; "-" for one of plain
// operators. Packages of several inputs take them in model.run's list.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 8) return std::fprintf(stderr, "host_aotinductor PACKAGE LIBRARY THREADS N C H W\n"), 1;
  // lazily: it has an entry for Python too, whose functions are not here
  if (std::string(argv[2]) != "-" && dlopen(argv[2], RTLD_LAZY | RTLD_GLOBAL) == nullptr) {
    return std::fprintf(stderr, "%s\n", dlerror()), 1;
  }
  try {
    at::set_num_threads(std::atoi(argv[3]));
    c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    std::vector<int64_t> shape;
    for (int i = 4; i < 8; ++i) shape.push_back(std::atoll(argv[i]));
    at::Tensor input = at::empty(shape);
    const auto values = static_cast<size_t>(input.numel());
    if (std::fread(input.data_ptr<float>(), sizeof(float), values, stdin) != values) {
      return std::fprintf(stderr, "the input is too short\n"), 1;
    }
    at::Tensor output;
    double best = 1e9;
    for (int i = 0; i < 20; ++i) {
      const auto start = std::chrono::steady_clock::now();
      output = model.run({input})[0];
      best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::fprintf(stderr, "AOTInductor, %s threads: %.3f ms\n", argv[3], 1000 * best);
    output = output.contiguous();
    std::fwrite(output.data_ptr<float>(), sizeof(float), static_cast<size_t>(output.numel()), stdout);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
  return 0;
}
