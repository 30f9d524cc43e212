// CPU form of quantize and dequantize; reference.py in this folder is the definition, and every operation here keeps
// its order.
//
// Maps are worked on as planes of pixels of `inner` adjacent channels: channels-last is N planes with all channels
// inside, contiguous is N*C planes of one channel. A plane is read twice, the second time from the cache.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../cpu.h"

namespace {

using lofi_fast::narrow;
using lofi_fast::Sum;
using lofi_fast::widen;
using lofi_fast::with_floating_type;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

struct Planes {
  MemoryFormat memory_format;
  int64_t num;
  int64_t size;
  int64_t inner;
  // Elements that the loops take at once: some pixels, a power of two, so that the loops are long at few channels.
  int64_t period;

  explicit Planes(const Tensor& x) {
    const bool channels_last = x.stride(1) == 1 && !x.is_contiguous();
    const int64_t pixels = x.size(2) * x.size(3);
    memory_format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    inner = channels_last ? x.size(1) : 1;
    num = channels_last ? x.size(0) : x.size(0) * x.size(1);
    size = inner * pixels;
    // Of one channel few, because the maxima over a period are then reduced to one.
    const int64_t repeats = std::min(inner == 1 ? 64 : 512 / inner, pixels);
    period = inner * static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(1, repeats))));
  }

  Tensor dense(const Tensor& x) const { return torch::stable::contiguous(x, memory_format); }

  Tensor empty_like(const Tensor& x, ScalarType dtype) const {
    return torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, dtype, std::nullopt, std::nullopt,
                                std::nullopt, memory_format);
  }

  // Calls f(plane) for every plane, and gives each thread a copy of f.
  template <typename F>
  void for_each(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
    torch::stable::parallel_for(0, num, grain, [&](int64_t begin, int64_t end) {
      F mine = f;
      for (int64_t plane = begin; plane < end; ++plane) {
        mine(plane);
      }
    });
  }
};

// As wide as the numbers beside them, so that both fill the same vector lanes.
template <typename S>
using Bits = std::conditional_t<std::is_same_v<S, double>, int64_t, int32_t>;

// Of `period` elements in turn: each of `largest` becomes the maximum of itself and the values that meet it.
template <typename T>
LOFI_FAST_CLONES void raise_to_maximum(Sum<T>* __restrict largest, const T* __restrict x, int64_t num, int64_t period) {
  for (int64_t first = 0; first < num; first += period) {
    const int64_t length = std::min(period, num - first);
    for (int64_t i = 0; i < length; ++i) {
      const Sum<T> value = widen(x[first + i]);
      const bool take = (value > largest[i]) | (value != value);  // a NaN, once taken, is above everything
      largest[i] = take ? value : largest[i];
    }
  }
}

// The maxima over all pixels of a period, in its first pixel. The bits of numbers that are not negative have their
// order, with NaN above all; where numbers are compared, the compiler makes branches, which are guessed wrong.
template <typename S>
LOFI_FAST_CLONES void fold(S* largest, int64_t inner, int64_t period) {
  constexpr Bits<S> kWithoutSign = std::numeric_limits<Bits<S>>::max();
  for (int64_t half = period / 2; half >= inner; half /= 2) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) {
      const Bits<S> a = std::bit_cast<Bits<S>>(largest[i]) & kWithoutSign;
      const Bits<S> b = std::bit_cast<Bits<S>>(largest[half + i]) & kWithoutSign;
      largest[i] = std::bit_cast<S>(a > b ? a : b);
    }
  }
}

// The numbers of channels, `period` elements in turn, where kStep is 1; where it is 0, one channel fills all elements.
template <typename T, int kStep>
LOFI_FAST_CLONES void encode(const T* __restrict x, const Sum<T>* __restrict inverse, uint8_t* __restrict codes,
                             int64_t num, int64_t period) {
  // Here numbers are one apart: the sum is rounded to a whole number, ties to even, and ends in its bits.
  constexpr Sum<T> kWhole = 1 / std::numeric_limits<Sum<T>>::epsilon();
  using Code = Bits<Sum<T>>;
  for (int64_t first = 0; first < num; first += period) {
    const int64_t length = std::min(period, num - first);
    for (int64_t i = 0; i < length; ++i) {
      const Sum<T> value = widen(x[first + i]);
      const Sum<T> steps = value * inverse[kStep * i];
      // Masks of bits, because the compiler makes branches of conditions, which are guessed wrong.
      const Code above_1 = -static_cast<Code>(steps > 1);
      const Code passed = -static_cast<Code>(!(value <= 0));
      const Code code = (std::bit_cast<Code>(steps + kWhole) & above_1) | (1 & ~above_1);
      codes[first + i] = static_cast<uint8_t>(code & passed);
    }
  }
}

