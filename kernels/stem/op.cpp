// The stem: affine, ReLU and 3x3/2 max pool in one pass, its gradient as a gather, and frames less their mean.
//
// Each image is worked on as planes of rows of pixels of `inner` adjacent channels: channels-last is N planes with all
// channels inside, contiguous is N*C planes of one channel.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../cpu.h"

namespace {

using lofi_fast::narrow;
using lofi_fast::Sum;
using lofi_fast::widen;
using lofi_fast::with_floating_type;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Positions are kept as wide as the sums beside them, so that both fill the same vector lanes.
template <typename T>
using Position = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

constexpr int64_t kGrain = 1 << 15;  // output elements that are worth a thread

bool is_channels_last(const Tensor& x) { return x.stride(1) == 1 && !x.is_contiguous(); }

Tensor dense(const Tensor& x, bool channels_last) {
  return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor empty(const std::vector<int64_t>& size, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(size, dtype, std::nullopt, std::nullopt, std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

struct Geometry {
  bool channels_last;
  int64_t channels, inner, planes;
  int64_t height, width;          // of the convolution's output
  int64_t out_height, out_width;  // windows

  Geometry(bool channels_last, int64_t num, int64_t channels, int64_t height, int64_t width)
      : channels_last(channels_last),
        channels(channels),
        inner(channels_last ? channels : 1),
        planes(channels_last ? num : num * channels),
        height(height),
        width(width),
        out_height((height + 1) / 2),
        out_width((width + 1) / 2) {}

  int64_t row() const { return width * inner; }
  int64_t out_row() const { return out_width * inner; }
  int64_t grain() const { return std::max<int64_t>(1, kGrain / out_row()); }
  // The first of the channels that a plane holds.
  int64_t channel(int64_t plane) const { return channels_last ? 0 : plane % channels; }
};

// Asks for memory that the next row will read: hardware alone was seen to leave two thirds of the time to waiting.
template <typename T>
LOFI_FAST_INLINE void prefetch(const T* from, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += kLine) {
    __builtin_prefetch(from + i);
  }
}

// For each window of a row of windows, the maximum over its pixels in one row of the image, and which pixel has it.
template <typename T>
struct RowMaximum {
  std::vector<Sum<T>> value;
  std::vector<Position<T>> position;

  explicit RowMaximum(int64_t size) : value(size), position(size) {}
};

// The ReLU is the starting value: a maximum of zero at the first pixel that is there.
template <typename T, int kFirst, int kLast>
LOFI_FAST_INLINE void maximum_of_pixels(const T* __restrict x, const Sum<T>* __restrict scale,
                                        const Sum<T>* __restrict bias, int64_t channels, Sum<T>* __restrict value,
                                        Position<T>* __restrict position) {
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    Sum<T> best = 0;
    Position<T> where = kFirst;
    for (int kx = kFirst; kx <= kLast; ++kx) {
      const Sum<T> v = widen(x[(kx - 1) * channels + c]) * scale[c] + bias[c];
      const bool take = (v > best) | (v != v);
      best = take ? v : best;
      where = take ? kx : where;
    }
    value[c] = best;
    position[c] = where;
  }
}

template <typename T>
LOFI_FAST_CLONES void maximum_of_row(const T* __restrict x, const Sum<T>* __restrict scale,
                                     const Sum<T>* __restrict bias, int64_t channels, int64_t width,
                                     Sum<T>* __restrict value, Position<T>* __restrict position) {
  if (width == 1) {
    return maximum_of_pixels<T, 1, 1>(x, scale, bias, channels, value, position);
  }
  maximum_of_pixels<T, 1, 2>(x, scale, bias, channels, value, position);
  for (int64_t j = 1; j < width / 2; ++j) {
    prefetch(x + (width + 2 * j) * channels, 2 * channels);
    maximum_of_pixels<T, 0, 2>(x + 2 * j * channels, scale, bias, channels, value + j * channels,
                               position + j * channels);
  }
  if (width % 2 != 0) {
    const int64_t j = width / 2;
    maximum_of_pixels<T, 0, 1>(x + 2 * j * channels, scale, bias, channels, value + j * channels,
                               position + j * channels);
  }
}

// The same for one channel: vectors run along the windows. Window j begins at odd[j]; even and odd have a number for
// each window and odd one more, and zeros where the row has no pixel: a zero is never above another maximum.
template <typename T>
LOFI_FAST_CLONES void maximum_of_channel_row(const T* __restrict x, Sum<T> scale, Sum<T> bias, int64_t width,
                                             Sum<T>* __restrict even, Sum<T>* __restrict odd, Sum<T>* __restrict value,
                                             Position<T>* __restrict position) {
  for (int64_t j = 0; j < width / 2; ++j) {
    even[j] = widen(x[2 * j]) * scale + bias;
    odd[j + 1] = widen(x[2 * j + 1]) * scale + bias;
  }
  if (width % 2 != 0) {
    even[width / 2] = widen(x[width - 1]) * scale + bias;
  }
  for (int64_t j = 0; j < (width + 1) / 2; ++j) {
    const Sum<T> pixels[] = {odd[j], even[j], odd[j + 1]};
    Sum<T> best = 0;
    Position<T> where = 0;
    for (int kx = 0; kx < 3; ++kx) {
      const bool take = (pixels[kx] > best) | (pixels[kx] != pixels[kx]);
      best = take ? pixels[kx] : best;
      where = take ? kx : where;
    }
    value[j] = best;
    position[j] = where;
  }
  position[0] = std::max<Position<T>>(position[0], 1);
}

template <typename T>
LOFI_FAST_CLONES void merge_rows(const Sum<T>* __restrict top, const Position<T>* __restrict top_position,
                                 const Sum<T>* __restrict middle, const Position<T>* __restrict middle_position,
                                 const Sum<T>* __restrict bottom, const Position<T>* __restrict bottom_position,
                                 int64_t size, T* __restrict pooled, int8_t* __restrict argmax) {
  for (int64_t i = 0; i < size; ++i) {
    const bool second = (middle[i] > top[i]) | (middle[i] != middle[i]);
    Sum<T> best = second ? middle[i] : top[i];
    Position<T> where = second ? middle_position[i] + 3 : top_position[i];
    const bool third = (bottom[i] > best) | (bottom[i] != bottom[i]);
    best = third ? bottom[i] : best;
    where = third ? bottom_position[i] + 6 : where;
    pooled[i] = narrow<T>(best);
    argmax[i] = static_cast<int8_t>(where);
  }
}

template <typename T>
void pool(const Geometry& g, const T* x, const Sum<T>* scale, const Sum<T>* bias, T* pooled, int8_t* argmax) {
  const int64_t out_row = g.out_row();
  torch::stable::parallel_for(0, g.planes * g.out_height, g.grain(), [&](int64_t begin, int64_t end) {
    // A row that is not there: never above another as the last, and as the first it says where the window's first
    // pixel is, in the row below.
    RowMaximum<T> nothing(out_row);
    std::fill(nothing.position.begin(), nothing.position.end(), 3);
    std::fill_n(nothing.position.begin(), g.inner, 4);
    RowMaximum<T> top(out_row), middle(out_row), bottom(out_row);
    std::vector<Sum<T>> even(g.out_width), odd(g.out_width + 1);

    const auto read = [&](int64_t plane, int64_t y, RowMaximum<T>& row) {
      const T* from = x + (plane * g.height + y) * g.row();
      const int64_t c = g.channel(plane);
      if (g.channels_last) {
        maximum_of_row<T>(from, scale, bias, g.channels, g.width, row.value.data(), row.position.data());
      } else {
        maximum_of_channel_row<T>(from, scale[c], bias[c], g.width, even.data(), odd.data(), row.value.data(),
                                  row.position.data());
      }
    };
    for (int64_t index = begin; index < end; ++index) {
      const int64_t plane = index / g.out_height;
      const int64_t i = index % g.out_height;
      if (i > 0 && index == begin) {
        read(plane, 2 * i - 1, top);
      }
      read(plane, 2 * i, middle);
      const bool last = 2 * i + 1 == g.height;
      if (!last) {
        read(plane, 2 * i + 1, bottom);
      }
      const RowMaximum<T>& above = i == 0 ? nothing : top;
      const RowMaximum<T>& below = last ? nothing : bottom;
      merge_rows<T>(above.value.data(), above.position.data(), middle.value.data(), middle.position.data(),
                    below.value.data(), below.position.data(), out_row, pooled + index * out_row,
                    argmax + index * out_row);
      std::swap(top, bottom);  // the row between two windows belongs to both
    }
  });
}

// The scale of each channel, 1 where none is given.
template <typename T>
class Scale {
 public:
  Scale(const std::optional<Tensor>& scale, int64_t channels, const char* op) {
    if (!scale) {
      ones_.assign(channels, 1);
      return;
    }
    given_.emplace(torch::stable::contiguous(*scale));
    STD_TORCH_CHECK(given_->numel() == channels, op, ": scale must be (", channels, ",)");
  }

  const Sum<T>* data() const { return given_ ? given_->const_data_ptr<Sum<T>>() : ones_.data(); }

 private:
  std::optional<Tensor> given_;
  std::vector<Sum<T>> ones_;
};

std::tuple<Tensor, Tensor> stem(const Tensor& x, std::optional<Tensor> scale, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() == 4, "stem: x must be (N, C, H, W), not of ", x.dim(), " dimensions");
  const Geometry g(is_channels_last(x), x.size(0), x.size(1), x.size(2), x.size(3));
  const std::vector<int64_t> size{x.size(0), x.size(1), g.out_height, g.out_width};
  Tensor pooled = empty(size, x.scalar_type(), g.channels_last);
  Tensor argmax = empty(size, ScalarType::Char, g.channels_last);
  const Tensor source = dense(x, g.channels_last);
  const Tensor bias_C = torch::stable::contiguous(bias);
  STD_TORCH_CHECK(bias_C.numel() == g.channels, "stem: bias must be (", g.channels, ",)");
  if (pooled.numel() == 0) {
    return {pooled, argmax};
  }
  with_floating_type(x.scalar_type(), "stem", [&](auto zero) {
    using T = decltype(zero);
    const Scale<T> scale_C(scale, g.channels, "stem");
    pool<T>(g, source.const_data_ptr<T>(), scale_C.data(), bias_C.const_data_ptr<Sum<T>>(),
            pooled.mutable_data_ptr<T>(), argmax.mutable_data_ptr<int8_t>());
  });
  return {pooled, argmax};
}

// A row of windows as the gather reads it: gradients, and the position each belongs to, -1 for nowhere. One more
// window follows on the right that belongs nowhere.
template <typename T>
struct RowOfWindows {
  std::vector<Sum<T>> grad;
  std::vector<Position<T>> position;

