// CPU form of residual_shift and of its backward; reference.py in this folder is the definition, and every operation
// here keeps its order.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../temporal_shift/images.h"

namespace {

using lofi_fast::Block;
using lofi_fast::Blocks;
using lofi_fast::Images;
using lofi_fast::narrow;
using lofi_fast::Sum;
using lofi_fast::widen;
using torch::stable::Tensor;

enum class Identity { kNone, kPlain, kScaled };

template <typename F>
void with_identity(Identity identity, const F& f) {
  switch (identity) {
    case Identity::kNone:
      return f(std::integral_constant<Identity, Identity::kNone>{});
    case Identity::kPlain:
      return f(std::integral_constant<Identity, Identity::kPlain>{});
    case Identity::kScaled:
      return f(std::integral_constant<Identity, Identity::kScaled>{});
  }
}

// A number for each channel. Where a row is one pixel they are repeated for several, so that the loops are long.
template <typename S>
class Channels {
 public:
  // Where none are given they are 1, as a scale is.
  Channels(const char* op, const char* name, const std::optional<Tensor>& numbers, const Images& images) {
    if (!numbers) {
      numbers_.assign(period(images), 1);
      return;
    }
    STD_TORCH_CHECK(numbers->dim() == 1 && numbers->size(0) == images.channels && numbers->is_cpu(), op, ": ", name,
                    " must be (", images.channels, ",) on the CPU");
    const S* const data = numbers->const_data_ptr<S>();  // checks the dtype
    for (int64_t i = 0; i < period(images); i += images.channels) {
      for (int64_t channel = 0; channel < images.channels; ++channel) {
        numbers_.push_back(data[channel * numbers->stride(0)]);
      }
    }
  }

  static int64_t period(const Images& images) {
    return images.channels * (images.inner == 1 ? std::max<int64_t>(1, 512 / images.channels) : 1);
  }

  const S* data() const { return numbers_.data(); }

 private:
  std::vector<S> numbers_;
};

// The numbers of channels, `period` elements in turn, where kStep is 1; where it is 0, one channel fills all elements.
template <typename T, Identity kIdentity, int kStep>
LOFI_FAST_CLONES void affine_relu(const T* __restrict x, const Sum<T>* __restrict scale, const Sum<T>* __restrict bias,
                                  const T* __restrict identity, const Sum<T>* __restrict identity_scale,
                                  const Sum<T>* __restrict identity_bias, T* __restrict out, int64_t num,
                                  int64_t period) {
  for (int64_t first = 0; first < num; first += period) {
    const int64_t length = std::min(period, num - first);
    for (int64_t i = 0; i < length; ++i) {
      Sum<T> value = widen(x[first + i]) * scale[kStep * i] + bias[kStep * i];
      if constexpr (kIdentity == Identity::kPlain) {
        value += widen(identity[first + i]);
      } else if constexpr (kIdentity == Identity::kScaled) {
        value += widen(identity[first + i]) * identity_scale[kStep * i] + identity_bias[kStep * i];
      }
      out[first + i] = narrow<T>(value < 0 ? 0 : value);  // a NaN stays
    }
  }
}

template <typename T, bool kBoth, Identity kIdentity, int kStep>
LOFI_FAST_CLONES void affine_relu_backward(const T* __restrict grad, const T* __restrict other_grad,
                                           const T* __restrict out, const Sum<T>* __restrict scale,
                                           const Sum<T>* __restrict identity_scale, T* __restrict grad_x,
                                           T* __restrict grad_identity, int64_t num, int64_t period) {
  for (int64_t first = 0; first < num; first += period) {
    const int64_t length = std::min(period, num - first);
    for (int64_t i = 0; i < length; ++i) {
      Sum<T> value = widen(grad[first + i]);
      if constexpr (kBoth) {
        value += widen(other_grad[first + i]);
      }
      value = widen(out[first + i]) <= 0 ? 0 : value;
      grad_x[first + i] = narrow<T>(value * scale[kStep * i]);
      if constexpr (kIdentity == Identity::kPlain) {
        grad_identity[first + i] = narrow<T>(value);
      } else if constexpr (kIdentity == Identity::kScaled) {
        grad_identity[first + i] = narrow<T>(value * identity_scale[kStep * i]);
      }
    }
  }
}

// Where a block of a frame lies, and the same block of the frames beside it, in elements. Frames of a snippet form a
// ring here: at its ends, where values leave the snippet, zeros take their place at the other end.
struct Place {
  int64_t at;
  int64_t previous;
  int64_t next;
  bool is_first;
  bool is_last;

