// torch's CPU allocator with a cap and a memory: what set_per_process_memory_fraction, the caching allocator and
// memory_stats are to a GPU. allocator.py loads it.
//
// Blocks of 256 KiB and more are mapped by themselves and kept when freed, because fresh pages cost their clearing;
// smaller ones are glibc's. A request is served from the smallest kept block that holds it, whose rest stays kept;
// where room is short the smallest are unmapped first, since a large one can serve anything. Fresh bytes in a step of a
// TSM-R18 over 64 to 192 frames of 112 px, by trace: 190 to 520 MB, and 380 to 1410 MB where a block serves requests
// within 1/16 of its size alone and the largest go first.
//
// Keeping costs no peak: used + kept never exceeds the most that was used since the last release(), nor the limit.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t kPage = 1 << 12;
constexpr int64_t kLarge = 1 << 18;  // bytes from which a block is mapped by itself; a smaller rest is not kept
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
constexpr size_t kMost = size_t{1} << 62;  // so that sizes can be added without a thought

char* map_pages(int64_t size) {
  void* const start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return start == MAP_FAILED ? nullptr : static_cast<char*>(start);
}

// Fresh memory, on a huge page's boundary where it can hold one; nullptr where the system has none.
char* map_block(int64_t size) {
  if (size < kHugePage) return map_pages(size);
  char* const start = map_pages(size + kHugePage);
  if (start == nullptr) return nullptr;
  const int64_t before = -reinterpret_cast<intptr_t>(start) & (kHugePage - 1);
  if (before > 0) munmap(start, before);
  munmap(start + before + size, kHugePage - before);
  madvise(start + before, size, MADV_HUGEPAGE);
  return start + before;
}

class Blocks {
 public:
  void* take(size_t bytes) {
    TORCH_CHECK_WITH(OutOfMemoryError, bytes < kMost, "lofi_fast: out of memory: ", bytes, " bytes asked for");
    const int64_t size = static_cast<int64_t>(bytes) < kLarge ? bytes : (bytes + kPage - 1) / kPage * kPage;
    const std::lock_guard<std::mutex> guard(mutex_);
    TORCH_CHECK_WITH(OutOfMemoryError, size <= limit_ - used_, "lofi_fast: out of memory: ", size, " bytes asked for, ",
                     limit_ - used_, " left below the limit of ", limit_);
    char* block = size < kLarge ? nullptr : take_kept(size);
    if (block == nullptr) {
      keep_within(std::max(room_, used_ + size) - used_ - size);
      block = fresh(size);
      if (block == nullptr) {
        keep_within(0);
        block = fresh(size);
      }
      TORCH_CHECK_WITH(OutOfMemoryError, block != nullptr, "lofi_fast: out of memory: ", size,
                       " bytes asked for, and the system has none");
    }
    sizes_.emplace(block, size);
    used_ += size;
    peak_ = std::max(peak_, used_);
    room_ = std::max(room_, used_);
    return block;
  }