  explicit RowOfWindows(int64_t size) : grad(size, 0), position(size, -1) {}
};

template <typename T>
LOFI_FAST_CLONES void read_windows(const T* __restrict grad, const T* __restrict pooled,
                                   const int8_t* __restrict argmax, int64_t size, Sum<T>* __restrict to,
                                   Position<T>* __restrict position) {
  for (int64_t i = 0; i < size; ++i) {
    to[i] = widen(grad[i]);
    position[i] = widen(pooled[i]) <= 0 ? -1 : argmax[i];
  }
}

// `value` if kept, else zero. A mask of bits, because the compiler makes branches of conditional sums.
template <typename T>
LOFI_FAST_INLINE Sum<T> keep(bool kept, Sum<T> value) {
  return std::bit_cast<Sum<T>>(std::bit_cast<Position<T>>(value) & -static_cast<Position<T>>(kept));
}

// The four pixels (2i, 2j), (2i, 2j + 1), (2i + 1, 2j), (2i + 1, 2j + 1), from the windows (i, j), (i, j + 1),
// (i + 1, j), (i + 1, j + 1) that meet there. Loads come first and are unconditional, so that loops become vector code.
template <typename T>
struct Block {
  Sum<T> even_left, even_right, odd_left, odd_right;

  LOFI_FAST_INLINE Block(const Sum<T>* __restrict upper, const Position<T>* __restrict upper_at,
                         const Sum<T>* __restrict lower, const Position<T>* __restrict lower_at, int64_t left,
                         int64_t right) {
    const Sum<T> g00 = upper[left], g01 = upper[right], g10 = lower[left], g11 = lower[right];
    const Position<T> p00 = upper_at[left], p01 = upper_at[right], p10 = lower_at[left], p11 = lower_at[right];
    even_left = keep<T>(p00 == 4, g00);
    even_right = keep<T>(p00 == 5, g00) + keep<T>(p01 == 3, g01);
    odd_left = keep<T>(p00 == 7, g00) + keep<T>(p10 == 1, g10);
    odd_right = keep<T>(p00 == 8, g00) + keep<T>(p01 == 6, g01) + keep<T>(p10 == 2, g10) + keep<T>(p11 == 0, g11);
  }
};

template <typename T>
LOFI_FAST_INLINE void gather_pixels(const Sum<T>* __restrict upper, const Position<T>* __restrict upper_at,
                                    const Sum<T>* __restrict lower, const Position<T>* __restrict lower_at,
                                    const Sum<T>* __restrict scale, int64_t channels, T* __restrict even_left,
                                    T* __restrict even_right, T* __restrict odd_left, T* __restrict odd_right) {
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    const Block<T> block(upper, upper_at, lower, lower_at, c, c + channels);
    even_left[c] = narrow<T>(block.even_left * scale[c]);
    even_right[c] = narrow<T>(block.even_right * scale[c]);
    odd_left[c] = narrow<T>(block.odd_left * scale[c]);
    odd_right[c] = narrow<T>(block.odd_right * scale[c]);
  }
}

