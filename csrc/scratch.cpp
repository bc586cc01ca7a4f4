#include "scratch.h"

#include <cstdlib>
#include <mutex>

namespace quincunx {
namespace {

constexpr int64_t kPage = 4096;

struct Owned {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Owned() { std::free(memory); }
};

thread_local Owned own;

std::mutex one_at_a_time;
// costs nothing until it is used
alignas(kPage) char reserve[Scratch::kMost];

}  // namespace

int64_t scratch_limit = INT64_MAX;

char* thread_scratch(int64_t bytes) {
  if (bytes > scratch_limit) return nullptr;
  if (own.bytes < bytes) {
    std::free(own.memory);
    const int64_t size = (bytes + kPage - 1) / kPage * kPage;
    own.memory = std::aligned_alloc(kPage, size);
    own.bytes = own.memory == nullptr ? 0 : size;
  }
  return static_cast<char*>(own.memory);
}

Scratch::Scratch(int64_t bytes) : data(thread_scratch(bytes)), reserved_(data == nullptr) {
  if (!reserved_) return;
  one_at_a_time.lock();
  data = reserve;
}

Scratch::~Scratch() {
  if (reserved_) one_at_a_time.unlock();
}

}  // namespace quincunx