  // Whether the block was one of these.
  bool give(void* block) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = sizes_.find(block);
    if (found == sizes_.end()) return false;
    const int64_t size = found->second;
    sizes_.erase(found);
    used_ -= size;
    if (size < kLarge) {
      std::free(block);
    } else if (resident(static_cast<char*>(block), size)) {
      keep(static_cast<char*>(block), size);
    } else {
      munmap(block, size);
    }
    return true;
  }

  void limit(int64_t more) {
    const std::lock_guard<std::mutex> guard(mutex_);
    limit_ = more < 0 ? kUnlimited : used_ + std::min(more, kUnlimited - used_);
    room_ = std::min(room_, limit_);
    keep_within(room_ - used_);
  }

  void release() {
    const std::lock_guard<std::mutex> guard(mutex_);
    keep_within(0);
    room_ = used_;
  }

  void reset_peak() {
    const std::lock_guard<std::mutex> guard(mutex_);
    peak_ = used_;
  }

  void read(int64_t* to) {
    const std::lock_guard<std::mutex> guard(mutex_);
    to[0] = used_;
    to[1] = kept_bytes_;
    to[2] = peak_;
    to[3] = limit_ == kUnlimited ? -1 : limit_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  static char* fresh(int64_t size) {
    if (size >= kLarge) return map_block(size);
    void* block = nullptr;
    return posix_memalign(&block, c10::gAlignment, size) == 0 ? static_cast<char*>(block) : nullptr;
  }

  // Whether nearly all of a block was ever touched: what is kept counts as held, and what was not touched is not held.
  bool resident(char* block, int64_t size) {
    pages_.resize(size / kPage);
    if (mincore(block, size, pages_.data()) != 0) return false;
    const auto there = std::count_if(pages_.begin(), pages_.end(), [](unsigned char page) { return page & 1; });
    return there * kPage >= size - size / 16;
  }

  void keep(char* block, int64_t size) {
    kept_.emplace(size, block);
    kept_bytes_ += size;
  }

  char* take_kept(int64_t size) {
    const auto found = kept_.lower_bound(size);
    if (found == kept_.end()) return nullptr;
    const auto [whole, block] = *found;
    kept_.erase(found);
    kept_bytes_ -= whole;
    const int64_t rest = whole - size;
    if (rest >= kLarge) {
      keep(block + size, rest);
    } else if (rest > 0) {
      munmap(block + size, rest);
    }
    return block;
  }

  void keep_within(int64_t allowed) {
    while (kept_bytes_ > allowed) {
      const auto smallest = kept_.begin();
      munmap(smallest->second, smallest->first);
      kept_bytes_ -= smallest->first;
      kept_.erase(smallest);
    }
  }

  std::mutex mutex_;
  std::vector<unsigned char> pages_;          // one at a time
  std::unordered_map<void*, int64_t> sizes_;  // bytes of each block in use
  std::multimap<int64_t, char*> kept_;        // by bytes
  int64_t used_ = 0, kept_bytes_ = 0, peak_ = 0;
  int64_t room_ = 0;  // most bytes used since release(): what used + kept stays within
  int64_t limit_ = kUnlimited;
};

// Never destroyed: tensors may outlive what is static here.
Blocks& blocks() {
  static Blocks* const instance = new Blocks;
  return *instance;
}

c10::DeleterFnPtr give_foreign = nullptr;  // of the allocator before this one

// oneDNN frees by the allocator of the day, so a block of the one before can arrive here.
void give(void* block) {
  if (block == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(block);
  if (!blocks().give(block)) give_foreign(block);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const block = bytes == 0 ? nullptr : blocks().take(bytes);
    c10::profiledCPUMemoryReporter().New(block, bytes);  // torch.profiler's memory events
    return {block, block, &give, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

}  // namespace

extern "C" {
#define LOFI_FAST_API __attribute__((visibility("default")))

// allocator.py looks for this text in the file, and loads no other torch's: c10 promises no stable interface.
LOFI_FAST_API extern const char lofi_fast_built_with[];
const char lofi_fast_built_with[] = "lofi_fast: built with torch " TORCH_VERSION;

// Whether it is in place: not where another library's allocator insists on being it.
LOFI_FAST_API bool lofi_fast_install() {
  static Allocator* const allocator = new Allocator;
  if (c10::GetCPUAllocator() == allocator) return true;
  give_foreign = c10::GetCPUAllocator()->raw_deleter();
  if (give_foreign == nullptr) return false;
  c10::SetCPUAllocator(allocator, /*priority=*/1);  // the default's is 0
  if (c10::GetCPUAllocator() != allocator) return false;
  // A child's lock must not be held by a thread that it does not have.
  pthread_atfork([] { blocks().mutex().lock(); }, [] { blocks().mutex().unlock(); }, [] { blocks().mutex().unlock(); });
  return true;
}

LOFI_FAST_API void lofi_fast_limit(int64_t more) { blocks().limit(more); }
LOFI_FAST_API void lofi_fast_release() { blocks().release(); }
LOFI_FAST_API void lofi_fast_reset_peak() { blocks().reset_peak(); }
LOFI_FAST_API void lofi_fast_read(int64_t* to) { blocks().read(to); }
}