// Rows 2i and 2i + 1 of the gradient: the first lies inside one row of windows, the second between two.
template <typename T>
LOFI_FAST_CLONES void gather_rows(const Sum<T>* upper, const Position<T>* upper_at, const Sum<T>* lower,
                                  const Position<T>* lower_at, const Sum<T>* scale, int64_t channels, int64_t width,
                                  T* even, T* odd, T* nowhere) {
  for (int64_t j = 0; j < (width + 1) / 2; ++j) {
    const int64_t from = j * channels;
    const bool right = 2 * j + 1 < width;
    gather_pixels<T>(upper + from, upper_at + from, lower + from, lower_at + from, scale, channels, even + 2 * from,
                     right ? even + 2 * from + channels : nowhere, odd + 2 * from,
                     right ? odd + 2 * from + channels : nowhere + channels);
  }
}

// The same for one channel: vectors run along the windows.
template <typename T>
LOFI_FAST_CLONES void gather_channel_rows(const Sum<T>* __restrict upper, const Position<T>* __restrict upper_at,
                                          const Sum<T>* __restrict lower, const Position<T>* __restrict lower_at,
                                          Sum<T> scale, int64_t width, T* __restrict even, T* __restrict odd) {
  for (int64_t j = 0; j < width / 2; ++j) {
    const Block<T> block(upper, upper_at, lower, lower_at, j, j + 1);
    even[2 * j] = narrow<T>(block.even_left * scale);
    even[2 * j + 1] = narrow<T>(block.even_right * scale);
    odd[2 * j] = narrow<T>(block.odd_left * scale);
    odd[2 * j + 1] = narrow<T>(block.odd_right * scale);
  }
  if (width % 2 != 0) {
    const int64_t j = width / 2;
    const Block<T> block(upper, upper_at, lower, lower_at, j, j + 1);
    even[2 * j] = narrow<T>(block.even_left * scale);
    odd[2 * j] = narrow<T>(block.odd_left * scale);
  }
}

