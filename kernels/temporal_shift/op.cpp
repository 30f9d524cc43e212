// CPU form of temporal_shift; reference.py in this folder is the definition. Elements are moved as bytes.

#include <cstdint>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "images.h"

namespace {

using lofi_fast::Block;
using lofi_fast::Blocks;
using torch::stable::Tensor;

Tensor temporal_shift(const Tensor& x, int64_t num_frames, int64_t fold, bool adjoint) {
  lofi_fast::check_snippets("temporal_shift", x, num_frames, fold);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) {
    return y;
  }
  const auto images = lofi_fast::images_of(y);
  if (!images) {
    torch::stable::copy_(y, temporal_shift(torch::stable::contiguous(x), num_frames, fold, adjoint));
    return y;
  }
  const Tensor source = lofi_fast::laid_out_as(y, x);
  lofi_fast::expect_to_fill(y);
  const char* const from = static_cast<const char*>(source.const_data_ptr());
  char* const to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t size = static_cast<int64_t>(x.element_size());
  const int64_t row = images->row() * size;
  const int64_t image = images->image() * size;
  const int64_t moved = fold * images->inner * size;

  const Blocks blocks(*images, (64 << 10) / size);
  torch::stable::parallel_for(0, blocks.num(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Block block = blocks[i];
      const int64_t frame = block.image % num_frames;
      const int64_t at = block.image * image + block.first_row * row;
      const char* next = frame + 1 < num_frames ? from + at + image : nullptr;
      const char* previous = frame > 0 ? from + at - image : nullptr;
      if (adjoint) {
        std::swap(next, previous);
      }
      lofi_fast::copy_rows({to + at, next}, {to + at, previous}, {to + at, from + at}, block.num_rows, row, moved);
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lofi_fast, CPU, m) { m.impl("temporal_shift", TORCH_BOX(&temporal_shift)); }
