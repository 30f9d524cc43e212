// What the two shifts share on the CPU: how images lie in memory, and the copy of rows with shifted channels.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../cpu.h"

namespace lofi_fast {

// How a dense tensor (N, C, H, W) lies in memory, if its images lie one after the other. An image is `rows` rows of all
// channels, a channel is `inner` neighbours: channels-last has H*W rows and inner 1, contiguous has one row and inner
// H*W.
struct Images {
  int64_t num;
  int64_t rows;
  int64_t channels;
  int64_t inner;

  int64_t row() const { return channels * inner; }
  int64_t image() const { return rows * row(); }
};

// Nothing where the images of a dense x are interleaved.
inline std::optional<Images> images_of(const Tensor& x) {
  Images images{x.size(0), 1, x.size(1), 1};
  // Dimensions of size 1 have no place in memory, and their strides mean nothing.
  bool found[4] = {false, x.size(1) == 1, x.size(2) == 1, x.size(3) == 1};
  int64_t step = 1;
  while (!(found[1] && found[2] && found[3])) {
    int dim = 1;
    while (dim < 4 && (found[dim] || x.stride(dim) != step)) {
      ++dim;
    }
    if (dim == 4) {
      return std::nullopt;
    }
    if (dim != 1) {
      (found[1] ? images.rows : images.inner) *= x.size(dim);
    }
    found[dim] = true;
    step *= x.size(dim);
  }
  return images;
}

// x with the strides of `like`, copied only where they differ.
inline Tensor laid_out_as(const Tensor& like, const Tensor& x) {
  bool same = true;
  for (int dim = 0; dim < 4; ++dim) {
    same = same && (x.size(dim) == 1 || x.stride(dim) == like.stride(dim));
  }
  if (same) {
    return x;
  }
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, x);
  return copy;
}

inline void check_snippets(const char* op, const Tensor& x, int64_t num_frames, int64_t fold) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": expected (N*T, C, H, W), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(num_frames >= 1 && x.size(0) % num_frames == 0, op, ": ", x.size(0),
                  " images are not a whole number of snippets of num_frames=", num_frames);
  STD_TORCH_CHECK(0 <= fold && 2 * fold <= x.size(1), op, ": fold=", fold, " does not fit in ", x.size(1),
                  " channels twice");
}

// The work of one step of a parallel loop: some rows of one image.
struct Block {
  int64_t image;
  int64_t first_row;
  int64_t num_rows;
};

class Blocks {
 public:
  // Of at most `num_elements` elements, but at least one row.
  Blocks(const Images& images, int64_t num_elements)
      : rows_(images.rows),
        rows_of_block_(std::max<int64_t>(1, num_elements / images.row())),
        per_image_((rows_ + rows_of_block_ - 1) / rows_of_block_),
        num_(images.num * per_image_) {}

  int64_t num() const { return num_; }

  Block operator[](int64_t index) const {
    const int64_t first_row = index % per_image_ * rows_of_block_;
    return {index / per_image_, first_row, std::min(rows_of_block_, rows_ - first_row)};
  }

 private:
  int64_t rows_;
  int64_t rows_of_block_;
  int64_t per_image_;
  int64_t num_;
};

// Where the channels that move one way are copied to, and from; from nullptr come zeros.
struct Copy {
  char* to;
  const char* from;
};

namespace {

LOFI_FAST_INLINE void copy_or_clear(const Copy& copy, int64_t at, int64_t bytes) {
  if (copy.from != nullptr) {
    std::memcpy(copy.to + at, copy.from + at, bytes);
  } else {
    std::memset(copy.to + at, 0, bytes);
  }
}

// kMoved is `moved` where the compiler may know it and a row is 8 times as long (the usual fold), else 0: calls of
// memcpy for so few bytes would take most of the time.
template <int64_t kMoved>
LOFI_FAST_CLONES void copy_rows(const Copy& first, const Copy& second, const Copy& still, int64_t num_rows, int64_t row,
                                int64_t moved) {
  if constexpr (kMoved > 0) {
    row = 8 * kMoved;
    moved = kMoved;
  }
  for (int64_t at = 0; at < num_rows * row; at += row) {
    copy_or_clear(first, at, moved);
    copy_or_clear(second, at + moved, moved);
    copy_or_clear(still, at + 2 * moved, row - 2 * moved);
  }
}

// Of rows of `row` bytes, the first `moved` bytes, the next `moved` and the rest, each from and to a place of its own.
void copy_rows(const Copy& first, const Copy& second, const Copy& still, int64_t num_rows, int64_t row, int64_t moved) {
  switch (row == 8 * moved ? moved : 0) {
    case 8:
      return copy_rows<8>(first, second, still, num_rows, row, moved);
    case 16:
      return copy_rows<16>(first, second, still, num_rows, row, moved);
    case 32:
      return copy_rows<32>(first, second, still, num_rows, row, moved);
    case 64:
      return copy_rows<64>(first, second, still, num_rows, row, moved);
    case 128:
      return copy_rows<128>(first, second, still, num_rows, row, moved);
    default:
      return copy_rows<0>(first, second, still, num_rows, row, moved);
  }
}

}  // namespace

}  // namespace lofi_fast
