// CPU form of gather_rows, the sparse product of align_linear; reference.py in this folder is the definition.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../cpu.h"

namespace {

using lofi_fast::Sum;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 64 bytes of sums: one register with AVX-512, two with AVX2, four without.
template <typename S>
struct alignas(64) Lane {
  S sums[64 / sizeof(S)];
};

// Columns of `dense` are taken in blocks of this many lanes, copied together: wide ones where all rows of such a block
// fit in the second-level cache, and those that one row of the result reads in the first.
constexpr int64_t kWide = 4;
constexpr int64_t kNarrow = 2;
constexpr int64_t kBlockBytes = 1 << 20;
constexpr int64_t kRowBytes = 32 << 10;

// Rows are computed in this many parts, whatever the number of threads; each thread copies the block for itself.
constexpr int64_t kParts = 16;

struct Matrix {
  const int32_t* offsets;
  const int32_t* columns;
  const void* values;
  int64_t num_rows;
  int64_t row_step;
};

template <typename T>
struct Dense {
  const T* data;
  int64_t num_columns;  // its rows, which are columns of the matrix
  int64_t row;          // strides
  int64_t output;
};

// block[m, o] = dense[m, o] for `width` outputs of the block's; what lies beyond them in a row is left as it is.
template <typename T, int64_t kLanes>
LOFI_FAST_CLONES void copy_block(Lane<Sum<T>>* block, const Dense<T>& dense, int64_t width) {
  constexpr int64_t kWidth = kLanes * 64 / sizeof(Sum<T>);
  Sum<T>* to = block->sums;
  if (dense.output == 1) {
    for (int64_t m = 0; m < dense.num_columns; ++m) {
      const T* from = dense.data + m * dense.row;
      for (int64_t o = 0; o < width; ++o) {
        to[m * kWidth + o] = lofi_fast::widen(from[o]);
      }
    }
  } else {
    for (int64_t o = 0; o < width; ++o) {
      const T* from = dense.data + o * dense.output;
      for (int64_t m = 0; m < dense.num_columns; ++m) {
        to[m * kWidth + o] = lofi_fast::widen(from[m * dense.row]);
      }
    }
  }
}

// Rows `begin` to `end` in the order of computation, `width` outputs of each; `out` is the first output of row 0.
template <typename T, int64_t kLanes>
LOFI_FAST_CLONES void gather(const Lane<Sum<T>>* block, const Matrix& matrix, const Sum<T>* bias, T* out,
                             int64_t out_row, int64_t width, int64_t begin, int64_t end) {
  using S = Sum<T>;
  typedef S Vector __attribute__((vector_size(64), may_alias));
  constexpr int64_t kWidth = kLanes * 64 / sizeof(S);
  const S* values = static_cast<const S*>(matrix.values);
  const int64_t rows_of_step = matrix.num_rows / matrix.row_step;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i % rows_of_step * matrix.row_step + i / rows_of_step;
    Vector sums[kLanes] = {};
    for (int64_t e = matrix.offsets[row]; e < matrix.offsets[row + 1]; ++e) {
      const Vector* from = reinterpret_cast<const Vector*>(block + matrix.columns[e] * kLanes);
      const Vector value = values[e] - Vector{};
#pragma GCC unroll 4
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] += value * from[lane];
      }
    }
    alignas(64) S row_sums[kWidth];
#pragma GCC unroll 4
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      reinterpret_cast<Vector*>(row_sums)[lane] = sums[lane];
    }
    T* to = out + row * out_row;
    if (bias != nullptr) {
      for (int64_t o = 0; o < width; ++o) {
        to[o] = lofi_fast::narrow<T>(row_sums[o] + bias[o]);
      }
    } else {
      for (int64_t o = 0; o < width; ++o) {
        to[o] = lofi_fast::narrow<T>(row_sums[o]);
      }
    }
  }
}