template <typename T, int kStep>
LOFI_FAST_CLONES void decode(const uint8_t* __restrict codes, const Sum<T>* __restrict scale, T* __restrict x,
                             int64_t num, int64_t period) {
  for (int64_t first = 0; first < num; first += period) {
    const int64_t length = std::min(period, num - first);
    for (int64_t i = 0; i < length; ++i) {
      x[first + i] = narrow<T>(static_cast<Sum<T>>(codes[first + i]) * scale[kStep * i]);
    }
  }
}

// Fills a period with its first `inner` numbers. In doubling pieces: one by one, each would wait for the one before.
template <typename S>
void repeat(std::vector<S>& numbers, int64_t inner) {
  for (int64_t filled = inner; filled < static_cast<int64_t>(numbers.size()); filled *= 2) {
    std::copy_n(numbers.begin(), filled, numbers.begin() + filled);
  }
}

template <typename T>
void encode_planes(const Planes& planes, const T* x, uint8_t* codes, Sum<T>* scale) {
  using S = Sum<T>;
  planes.for_each([&, largest = std::vector<S>(planes.period)](int64_t plane) mutable {
    const int64_t at = plane * planes.size;
    std::fill(largest.begin(), largest.end(), 0);
    raise_to_maximum(largest.data(), x + at, planes.size, planes.period);
    fold(largest.data(), planes.inner, planes.period);
    for (int64_t channel = 0; channel < planes.inner; ++channel) {
      const S step = largest[channel] / 255;
      const S bounded = step < std::numeric_limits<S>::min() ? std::numeric_limits<S>::min() : step;
      scale[plane * planes.inner + channel] = largest[channel] == 0 ? 0 : bounded;
      largest[channel] = 1 / bounded;
    }
    if (planes.inner == 1) {
      encode<T, 0>(x + at, largest.data(), codes + at, planes.size, planes.size);
    } else {
      repeat(largest, planes.inner);
      encode<T, 1>(x + at, largest.data(), codes + at, planes.size, planes.period);
    }
  });
}

std::tuple<Tensor, Tensor> quantize(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "quantize: x must be (N, C, H, W), not of ", x.dim(), " dimensions");
  const Planes planes(x);
  const Tensor source = planes.dense(x);
  Tensor codes = planes.empty_like(x, ScalarType::Byte);
  const ScalarType exact = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor scale = torch::stable::empty({x.size(0), x.size(1)}, exact);
  lofi_fast::expect_to_fill(codes);
  with_floating_type(x.scalar_type(), "quantize", [&](auto zero) {
    using T = decltype(zero);
    encode_planes<T>(planes, source.const_data_ptr<T>(), codes.mutable_data_ptr<uint8_t>(),
                     scale.mutable_data_ptr<Sum<T>>());
  });
  return {codes, scale};
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, ScalarType dtype) {
  STD_TORCH_CHECK(
      codes.dim() == 4 && scale.dim() == 2 && scale.size(0) == codes.size(0) && scale.size(1) == codes.size(1),
      "dequantize: codes must be (N, C, H, W) and scale (N, C)");
  const Planes planes(codes);
  const Tensor source = planes.dense(codes);
  const Tensor scale_NC = torch::stable::contiguous(scale);
  Tensor x = planes.empty_like(codes, dtype);
  lofi_fast::expect_to_fill(x);
  with_floating_type(dtype, "dequantize", [&](auto zero) {
    using T = decltype(zero);
    const uint8_t* const from = source.const_data_ptr<uint8_t>();
    const Sum<T>* const scales = scale_NC.const_data_ptr<Sum<T>>();
    T* const to = x.mutable_data_ptr<T>();
    planes.for_each([&, repeated = std::vector<Sum<T>>(planes.period)](int64_t plane) mutable {
      const int64_t at = plane * planes.size;
      if (planes.inner == 1) {
        decode<T, 0>(from + at, scales + plane, to + at, planes.size, planes.size);
      } else {
        std::copy_n(scales + plane * planes.inner, planes.inner, repeated.begin());
        repeat(repeated, planes.inner);
        decode<T, 1>(from + at, repeated.data(), to + at, planes.size, planes.period);
      }
    });
  });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lofi_fast, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}
