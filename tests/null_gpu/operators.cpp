// What would call cuDNN, cuBLAS or a run-time compiler, as operators that check their arguments' types, count
// themselves and allocate their results (with NULL_WORKSPACE bytes beside, as a library would) and compute nothing.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>

#include "null_gpu.h"

using at::Tensor;

namespace {

at::MemoryFormat format_of(const Tensor& x, const Tensor& weight) {
  auto channels_last = at::MemoryFormat::ChannelsLast;
  bool either = x.suggest_memory_format() == channels_last || weight.suggest_memory_format() == channels_last;
  return x.dim() == 4 && either ? channels_last : at::MemoryFormat::Contiguous;
}

void alike(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "types differ: ", a.scalar_type(), " and ", b.scalar_type());
  TORCH_CHECK(a.device() == b.device(), "devices differ: ", a.device(), " and ", b.device());
}

void workspace(const Tensor& like) {
  static const long bytes = [] {
    const char* text = std::getenv("NULL_WORKSPACE");
    return text ? std::atol(text) : 0L;
  }();
  if (bytes) at::empty({bytes}, like.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
}

Tensor convolution(const Tensor& x, const Tensor& weight, at::IntArrayRef padding, at::IntArrayRef stride,
                   at::IntArrayRef dilation, int64_t groups, bool, bool, bool) {
  alike(x, weight);
  TORCH_CHECK(x.size(1) == weight.size(1) * groups, "channels differ");
  std::vector<int64_t> sizes{x.size(0), weight.size(0)};
  for (int64_t i = 2; i < x.dim(); i++) {
    int64_t extent = dilation[i - 2] * (weight.size(i) - 1) + 1;
    sizes.push_back((x.size(i) + 2 * padding[i - 2] - extent) / stride[i - 2] + 1);
  }
  auto format = format_of(x, weight);
  auto laid_out = x.contiguous(format), weights = weight.contiguous(format);
  null_convolutions++;
  workspace(x);
  return at::empty(sizes, x.options().memory_format(format));
}

std::vector<int64_t> numbers(c10::SymIntArrayRef values) {
  std::vector<int64_t> found;
  for (const auto& value : values) found.push_back(value.expect_int());
  return found;
}

Tensor convolution_relu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                        c10::SymInt groups) {
  return convolution(x, weight, numbers(padding), numbers(stride), numbers(dilation), groups.expect_int(), false, false,
                     false);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        at::OptionalIntArrayRef, at::IntArrayRef, at::IntArrayRef,
                                                        at::IntArrayRef, bool, at::IntArrayRef, int64_t,
                                                        std::array<bool, 3> wanted) {
  alike(gradient, weight);
  alike(x, weight);
  auto format = format_of(x, weight);
  auto laid_out = std::array{gradient.contiguous(format), x.contiguous(format), weight.contiguous(format)};
  Tensor of_x, of_weight, of_bias;
  if (wanted[0]) {
    null_convolutions++;
    workspace(x);
    of_x = at::empty(x.sizes(), x.options().memory_format(format));
  }
  if (wanted[1]) {
    null_convolutions++;
    workspace(x);
    of_weight = at::empty(weight.sizes(), weight.options().memory_format(format));
  }
  if (wanted[2]) {
    std::vector<int64_t> summed{0};
    for (int64_t i = 2; i < gradient.dim(); i++) summed.push_back(i);
    of_bias = gradient.sum(summed);
  }
  return {of_x, of_weight, of_bias};
}

// What cuDNN's batch norm takes beside its result: statistics, and in training a buffer that its backward reads.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const Tensor& weight,
                                                      const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                      const std::optional<Tensor>&, bool, double, double) {
  null_launches++;
  auto statistics = at::empty({weight.numel()}, weight.options());
  return {at::empty_like(x), statistics, at::empty_like(statistics), at::empty({0}, x.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& x, const Tensor& gradient, const Tensor& weight,
                                                       const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                       const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                       double, const Tensor&) {
  alike(x, gradient);
  null_launches++;
  return {at::empty_like(x), at::empty_like(weight), at::empty_like(weight)};
}

Tensor mm(const Tensor& a, const Tensor& b) {
  alike(a, b);
  null_products++;
  return at::empty({a.size(0), b.size(1)}, a.options());
}

Tensor& mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  alike(a, b);
  alike(a, out);
  null_products++;
  return out;
}

Tensor addmm(const Tensor& c, const Tensor& a, const Tensor& b, const at::Scalar&, const at::Scalar&) {
  alike(a, b);
  alike(a, c);
  null_products++;
  return at::empty({a.size(0), b.size(1)}, a.options());
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  alike(a, b);
  null_products++;
  return at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
}

// torch compiles its own at run time, for the device.
Tensor prod(const Tensor& x, int64_t dim, bool keep, std::optional<at::ScalarType> type) {
  return at::sum(x, dim, keep, type);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("cudnn_convolution", convolution);
  library.impl("cudnn_convolution_relu", convolution_relu);
  library.impl("convolution_backward", convolution_backward);
  library.impl("cudnn_batch_norm", batch_norm);
  library.impl("cudnn_batch_norm_backward", batch_norm_backward);
  library.impl("mm", mm);
  library.impl("mm.out", mm_out);
  library.impl("addmm", addmm);
  library.impl("bmm", bmm);
  library.impl("prod.dim_int", prod);
}