template <typename T>
void unpool(const Geometry& g, const T* grad, const T* pooled, const int8_t* argmax, const Sum<T>* scale, T* grad_x) {
  const int64_t out_row = g.out_row();
  torch::stable::parallel_for(0, g.planes * g.out_height, g.grain(), [&](int64_t begin, int64_t end) {
    const RowOfWindows<T> nothing(out_row + g.inner);
    RowOfWindows<T> upper(out_row + g.inner), lower(out_row + g.inner);
    std::vector<T> no_row(g.row());
    std::vector<T> no_pixels(2 * g.inner);

    const auto read = [&](int64_t index, RowOfWindows<T>& row) {
      read_windows<T>(grad + index * out_row, pooled + index * out_row, argmax + index * out_row, out_row,
                      row.grad.data(), row.position.data());
    };
    for (int64_t index = begin; index < end; ++index) {
      const int64_t plane = index / g.out_height;
      const int64_t i = index % g.out_height;
      if (i == 0 || index == begin) {
        read(index, upper);
      }
      const bool last = i + 1 == g.out_height;
      if (!last) {
        read(index + 1, lower);
      }
      const RowOfWindows<T>& next = last ? nothing : lower;
      T* even = grad_x + (plane * g.height + 2 * i) * g.row();
      T* odd = 2 * i + 1 < g.height ? even + g.row() : no_row.data();
      if (g.channels_last) {
        gather_rows<T>(upper.grad.data(), upper.position.data(), next.grad.data(), next.position.data(), scale,
                       g.channels, g.width, even, odd, no_pixels.data());
      } else {
        gather_channel_rows<T>(upper.grad.data(), upper.position.data(), next.grad.data(), next.position.data(),
                               scale[g.channel(plane)], g.width, even, odd);
      }
      std::swap(upper, lower);
    }
  });
}