template <typename T, int64_t kLanes>
void gather_blocks(const Tensor& dense, const Matrix& matrix, const Sum<T>* bias, Tensor& out) {
  using S = Sum<T>;
  constexpr int64_t kWidth = kLanes * 64 / sizeof(S);
  const int64_t num_columns = dense.size(1);
  const int64_t num_outputs = dense.size(2);
  const int64_t num_blocks = (num_outputs + kWidth - 1) / kWidth;
  const int64_t rows_of_part = (matrix.num_rows + kParts - 1) / kParts;
  const T* from = static_cast<const T*>(dense.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, dense.size(0) * num_blocks * kParts, 1, [&](int64_t begin, int64_t end) {
    // Zeros where the last block has no outputs.
    std::vector<Lane<S>> block(num_columns * kLanes);
    int64_t copied = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % kParts;
      const int64_t batch = i / kParts / num_blocks;
      const int64_t first = i / kParts % num_blocks * kWidth;
      const int64_t width = std::min(kWidth, num_outputs - first);
      if (copied != i / kParts) {
        copied = i / kParts;
        const Dense<T> source{from + batch * dense.stride(0) + first * dense.stride(2), num_columns, dense.stride(1),
                              dense.stride(2)};
        copy_block<T, kLanes>(block.data(), source, width);
      }
      gather<T, kLanes>(block.data(), matrix, bias == nullptr ? nullptr : bias + first,
                        to + batch * matrix.num_rows * num_outputs + first, num_outputs, width,
                        std::min(part * rows_of_part, matrix.num_rows),
                        std::min((part + 1) * rows_of_part, matrix.num_rows));
    }
  });
}

// Reading outside of `dense` is undefined behaviour, so this cannot be left to the caller; it costs one pass of many.
void check(const Matrix& matrix, int64_t num_entries, int64_t num_columns) {
  STD_TORCH_CHECK(matrix.row_step >= 1 && matrix.num_rows % matrix.row_step == 0, "gather_rows: row_step ",
                  matrix.row_step, " does not divide ", matrix.num_rows, " rows");
  STD_TORCH_CHECK(matrix.offsets[0] == 0 && matrix.offsets[matrix.num_rows] == num_entries,
                  "gather_rows: offsets must run from 0 to ", num_entries);
  for (int64_t row = 0; row < matrix.num_rows; ++row) {
    STD_TORCH_CHECK(matrix.offsets[row] <= matrix.offsets[row + 1], "gather_rows: offsets must not fall");
  }
  uint32_t largest = 0;
  for (int64_t e = 0; e < num_entries; ++e) {
    largest = std::max(largest, static_cast<uint32_t>(matrix.columns[e]));
  }
  STD_TORCH_CHECK(num_entries == 0 || largest < num_columns, "gather_rows: columns must lie in [0, ", num_columns, ")");
}

Tensor gather_rows(const Tensor& dense, const Tensor& offsets, const Tensor& columns, const Tensor& values,
                   const std::optional<Tensor>& bias, int64_t row_step) {
  STD_TORCH_CHECK(dense.dim() == 3, "gather_rows: dense must be (B, num_columns, O), got ", dense.dim(), " dimensions");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.numel() >= 1 && columns.dim() == 1 && values.dim() == 1 &&
                      values.numel() == columns.numel(),
                  "gather_rows: offsets must be (num_rows + 1,), columns and values one number for each entry");
  const bool is_double = dense.scalar_type() == ScalarType::Double;
  const ScalarType sum = is_double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && columns.scalar_type() == ScalarType::Int &&
                      values.scalar_type() == sum && (!bias || bias->scalar_type() == sum),
                  "gather_rows: offsets and columns must be int32, values and bias ", sum);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == dense.size(2)),
                  "gather_rows: bias must have one number for each of ", dense.size(2), " outputs");
  STD_TORCH_CHECK(
      dense.is_cpu() && offsets.is_cpu() && columns.is_cpu() && values.is_cpu() && (!bias || bias->is_cpu()),
      "gather_rows: all tensors must be on the CPU");

  const Tensor whole_offsets = torch::stable::contiguous(offsets);
  const Tensor whole_columns = torch::stable::contiguous(columns);
  const Tensor whole_values = torch::stable::contiguous(values);
  const std::optional<Tensor> whole_bias = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const Matrix matrix{whole_offsets.const_data_ptr<int32_t>(), whole_columns.const_data_ptr<int32_t>(),
                      whole_values.const_data_ptr(), offsets.numel() - 1, row_step};
  check(matrix, columns.numel(), dense.size(1));

  Tensor out = torch::stable::new_empty(dense, {dense.size(0), matrix.num_rows, dense.size(2)});
  if (out.numel() == 0) {
    return out;
  }
  lofi_fast::with_floating_type(dense.scalar_type(), "gather_rows", [&]<typename T>(T) {
    const Sum<T>* bias_data = bias ? whole_bias->const_data_ptr<Sum<T>>() : nullptr;
    const bool fits =
        dense.size(1) * kWide * 64 <= kBlockBytes && columns.numel() / matrix.num_rows * kWide * 64 <= kRowBytes;
    if (fits) {
      gather_blocks<T, kWide>(dense, matrix, bias_data, out);
    } else {
      gather_blocks<T, kNarrow>(dense, matrix, bias_data, out);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lofi_fast, CPU, m) { m.impl("gather_rows", TORCH_BOX(&gather_rows)); }