  Place(const Block& block, const Images& images, int64_t num_frames) {
    const int64_t frame = block.image % num_frames;
    const int64_t around = (num_frames - 1) * images.image();
    at = block.image * images.image() + block.first_row * images.row();
    is_first = frame == 0;
    is_last = frame + 1 == num_frames;
    previous = is_first ? at + around : at - images.image();
    next = is_last ? at - around : at + images.image();
  }

  // Of a channel, where its shifted values lie, and whether zeros are there.
  std::pair<int64_t, bool> shifted(int64_t channel, int64_t fold) const {
    if (channel < fold) {
      return {previous, is_first};
    }
    return channel < 2 * fold ? std::pair(next, is_last) : std::pair(at, false);
  }
};

template <typename T>
char* bytes(T* data) {
  return reinterpret_cast<char*>(data);
}

template <typename T>
const char* bytes(const T* data) {
  return reinterpret_cast<const char*>(data);
}

// Elements of one block: few enough that what was computed is still in the second cache when it is copied.
constexpr int64_t kBlock = 32768;
constexpr int64_t kGrain = 2;

template <typename T>
T* skip(T* data, int64_t element) {
  return data != nullptr ? data + element : nullptr;
}

template <typename T>
struct Forward {
  const T* x;
  const Sum<T>* scale;
  const Sum<T>* bias;
  const T* identity;
  const Sum<T>* identity_scale;
  const Sum<T>* identity_bias;
  T* out;
  T* shifted;  // nullptr where none is wanted
  Images images;
  int64_t num_frames;
  int64_t fold;

  template <Identity kIdentity>
  void run() const {
    const Blocks blocks(images, kBlock);
    torch::stable::parallel_for(0, blocks.num(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const Block block = blocks[index];
        const Place place(block, images, num_frames);
        if (images.inner == 1) {
          rows<kIdentity>(place, block.num_rows);
        } else {
          planes<kIdentity>(place, block.num_rows);
        }
      }
    });
  }

  template <Identity kIdentity>
  void rows(const Place& place, int64_t num_rows) const {
    affine_relu<T, kIdentity, 1>(x + place.at, scale, bias, skip(identity, place.at), identity_scale, identity_bias,
                                 out + place.at, num_rows * images.channels, Channels<Sum<T>>::period(images));
    if (shifted != nullptr) {
      const char* const computed = bytes(out + place.at);
      lofi_fast::copy_rows({bytes(shifted + place.previous), place.is_first ? nullptr : computed},
                           {bytes(shifted + place.next), place.is_last ? nullptr : computed},
                           {bytes(shifted + place.at), computed}, num_rows, images.channels * sizeof(T),
                           fold * sizeof(T));
    }
  }

  template <Identity kIdentity>
  void planes(const Place& place, int64_t num_rows) const {
    for (int64_t plane = 0; plane < num_rows * images.channels; ++plane) {
      const int64_t channel = plane % images.channels;
      const int64_t offset = plane * images.inner;
      const int64_t at = place.at + offset;
      affine_relu<T, kIdentity, 0>(x + at, scale + channel, bias + channel, skip(identity, at),
                                   skip(identity_scale, channel), skip(identity_bias, channel), out + at, images.inner,
                                   images.inner);
      if (shifted != nullptr) {
        const auto [to, lost] = place.shifted(channel, fold);
        const char* const computed = lost ? nullptr : bytes(out + at);
        lofi_fast::copy_or_clear({bytes(shifted + to + offset), computed}, 0, images.inner * sizeof(T));
      }
    }
  }
};

template <typename T>
struct Backward {
  const T* grad_out;  // this or the next may be nullptr, not both
  const T* grad_shifted;
  const T* out;
  const Sum<T>* scale;
  const Sum<T>* identity_scale;
  T* grad_x;
  T* grad_identity;
  Images images;
  int64_t num_frames;
  int64_t fold;

