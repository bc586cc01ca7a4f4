#include "quincunx.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../checks.h"
#include "../dispatch.h"
#include "../program_file.h"
#include "threads.h"

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

struct qx_program {
  quincunx::ProgramFile file;
};

namespace {

using quincunx::BorderMap;
using quincunx::Host;
using quincunx::ProgramFile;
using quincunx::require;

thread_local std::string last_error;

struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class F>
int guarded(const F& call) noexcept {
  try {
    call();
    return QX_OK;
  } catch (const FileError& error) {
    last_error = error.what();
    return QX_FILE;
  } catch (const std::runtime_error& error) {
    last_error = error.what();
    return QX_INVALID;
  } catch (const std::bad_alloc&) {
    last_error = "there is not enough memory";
    return QX_FAILED;
  } catch (const std::exception& error) {
    last_error = error.what();
    return QX_FAILED;
  }
}

// a file's bytes for as long as this lives, without a copy
class Mapped {
 public:
  explicit Mapped(const char* path) {
    file_ = open(path, O_RDONLY | O_CLOEXEC);
    if (file_ < 0) fail(path);
    struct stat about;
    if (fstat(file_, &about) != 0) fail(path);
    size_ = static_cast<size_t>(about.st_size);
    if (!S_ISREG(about.st_mode)) errno = EINVAL, fail(path);
    if (size_ == 0) return;
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file_, 0);
    if (data_ == MAP_FAILED) fail(path);
  }
  ~Mapped() {
    if (data_ != MAP_FAILED) munmap(data_, size_);
    if (file_ >= 0) close(file_);
  }
  Mapped(const Mapped&) = delete;
  const void* data() const { return size_ == 0 ? "" : data_; }
  size_t size() const { return size_; }

 private:
  [[noreturn]] void fail(const char* path) {
    const std::string reason = std::strerror(errno);
    if (file_ >= 0) close(file_);
    throw FileError(std::string(path) + ": " + reason);
  }
  int file_ = -1;
  size_t size_ = 0;
  void* data_ = MAP_FAILED;
};

void check_program(const qx_program* program) { require(program != nullptr, "program is NULL"); }

BorderMap border(const qx_map& map, const ProgramFile::Shape& shape, int64_t batch, const char* name, size_t number) {
  require(map.dtype == QX_FLOAT32 || map.dtype == QX_BFLOAT16, name, " ", number, ": dtype must be 0 (float32) or 1 ",
          "(bfloat16), got ", map.dtype);
  require(map.layout == QX_NCHW || map.layout == QX_NHWC, name, " ", number, ": layout must be 0 (NCHW) or 1 (NHWC), ",
          "got ", map.layout);
  require(quincunx::countable({batch, shape.channels, shape.height, shape.width}), "the batch ", batch,
          " is impossible");
  const int64_t width = map.dtype == QX_BFLOAT16 ? 2 : 4;
  const uint64_t needed = static_cast<uint64_t>(batch * shape.channels * shape.height * shape.width * width);
  require(map.bytes == needed, name, " ", number, " must have ", needed, " bytes for [", batch, ", ", shape.channels,
          ", ", shape.height, ", ", shape.width, "], got ", map.bytes);
  require(needed == 0 || map.data != nullptr, name, " ", number, ": data is NULL");
  require(reinterpret_cast<uintptr_t>(map.data) % width == 0, name, " ", number, ": data is not aligned to ", width,
          " bytes");
  return BorderMap{map.data, map.layout == QX_NCHW, map.dtype == QX_BFLOAT16};
}

int shape_of(const std::vector<ProgramFile::Shape>& shapes, size_t number, qx_shape* shape, const char* name) {
  return guarded([&] {
    require(shape != nullptr, "shape is NULL");
    require(number < shapes.size(), name, " ", number, " does not exist: the program has ", shapes.size());
    *shape = qx_shape{shapes[number].channels, shapes[number].height, shapes[number].width, shapes[number].rank};
  });
}

}  // namespace

