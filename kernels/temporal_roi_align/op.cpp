// CPU form of temporal_roi_align and its gradient; reference.py in this folder is the definition. Both first merge the
// samples of a bin to one weight for each snippet it touches, then work on channels alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../cpu.h"

namespace {

using lofi_fast::Sum;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 64 bytes of sums: one register with AVX-512, two with AVX2, four without. Channels are taken in blocks of four.
template <typename S>
struct alignas(64) Lane {
  S sums[64 / sizeof(S)];
};
constexpr int64_t kLanes = 4;

template <typename S>
constexpr int64_t kChannels = kLanes * 64 / sizeof(S);

struct Roi {
  int64_t batch;
  float start;
  float length;
};

// Snippets first, first + 1, ... of a bin weigh values[offset], values[offset + 1], ...: `size` of them.
struct Bin {
  int64_t first;
  int64_t offset;
  int64_t size;
};

template <typename S>
struct Bins {
  std::vector<Bin> bins;
  std::vector<S> values;
};

std::vector<Roi> read_rois(const Tensor& rois, int64_t num_batches) {
  STD_TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 3 && rois.scalar_type() == ScalarType::Float,
                  "temporal_roi_align: rois must be float32 (R, 3)");
  STD_TORCH_CHECK(rois.is_cpu(), "temporal_roi_align: all tensors must be on the CPU");
  const float* data = rois.const_data_ptr<float>();
  const int64_t row = rois.stride(0);
  const int64_t column = rois.stride(1);
  std::vector<Roi> read;
  read.reserve(rois.size(0));
  for (int64_t n = 0; n < rois.size(0); ++n) {
    const float batch = data[n * row];
    const float start = data[n * row + column];
    const float end = data[n * row + 2 * column];
    // Anything else would be read from outside the features, or has no number of samples.
    STD_TORCH_CHECK(
        std::isfinite(start) && std::isfinite(end - start) && batch >= 0 && batch < static_cast<float>(num_batches),
        "temporal_roi_align: roi ", n, " must be finite, with a batch index in [0, ", num_batches, ")");
    read.push_back({static_cast<int64_t>(batch), start, std::max(end - start, 1.0f)});
  }
  return read;
}

// Appends the bins of one ROI. Positions are those of the reference to the bit: a sample on -1 or T counts.
template <typename S>
void append_bins(const Roi& roi, int64_t num_snippets, int64_t num_bins, int64_t sampling_ratio, Bins<S>& to,
                 std::vector<double>& weights) {
  const float width = roi.length / static_cast<float>(num_bins);
  const float count = sampling_ratio > 0 ? static_cast<float>(sampling_ratio) : std::ceil(width);
  const float last_snippet = static_cast<float>(num_snippets - 1);
  for (int64_t p = 0; p < num_bins; ++p) {
    const float left = roi.start + static_cast<float>(p) * width;
    // The samples that can lie in [-1, T], with some to spare for the rounding of their positions.
    const double spacing = static_cast<double>(width) / count;
    const double spare = 2 + 1e-6 * count;
    const double from = std::floor((-1.0 - left) / spacing - 0.5 - spare);
    const double to_sample = std::ceil((num_snippets - static_cast<double>(left)) / spacing + 0.5 + spare);
    const int64_t begin = static_cast<int64_t>(std::clamp(from, 0.0, static_cast<double>(count)));
    const int64_t end = static_cast<int64_t>(std::clamp(to_sample, 0.0, static_cast<double>(count)));
    weights.clear();
    int64_t first = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float position = left + (static_cast<float>(i) + 0.5f) * width / count;
      if (!(position >= -1.0f && position <= static_cast<float>(num_snippets))) {
        continue;
      }
      const float clamped = std::clamp(position, 0.0f, last_snippet);
      const float lower = std::floor(clamped);
      const double fraction = static_cast<double>(clamped - lower);
      if (weights.empty()) {
        first = static_cast<int64_t>(lower);
      }
      // Positions do not fall, so neither does the snippet.
      const size_t at = static_cast<int64_t>(lower) - first;
      weights.resize(std::max(weights.size(), at + (fraction > 0 ? 2 : 1)));
      weights[at] += 1 - fraction;
      if (fraction > 0) {
        weights[at + 1] += fraction;
      }
    }
    to.bins.push_back({first, static_cast<int64_t>(to.values.size()), static_cast<int64_t>(weights.size())});
    for (const double weight : weights) {
      to.values.push_back(static_cast<S>(weight / count));
    }
  }
}