  template <Identity kIdentity>
  void run() const {
    const Blocks blocks(images, kBlock);
    torch::stable::parallel_for(0, blocks.num(), kGrain, [&](int64_t begin, int64_t end) {
      // grad_shifted, shifted back; for planes only the zeros from outside the snippet.
      std::vector<T> scratch(images.inner == 1 ? std::max(kBlock, images.row()) : images.inner);
      for (int64_t index = begin; index < end; ++index) {
        const Block block = blocks[index];
        const Place place(block, images, num_frames);
        if (images.inner == 1) {
          rows<kIdentity>(place, block.num_rows, scratch.data());
        } else {
          planes<kIdentity>(place, block.num_rows, scratch.data());
        }
      }
    });
  }

  template <Identity kIdentity>
  void rows(const Place& place, int64_t num_rows, T* scratch) const {
    if (grad_shifted != nullptr) {
      char* const to = bytes(scratch);
      lofi_fast::copy_rows({to, place.is_first ? nullptr : bytes(grad_shifted + place.previous)},
                           {to, place.is_last ? nullptr : bytes(grad_shifted + place.next)},
                           {to, bytes(grad_shifted + place.at)}, num_rows, images.channels * sizeof(T),
                           fold * sizeof(T));
    }
    both_or_one<kIdentity, 1>(scratch, place.at, 0, num_rows * images.channels, Channels<Sum<T>>::period(images));
  }

  template <Identity kIdentity>
  void planes(const Place& place, int64_t num_rows, const T* zeros) const {
    for (int64_t plane = 0; plane < num_rows * images.channels; ++plane) {
      const int64_t channel = plane % images.channels;
      const int64_t offset = plane * images.inner;
      const auto [source, lost] = place.shifted(channel, fold);
      both_or_one<kIdentity, 0>(lost ? zeros : skip(grad_shifted, source + offset), place.at + offset, channel,
                                images.inner, images.inner);
    }
  }

  template <Identity kIdentity, int kStep>
  void both_or_one(const T* shifted_back, int64_t at, int64_t channel, int64_t num, int64_t period) const {
    if (grad_out != nullptr && grad_shifted != nullptr) {
      affine_relu_backward<T, true, kIdentity, kStep>(grad_out + at, shifted_back, out + at, scale + channel,
                                                      skip(identity_scale, channel), grad_x + at,
                                                      skip(grad_identity, at), num, period);
    } else {
      affine_relu_backward<T, false, kIdentity, kStep>(grad_out != nullptr ? grad_out + at : shifted_back, nullptr,
                                                       out + at, scale + channel, skip(identity_scale, channel),
                                                       grad_x + at, skip(grad_identity, at), num, period);
    }
  }
};

void check_like(const char* op, const char* name, const std::optional<Tensor>& tensor, const Tensor& like) {
  if (!tensor) {
    return;
  }
  bool same = tensor->dim() == 4 && tensor->is_cpu() && tensor->scalar_type() == like.scalar_type();
  for (int dim = 0; same && dim < 4; ++dim) {
    same = tensor->size(dim) == like.size(dim);
  }
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape, dtype and device of the features");
}