int qx_abi_version(void) { return QX_ABI_VERSION; }

const char* qx_isa(void) {
  const char* name = nullptr;
  guarded([&] { name = quincunx::isa(); });
  return name;
}

const char* qx_error(void) { return last_error.c_str(); }

int qx_load(const void* bytes, size_t size, qx_program** program) {
  return guarded([&] {
    require(program != nullptr, "program is NULL");
    *program = nullptr;
    require(bytes != nullptr, "bytes is NULL");
    *program = new qx_program{ProgramFile(bytes, size)};
  });
}

int qx_load_file(const char* path, qx_program** program) {
  return guarded([&] {
    require(program != nullptr, "program is NULL");
    *program = nullptr;
    require(path != nullptr, "path is NULL");
    const Mapped mapped(path);
    try {
      *program = new qx_program{ProgramFile(mapped.data(), mapped.size())};
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string(path) + ": " + error.what());
    }
  });
}

void qx_free(qx_program* program) { delete program; }

size_t qx_inputs(const qx_program* program) { return program == nullptr ? 0 : program->file.inputs().size(); }

size_t qx_outputs(const qx_program* program) { return program == nullptr ? 0 : program->file.outputs().size(); }

int qx_input_shape(const qx_program* program, size_t number, qx_shape* shape) {
  const int checked = guarded([&] { check_program(program); });
  return checked != QX_OK ? checked : shape_of(program->file.inputs(), number, shape, "input");
}

int qx_output_shape(const qx_program* program, size_t number, qx_shape* shape) {
  const int checked = guarded([&] { check_program(program); });
  return checked != QX_OK ? checked : shape_of(program->file.outputs(), number, shape, "output");
}

int32_t qx_dtype(const qx_program* program) {
  return program != nullptr && program->file.bf16() ? QX_BFLOAT16 : QX_FLOAT32;
}

int64_t qx_memory(const qx_program* program) { return program == nullptr ? 0 : program->file.memory(); }

int qx_run(const qx_program* program, const qx_host* given, int64_t batch, const qx_map* inputs, size_t input_count,
           const qx_map* outputs, size_t output_count) {
  return guarded([&] {
    check_program(program);
    const ProgramFile& file = program->file;
    require(batch >= 0, "batch must not be negative, got ", batch);
    require(inputs != nullptr && outputs != nullptr, "inputs or outputs is NULL");
    require(input_count == file.inputs().size() && output_count == file.outputs().size(), "the program has ",
            file.inputs().size(), " inputs and ", file.outputs().size(), " outputs, got ", input_count, " and ",
            output_count);
    std::vector<BorderMap> in, out;
    for (size_t i = 0; i < input_count; ++i) in.push_back(border(inputs[i], file.inputs()[i], batch, "input", i));
    for (size_t i = 0; i < output_count; ++i) out.push_back(border(outputs[i], file.outputs()[i], batch, "output", i));
    Host host;
    if (given != nullptr) host = Host{given->threads, given->context, given->parallel_for};
    require(host.threads >= 1, "threads must be at least 1, got ", host.threads);
    file.run(in.data(), out.data(), batch, host);
  });
}

int qx_threads(int64_t count, qx_host** host) {
  return guarded([&] {
    require(host != nullptr, "host is NULL");
    *host = nullptr;
    require(count >= 1 && count <= 1024, "threads must be 1 to 1024, got ", count);
    auto threads = std::make_unique<quincunx::Threads>(count);
    const auto run = [](void* context, int64_t total, void (*body)(void*, int64_t), void* argument) {
      static_cast<quincunx::Threads*>(context)->parallel_for(total, body, argument);
    };
    *host = new qx_host{count, threads.get(), run};
    (void)threads.release();
  });
}

void qx_free_threads(qx_host* host) {
  if (host == nullptr) return;
  delete static_cast<quincunx::Threads*>(host->context);
  delete host;
}