// rows[t, c] = features[b, c, t] in float32 or float64, for all b, each row padded with zeros to whole blocks.
template <typename T>
LOFI_FAST_CLONES void widen_rows(const T* from, int64_t num_snippets, int64_t snippet, int64_t channels,
                                 int64_t channel, Sum<T>* to, int64_t padded) {
  if (channel == 1) {
    for (int64_t t = 0; t < num_snippets; ++t) {
      for (int64_t c = 0; c < channels; ++c) {
        to[t * padded + c] = lofi_fast::widen(from[t * snippet + c]);
      }
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < num_snippets; ++t) {
        to[t * padded + c] = lofi_fast::widen(from[t * snippet + c * channel]);
      }
    }
  }
}

// One ROI, all channels: out[p, c] = sum of weights of bin p * rows[t, c].
template <typename T>
LOFI_FAST_CLONES void align(const Bin* bins, int64_t num_bins, const Sum<T>* values, const Lane<Sum<T>>* rows,
                            int64_t lanes_of_row, int64_t channels, T* out) {
  using S = Sum<T>;
  typedef S Vector __attribute__((vector_size(64), may_alias));
  for (int64_t p = 0; p < num_bins; ++p) {
    for (int64_t block = 0; block * kChannels<S> < channels; ++block) {
      Vector sums[kLanes] = {};
      for (int64_t i = 0; i < bins[p].size; ++i) {
        const S value = values[bins[p].offset + i];
        // A snippet that weighs nothing has no influence, be it NaN.
        if (value == 0) {
          continue;
        }
        const Vector* from =
            reinterpret_cast<const Vector*>(rows + (bins[p].first + i) * lanes_of_row + block * kLanes);
        const Vector weight = value - Vector{};
#pragma GCC unroll 4
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          sums[lane] += weight * from[lane];
        }
      }
      alignas(64) S block_sums[kChannels<S>];
#pragma GCC unroll 4
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        reinterpret_cast<Vector*>(block_sums)[lane] = sums[lane];
      }
      T* to = out + p * channels + block * kChannels<S>;
      const int64_t here = std::min(kChannels<S>, channels - block * kChannels<S>);
      for (int64_t c = 0; c < here; ++c) {
        to[c] = lofi_fast::narrow<T>(block_sums[c]);
      }
    }
  }
}

// One ROI, one block of `here` channels: sums[t, c] += weight of t in bin p * grad[p, c].
template <typename T>
LOFI_FAST_CLONES void scatter(const Bin* bins, int64_t num_bins, const Sum<T>* values, const T* grad, int64_t grad_bin,
                              int64_t here, Lane<Sum<T>>* sums) {
  using S = Sum<T>;
  typedef S Vector __attribute__((vector_size(64), may_alias));
  alignas(64) S wide[kChannels<S>] = {};
  for (int64_t p = 0; p < num_bins; ++p) {
    if (bins[p].size == 0) {
      continue;
    }
    for (int64_t c = 0; c < here; ++c) {
      wide[c] = lofi_fast::widen(grad[p * grad_bin + c]);
    }
    Vector of_bin[kLanes];
#pragma GCC unroll 4
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      of_bin[lane] = reinterpret_cast<const Vector*>(wide)[lane];
    }
    for (int64_t i = 0; i < bins[p].size; ++i) {
      const S value = values[bins[p].offset + i];
      if (value == 0) {
        continue;
      }
      Vector* to = reinterpret_cast<Vector*>(sums + (bins[p].first + i) * kLanes);
      const Vector weight = value - Vector{};
#pragma GCC unroll 4
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        to[lane] += weight * of_bin[lane];
      }
    }
  }
}

template <typename T>
LOFI_FAST_CLONES void narrow_rows(const Sum<T>* from, int64_t num_snippets, int64_t here, T* to, int64_t channels) {
  for (int64_t t = 0; t < num_snippets; ++t) {
    for (int64_t c = 0; c < here; ++c) {
      to[t * channels + c] = lofi_fast::narrow<T>(from[t * kChannels<Sum<T>> + c]);
    }
  }
}

constexpr int64_t kRoisOfTask = 16;

template <typename T>
void align_all(const Tensor& features, const std::vector<Roi>& rois, int64_t num_bins, int64_t sampling_ratio,
               Tensor& out) {
  using S = Sum<T>;
  const int64_t channels = features.size(1);
  const int64_t num_snippets = features.size(2);
  const int64_t lanes_of_row = (channels + kChannels<S> - 1) / kChannels<S> * kLanes;
  const int64_t padded = lanes_of_row * 64 / sizeof(S);
  const T* from = static_cast<const T*>(features.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  std::vector<Lane<S>> rows(features.size(0) * num_snippets * lanes_of_row);
  torch::stable::parallel_for(0, features.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      widen_rows<T>(from + b * features.stride(0), num_snippets, features.stride(2), channels, features.stride(1),
                    rows[b * num_snippets * lanes_of_row].sums, padded);
    }
  });
  torch::stable::parallel_for(0, static_cast<int64_t>(rois.size()), kRoisOfTask, [&](int64_t begin, int64_t end) {
    Bins<S> bins;
    std::vector<double> weights;
    for (int64_t n = begin; n < end; ++n) {
      bins.bins.clear();
      bins.values.clear();
      append_bins(rois[n], num_snippets, num_bins, sampling_ratio, bins, weights);
      align<T>(bins.bins.data(), num_bins, bins.values.data(),
               rows.data() + rois[n].batch * num_snippets * lanes_of_row, lanes_of_row, channels,
               to + n * num_bins * channels);
    }
  });
}

