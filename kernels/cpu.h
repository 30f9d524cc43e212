// What the CPU forms share: element types, loops cloned for wider vectors, large outputs.

#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

// A function with this mark is compiled for baseline x86-64, AVX2 and AVX-512, and the machine's best is taken at load
// time, so that one binary serves every CPU. What it calls must be inlined into it to gain: pass no function pointers.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LOFI_FAST_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define LOFI_FAST_CLONES
#endif
#define LOFI_FAST_INLINED __attribute__((always_inline))  // of a lambda
#define LOFI_FAST_INLINE inline LOFI_FAST_INLINED

namespace lofi_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type that sums of T are kept in: float64 for float64, else float32.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
LOFI_FAST_INLINE Sum<T> widen(T value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
  } else {
    return static_cast<Sum<T>>(value);
  }
}

// Rounds to nearest, ties to even, as PyTorch does; without a branch for bfloat16, so that loops become vector code.
template <typename T>
LOFI_FAST_INLINE T narrow(Sum<T> value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return BFloat16(static_cast<uint16_t>(value != value ? 0x7fc0 : rounded), BFloat16::from_bits());
  } else {
    return static_cast<T>(value);
  }
}

// Calls f(T{}) with the C++ type of a floating point dtype.
template <typename F>
void with_floating_type(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, bfloat16 or float16, got ", dtype);
  }
}

// Where large blocks come fresh from the kernel, taking their pages one by one costs several times the copy itself.
inline void expect_to_fill(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t bytes = static_cast<uintptr_t>(x.numel()) * x.element_size();
  if (bytes >= (4 << 20)) {
    // All these pages hold our elements, the first and the last too. It is advice, so a refusal changes nothing.
    const uintptr_t start = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) + bytes;
    madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
  }
#else
  (void)x;
#endif
}

}  // namespace lofi_fast