Tensor stem_backward(const Tensor& grad, const Tensor& pooled, const Tensor& argmax, std::optional<Tensor> scale,
                     int64_t height, int64_t width) {
  STD_TORCH_CHECK(grad.dim() == 4, "stem_backward: grad must be (N, C, h, w), not of ", grad.dim(), " dimensions");
  const Geometry g(is_channels_last(grad), grad.size(0), grad.size(1), height, width);
  for (const Tensor* tensor : {&grad, &pooled, &argmax}) {
    STD_TORCH_CHECK(tensor->dim() == 4 && tensor->size(0) == grad.size(0) && tensor->size(1) == g.channels &&
                        tensor->size(2) == g.out_height && tensor->size(3) == g.out_width,
                    "stem_backward: grad, pooled and argmax must be (N, C, ", g.out_height, ", ", g.out_width, ")");
  }
  Tensor grad_x = empty({grad.size(0), g.channels, height, width}, grad.scalar_type(), g.channels_last);
  const Tensor grad_dense = dense(grad, g.channels_last);
  const Tensor pooled_dense = dense(pooled, g.channels_last);
  const Tensor argmax_dense = dense(argmax, g.channels_last);
  if (grad_x.numel() == 0) {
    return grad_x;
  }
  with_floating_type(grad.scalar_type(), "stem_backward", [&](auto zero) {
    using T = decltype(zero);
    const Scale<T> scale_C(scale, g.channels, "stem_backward");
    unpool<T>(g, grad_dense.const_data_ptr<T>(), pooled_dense.const_data_ptr<T>(),
              argmax_dense.const_data_ptr<int8_t>(), scale_C.data(), grad_x.mutable_data_ptr<T>());
  });
  return grad_x;
}

constexpr int64_t kColours = 192;  // values of a repeated pattern of three that fill whole vectors at every width

template <typename T>
LOFI_FAST_CLONES void subtract_mean(const uint8_t* __restrict frames, const Sum<T>* __restrict means, int64_t size,
                                    T* __restrict to) {
  for (; size >= kColours; size -= kColours, frames += kColours, to += kColours) {
    for (int64_t i = 0; i < kColours; ++i) {
      to[i] = narrow<T>(static_cast<Sum<T>>(frames[i]) - means[i]);
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    to[i] = narrow<T>(static_cast<Sum<T>>(frames[i]) - means[i]);
  }
}

Tensor stem_input(const Tensor& frames, const Tensor& mean, ScalarType dtype) {
  STD_TORCH_CHECK(frames.dim() == 4 && frames.size(3) == 3, "stem_input: frames must be (N, H, W, 3)");
  const Tensor source = torch::stable::contiguous(frames);
  const Tensor mean_3 = torch::stable::contiguous(mean);
  STD_TORCH_CHECK(mean_3.numel() == 3, "stem_input: mean must be (3,)");
  Tensor x = empty({frames.size(0), 3, frames.size(1), frames.size(2)}, dtype, true);
  const uint8_t* from = source.const_data_ptr<uint8_t>();
  const float* means = mean_3.const_data_ptr<float>();
  with_floating_type(dtype, "stem_input", [&](auto zero) {
    using T = decltype(zero);
    Sum<T> pattern[kColours];
    for (int64_t i = 0; i < kColours; ++i) {
      pattern[i] = means[i % 3];
    }
    T* to = x.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, x.numel() / 3, kGrain, [&](int64_t begin, int64_t end) {
      subtract_mean<T>(from + 3 * begin, pattern, 3 * (end - begin), to + 3 * begin);
    });
  });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lofi_fast, CPU, m) {
  m.impl("stem", TORCH_BOX(&stem));
  m.impl("stem_backward", TORCH_BOX(&stem_backward));
  m.impl("stem_input", TORCH_BOX(&stem_input));
}