std::optional<Tensor> laid_out_as(const Tensor& like, const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(lofi_fast::laid_out_as(like, *tensor)) : std::nullopt;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

std::tuple<Tensor, Tensor> residual_shift(const Tensor& x, std::optional<Tensor> scale, const Tensor& bias,
                                          std::optional<Tensor> identity, std::optional<Tensor> identity_scale,
                                          std::optional<Tensor> identity_bias, int64_t num_frames, int64_t fold) {
  const char* const op = "residual_shift";
  lofi_fast::check_snippets(op, x, num_frames, fold);
  check_like(op, "identity", identity, x);
  STD_TORCH_CHECK(identity_scale.has_value() == identity_bias.has_value() && (identity || !identity_scale), op,
                  ": identity_scale and identity_bias come together, and with identity");
  Tensor out = torch::stable::empty_like(x);
  Tensor shifted = fold > 0 ? torch::stable::empty_like(x) : nothing(x);
  if (x.numel() == 0) {
    return {out, shifted};
  }
  const std::optional<Images> images = lofi_fast::images_of(out);
  if (!images) {
    const auto [plain_out, plain_shifted] =
        residual_shift(torch::stable::contiguous(x), scale, bias, contiguous(identity), identity_scale, identity_bias,
                       num_frames, fold);
    torch::stable::copy_(out, plain_out);
    torch::stable::copy_(shifted, plain_shifted);
    return {out, shifted};
  }
  const Tensor source = lofi_fast::laid_out_as(out, x);
  const std::optional<Tensor> added = laid_out_as(out, identity);
  lofi_fast::expect_to_fill(out);
  lofi_fast::expect_to_fill(shifted);
  lofi_fast::with_floating_type(x.scalar_type(), op, [&](auto type) {
    using T = decltype(type);
    const Channels<Sum<T>> scales(op, "scale", scale, *images);
    const Channels<Sum<T>> biases(op, "bias", bias, *images);
    const Channels<Sum<T>> identity_scales(op, "identity_scale", identity_scale, *images);
    const Channels<Sum<T>> identity_biases(op, "identity_bias", identity_bias, *images);
    const Forward<T> forward{static_cast<const T*>(source.const_data_ptr()),
                             scales.data(),
                             biases.data(),
                             data_of<T>(added),
                             identity_scales.data(),
                             identity_biases.data(),
                             static_cast<T*>(out.mutable_data_ptr()),
                             fold > 0 ? static_cast<T*>(shifted.mutable_data_ptr()) : nullptr,
                             *images,
                             num_frames,
                             fold};
    with_identity(identity_scale ? Identity::kScaled
                  : identity     ? Identity::kPlain
                                 : Identity::kNone,
                  [&](auto kind) { forward.template run<kind()>(); });
  });
  return {out, shifted};
}

std::tuple<Tensor, Tensor> residual_shift_backward(std::optional<Tensor> grad_out, std::optional<Tensor> grad_shifted,
                                                   const Tensor& out, std::optional<Tensor> scale,
                                                   std::optional<Tensor> identity_scale, bool with_identity_grad,
                                                   int64_t num_frames, int64_t fold) {
  const char* const op = "residual_shift_backward";
  lofi_fast::check_snippets(op, out, num_frames, fold);
  check_like(op, "grad_out", grad_out, out);
  check_like(op, "grad_shifted", grad_shifted, out);
  Tensor grad_x = torch::stable::empty_like(out);
  Tensor grad_identity = with_identity_grad ? torch::stable::empty_like(out) : nothing(out);
  if (out.numel() == 0) {
    return {grad_x, grad_identity};
  }
  if (!grad_out && !grad_shifted) {
    torch::stable::zero_(grad_x);
    torch::stable::zero_(grad_identity);
    return {grad_x, grad_identity};
  }
  const std::optional<Images> images = lofi_fast::images_of(grad_x);
  if (!images) {
    const auto [plain_x, plain_identity] =
        residual_shift_backward(contiguous(grad_out), contiguous(grad_shifted), torch::stable::contiguous(out), scale,
                                identity_scale, with_identity_grad, num_frames, fold);
    torch::stable::copy_(grad_x, plain_x);
    torch::stable::copy_(grad_identity, plain_identity);
    return {grad_x, grad_identity};
  }
  const Tensor source = lofi_fast::laid_out_as(grad_x, out);
  const std::optional<Tensor> grad = laid_out_as(grad_x, grad_out);
  const std::optional<Tensor> other_grad = laid_out_as(grad_x, grad_shifted);
  lofi_fast::expect_to_fill(grad_x);
  lofi_fast::expect_to_fill(grad_identity);
  lofi_fast::with_floating_type(out.scalar_type(), op, [&](auto type) {
    using T = decltype(type);
    const Channels<Sum<T>> scales(op, "scale", scale, *images);
    const Channels<Sum<T>> identity_scales(op, "identity_scale", identity_scale, *images);
    const Backward<T> backward{data_of<T>(grad),
                               data_of<T>(other_grad),
                               static_cast<const T*>(source.const_data_ptr()),
                               scales.data(),
                               identity_scales.data(),
                               static_cast<T*>(grad_x.mutable_data_ptr()),
                               with_identity_grad ? static_cast<T*>(grad_identity.mutable_data_ptr()) : nullptr,
                               *images,
                               num_frames,
                               fold};
    with_identity(!with_identity_grad ? Identity::kNone
                  : identity_scale    ? Identity::kScaled
                                      : Identity::kPlain,
                  [&](auto kind) { backward.template run<kind()>(); });
  });
  return {grad_x, grad_identity};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lofi_fast, CPU, m) {
  m.impl("residual_shift", TORCH_BOX(&residual_shift));
  m.impl("residual_shift_backward", TORCH_BOX(&residual_shift_backward));
}