// Each batch element and block of channels is summed by one thread, over its ROIs in their order.
template <typename T>
void scatter_all(const Tensor& grad, const std::vector<Roi>& rois, int64_t num_bins, int64_t sampling_ratio,
                 Tensor& out) {
  using S = Sum<T>;
  const int64_t num_batches = out.size(0);
  const int64_t num_snippets = out.size(1);
  const int64_t channels = out.size(2);
  const int64_t num_rois = static_cast<int64_t>(rois.size());
  const int64_t num_blocks = (channels + kChannels<S> - 1) / kChannels<S>;
  const int64_t num_tasks = (num_rois + kRoisOfTask - 1) / kRoisOfTask;
  std::vector<Bins<S>> bins(num_tasks);
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> weights;
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t n = task * kRoisOfTask; n < std::min((task + 1) * kRoisOfTask, num_rois); ++n) {
        append_bins(rois[n], num_snippets, num_bins, sampling_ratio, bins[task], weights);
      }
    }
  });
  std::vector<std::vector<int64_t>> rois_of_batch(num_batches);
  for (int64_t n = 0; n < num_rois; ++n) {
    rois_of_batch[rois[n].batch].push_back(n);
  }
  const T* from = static_cast<const T*>(grad.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, num_batches * num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Lane<S>> sums(num_snippets * kLanes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / num_blocks;
      const int64_t first = i % num_blocks * kChannels<S>;
      const int64_t here = std::min(kChannels<S>, channels - first);
      std::fill(sums.begin(), sums.end(), Lane<S>{});
      for (const int64_t n : rois_of_batch[batch]) {
        const Bins<S>& of_task = bins[n / kRoisOfTask];
        scatter<T>(of_task.bins.data() + n % kRoisOfTask * num_bins, num_bins, of_task.values.data(),
                   from + n * num_bins * channels + first, channels, here, sums.data());
      }
      narrow_rows<T>(sums.data()->sums, num_snippets, here, to + batch * num_snippets * channels + first, channels);
    }
  });
}

Tensor temporal_roi_align(const Tensor& features, const Tensor& rois, int64_t num_bins, int64_t sampling_ratio) {
  STD_TORCH_CHECK(features.dim() == 3 && features.size(2) >= 1 && features.is_cpu(),
                  "temporal_roi_align: features must be (B, C, T) with T >= 1, on the CPU");
  STD_TORCH_CHECK(num_bins >= 1 && sampling_ratio >= 0, "temporal_roi_align: num_bins must be at least 1, and ",
                  "sampling_ratio 0 or more");
  const std::vector<Roi> read = read_rois(rois, features.size(0));
  Tensor out = torch::stable::new_empty(features, {rois.size(0), num_bins, features.size(1)});
  if (out.numel() > 0) {
    lofi_fast::with_floating_type(features.scalar_type(), "temporal_roi_align",
                                  [&]<typename T>(T) { align_all<T>(features, read, num_bins, sampling_ratio, out); });
  }
  return torch::stable::transpose(out, 1, 2);
}

Tensor temporal_roi_align_backward(const Tensor& grad, const Tensor& rois, int64_t batch, int64_t num_snippets,
                                   int64_t num_bins, int64_t sampling_ratio) {
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == rois.size(0) && grad.size(2) == num_bins && grad.is_cpu(),
                  "temporal_roi_align_backward: grad must be (R, C, num_bins), on the CPU");
  STD_TORCH_CHECK(num_snippets >= 1 && num_bins >= 1 && sampling_ratio >= 0,
                  "temporal_roi_align_backward: num_snippets and num_bins must be at least 1, and sampling_ratio 0 or ",
                  "more");
  const std::vector<Roi> read = read_rois(rois, batch);
  const Tensor rows = torch::stable::contiguous(torch::stable::transpose(grad, 1, 2));
  Tensor out = torch::stable::new_empty(grad, {batch, num_snippets, grad.size(1)});
  if (out.numel() > 0) {
    lofi_fast::with_floating_type(grad.scalar_type(), "temporal_roi_align_backward",
                                  [&]<typename T>(T) { scatter_all<T>(rows, read, num_bins, sampling_ratio, out); });
  }
  return torch::stable::transpose(out, 1, 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lofi_fast, CPU, m) {
  m.impl("temporal_roi_align", TORCH_BOX(&temporal_roi_align));
  m.impl("temporal_roi_align_backward", TORCH_BOX(&temporal_roi_align_backward));
}
