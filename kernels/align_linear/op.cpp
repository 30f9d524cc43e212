// CPU forms of gather_rows and gather_groups, the sparse products of align_linear; reference.py in this folder is their
// definition. A matrix whose rows have nothing in common goes row by row. Where neighbouring rows read neighbouring
// columns, eight rows are summed together: what they read is loaded for all of them at once, and so are the weights
// where all have the same. A product of vectors then costs a third of a load, where row by row it is two.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string_view>
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

// Compilers would rather load a vector again for each product.
#if defined(__x86_64__) && defined(__GNUC__)
#define LOFI_FAST_IN_REGISTER(vector) asm("" : "+v"(vector))
#else
#define LOFI_FAST_IN_REGISTER(vector)
#endif

// Rows of a group, and of a diagonal's values.
constexpr int64_t kGroup = 8;

// Of a group in memory: first row, rows; ends of its strips of 4, of 2 and of 1, of its diagonals, of its singles.
constexpr int64_t kFields = 7;
constexpr int64_t kStrips[] = {4, 2, 1};

struct Groups {
  const int32_t* places;     // of the matrix's columns in a packed block
  const int32_t* groups;     // (num_groups, kFields): first row, rows, ends of what follows
  const int32_t* strips;     // of 4, then 2, then 1 diagonals: place that the first row reads on the first of them
  const void* strip_values;  // one for each diagonal
  const int32_t* diagonals;  // with a value for each row: place that the first row reads; row i reads the i-th after it
  const void* values;        // (num_diagonals, kGroup)
  const int32_t* singles;    // (num_singles, 2): row in its group, place
  const void* single_values;  // (num_singles,)
  int64_t num_columns;
  int64_t num_groups;
  int64_t num_places;
  int64_t row_step;
};

// Rows of the packed block are `kVectors` vectors of `kBytes`, and sums of `kRows` rows of a group are in registers at
// a time: what fits into those that the CPU has.
template <typename T, int kBytes, int64_t kVectors, int64_t kRows>
struct Tile {
  using S = Sum<T>;
  typedef S Vector __attribute__((vector_size(kBytes), may_alias));
  static constexpr int64_t kWidth = kVectors * kBytes / sizeof(S);

  static LOFI_FAST_INLINE void copy(S* block, const Groups& matrix, const Dense<T>& dense, int64_t width) {
    for (int64_t m = 0; m < dense.num_columns; ++m) {
      const T* const from = dense.data + m * dense.row;
      S* const to = block + matrix.places[m] * kWidth;
      if (dense.output == 1 && width == kWidth) {
        for (int64_t o = 0; o < kWidth; ++o) {
          to[o] = lofi_fast::widen(from[o]);
        }
      } else {
        for (int64_t o = 0; o < width; ++o) {
          to[o] = lofi_fast::widen(from[o * dense.output]);
        }
      }
    }
  }

  // Adds diagonals that begin in neighbouring places: what one row reads on one of them, the row before reads on the
  // next, so that a place is loaded once for all of them.
  // Their values are one to a diagonal, or kGroup to a diagonal.
  template <int64_t kDiagonals, bool kOneValue>
  static LOFI_FAST_INLINE void add(Vector (&part)[kRows][kVectors], const S* from, const S* values) {
#pragma GCC unroll 16
    for (int64_t place = 0; place < kRows + kDiagonals - 1; ++place) {
      Vector loaded[kVectors];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        loaded[v] = reinterpret_cast<const Vector*>(from)[place * kVectors + v];
        LOFI_FAST_IN_REGISTER(loaded[v]);
      }
#pragma GCC unroll 4
      for (int64_t e = 0; e < kDiagonals; ++e) {
        const int64_t row = place - e;
        if (row >= 0 && row < kRows) {
#pragma GCC unroll 4
          for (int64_t v = 0; v < kVectors; ++v) {
            part[row][v] += (values[kOneValue ? e : e * kGroup + row] - Vector{}) * loaded[v];
          }
        }
      }
    }
  }

  static LOFI_FAST_INLINE void gather(const S* block, const Groups& matrix, const S* bias, T* out, int64_t out_row,
                                      int64_t width, int64_t begin, int64_t end) {
    const S* const strip_values = static_cast<const S*>(matrix.strip_values);
    const S* const values = static_cast<const S*>(matrix.values);
    const S* const single_values = static_cast<const S*>(matrix.single_values);
    int64_t strip = 0, strip_value = 0, diagonal = 0, single = 0;
    // Where those of the groups before end.
    for (int64_t g = 0; g < begin; ++g) {
      const int32_t* const group = matrix.groups + kFields * g;
      for (int64_t kind = 0; kind < 3; ++kind) {
        strip_value += (group[2 + kind] - strip) * kStrips[kind];
        strip = group[2 + kind];
      }
      diagonal = group[5];
      single = group[6];
    }
    for (int64_t g = begin; g < end; ++g) {
      const int32_t* const group = matrix.groups + kFields * g;
      alignas(64) S sums[kGroup * kWidth];
      int64_t next_strip, next_value;
      for (int64_t first = 0; first < kGroup; first += kRows) {
        Vector part[kRows][kVectors] = {};
        next_strip = strip;
        const S* value = strip_values + strip_value;
        for (; next_strip < group[2]; ++next_strip, value += 4) {
          add<4, true>(part, block + (matrix.strips[next_strip] + first) * kWidth, value);
        }
        for (; next_strip < group[3]; ++next_strip, value += 2) {
          add<2, true>(part, block + (matrix.strips[next_strip] + first) * kWidth, value);
        }
        for (; next_strip < group[4]; ++next_strip, value += 1) {
          add<1, true>(part, block + (matrix.strips[next_strip] + first) * kWidth, value);
        }
        next_value = value - strip_values;
        for (int64_t e = diagonal; e < group[5];) {
          const int32_t place = matrix.diagonals[e];
          const S* const from = block + (place + first) * kWidth;
          const S* const value = values + e * kGroup + first;
          if (e + 3 < group[5] && matrix.diagonals[e + 3] == place + 3) {
            add<4, false>(part, from, value);
            e += 4;
          } else if (e + 1 < group[5] && matrix.diagonals[e + 1] == place + 1) {
            add<2, false>(part, from, value);
            e += 2;
          } else {
            add<1, false>(part, from, value);
            e += 1;
          }
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
          for (int64_t v = 0; v < kVectors; ++v) {
            reinterpret_cast<Vector*>(sums)[(first + i) * kVectors + v] = part[i][v];
          }
        }
      }
      strip = next_strip;
      strip_value = next_value;
      diagonal = group[5];
      for (; single < group[6]; ++single) {
        Vector* const to = reinterpret_cast<Vector*>(sums + matrix.singles[2 * single] * kWidth);
        const Vector* const from = reinterpret_cast<const Vector*>(block + matrix.singles[2 * single + 1] * kWidth);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
          to[v] += (single_values[single] - Vector{}) * from[v];
        }
      }
      for (int64_t i = 0; i < group[1]; ++i) {
        T* const to = out + (group[0] + i * matrix.row_step) * out_row;
        const S* const from = sums + i * kWidth;
        if (bias != nullptr) {
          for (int64_t o = 0; o < width; ++o) {
            to[o] = lofi_fast::narrow<T>(from[o] + bias[o]);
          }
        } else {
          for (int64_t o = 0; o < width; ++o) {
            to[o] = lofi_fast::narrow<T>(from[o]);
          }
        }
      }
    }
  }
};

// The work, compiled for vectors of one size.
template <typename T>
struct Machine {
  int64_t width;  // outputs of a block
  void (*copy)(Sum<T>*, const Groups&, const Dense<T>&, int64_t);
  void (*gather)(const Sum<T>*, const Groups&, const Sum<T>*, T*, int64_t, int64_t, int64_t, int64_t);
};

// clang-format off
#define LOFI_FAST_MACHINE(name, bytes, vectors, rows, target)                                                          \
  namespace name {                                                                                                     \
  template <typename T>                                                                                                \
  target void copy(Sum<T>* block, const Groups& matrix, const Dense<T>& dense, int64_t width) {                        \
    Tile<T, bytes, vectors, rows>::copy(block, matrix, dense, width);                                                  \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  target void gather(const Sum<T>* block, const Groups& matrix, const Sum<T>* bias, T* out, int64_t out_row,           \
                     int64_t width, int64_t begin, int64_t end) {                                                      \
    Tile<T, bytes, vectors, rows>::gather(block, matrix, bias, out, out_row, width, begin, end);                       \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  constexpr Machine<T> machine{Tile<T, bytes, vectors, rows>::kWidth, copy<T>, gather<T>};                             \
  }
// clang-format on

LOFI_FAST_MACHINE(plain, 16, 2, 4, )
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
LOFI_FAST_MACHINE(avx2, 32, 2, 4, __attribute__((target("arch=x86-64-v3"))))
LOFI_FAST_MACHINE(avx512, 64, 2, 8, __attribute__((target("arch=x86-64-v4"))))
#endif
#undef LOFI_FAST_MACHINE
#undef LOFI_FAST_IN_REGISTER

// The widest vectors of this CPU, or those that torch is told to stop at: ATEN_CPU_CAPABILITY=avx2 or default.
template <typename T>
const Machine<T>& choose_machine() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const char* const told = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = told == nullptr ? "" : told;
  if (most != "default" && __builtin_cpu_supports("x86-64-v3")) {
    return most != "avx2" && __builtin_cpu_supports("x86-64-v4") ? avx512::machine<T> : avx2::machine<T>;
  }
#endif
  return plain::machine<T>;
}

template <typename T>
const Machine<T>& machine() {
  static const Machine<T>& chosen = choose_machine<T>();
  return chosen;
}

template <typename T>
void gather_grouped(const Tensor& dense, const Groups& matrix, const Sum<T>* bias, Tensor& out) {
  using S = Sum<T>;
  const Machine<T>& run = machine<T>();
  const int64_t num_outputs = dense.size(2);
  const int64_t num_blocks = (num_outputs + run.width - 1) / run.width;
  const int64_t groups_of_part = (matrix.num_groups + kParts - 1) / kParts;
  const T* from = static_cast<const T*>(dense.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  lofi_fast::expect_to_fill(out);
  torch::stable::parallel_for(0, dense.size(0) * num_blocks * kParts, 1, [&](int64_t begin, int64_t end) {
    // Zeros in the places of no column, and where the last block has no outputs.
    std::vector<Lane<S>> block((matrix.num_places * run.width * sizeof(S) + 63) / 64);
    int64_t copied = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % kParts;
      const int64_t batch = i / kParts / num_blocks;
      const int64_t first = i / kParts % num_blocks * run.width;
      const int64_t width = std::min(run.width, num_outputs - first);
      if (copied != i / kParts) {
        copied = i / kParts;
        const Dense<T> source{from + batch * dense.stride(0) + first * dense.stride(2), matrix.num_columns,
                              dense.stride(1), dense.stride(2)};
        run.copy(block.data()->sums, matrix, source, width);
      }
      run.gather(block.data()->sums, matrix, bias == nullptr ? nullptr : bias + first,
                 to + batch * out.size(1) * num_outputs + first, num_outputs, width,
                 std::min(part * groups_of_part, matrix.num_groups),
                 std::min((part + 1) * groups_of_part, matrix.num_groups));
    }
  });
}

// Reading or writing elsewhere is undefined behaviour, so this cannot be left to the caller.
void check(const Groups& matrix, int64_t num_rows, int64_t num_strips, int64_t num_strip_values, int64_t num_diagonals,
           int64_t num_singles) {
  int64_t rows = 0, strip = 0, strip_value = 0, diagonal = 0, single = 0;
  for (int64_t g = 0; g < matrix.num_groups; ++g) {
    const int32_t* const group = matrix.groups + kFields * g;
    STD_TORCH_CHECK(
        group[0] >= 0 && group[1] >= 1 && group[1] <= kGroup && group[0] + (group[1] - 1) * matrix.row_step < num_rows,
        "gather_groups: a group has 1 to 8 rows, which must lie in [0, ", num_rows, ")");
    STD_TORCH_CHECK(strip <= group[2] && group[2] <= group[3] && group[3] <= group[4] && group[4] <= num_strips &&
                        diagonal <= group[5] && group[5] <= num_diagonals && single <= group[6] &&
                        group[6] <= num_singles,
                    "gather_groups: ends of groups must not fall, nor exceed ", num_strips, " strips, ", num_diagonals,
                    " diagonals and ", num_singles, " single entries");
    for (int64_t kind = 0; kind < 3; ++kind) {
      for (; strip < group[2 + kind]; ++strip) {
        const int64_t place = matrix.strips[strip];
        STD_TORCH_CHECK(place >= 0 && place + kStrips[kind] - 1 + kGroup <= matrix.num_places,
                        "gather_groups: strips must lie in [0, ", matrix.num_places, ")");
        strip_value += kStrips[kind];
      }
    }
    int64_t before = -1;
    for (; diagonal < group[5]; ++diagonal) {
      const int64_t place = matrix.diagonals[diagonal];
      STD_TORCH_CHECK(before < place && place + kGroup <= matrix.num_places,
                      "gather_groups: diagonals of a group must ascend and lie in [0, ", matrix.num_places - kGroup,
                      "]");
      before = place;
    }
    for (; single < group[6]; ++single) {
      const int32_t row = matrix.singles[2 * single], place = matrix.singles[2 * single + 1];
      STD_TORCH_CHECK(row >= 0 && row < group[1] && place >= 0 && place < matrix.num_places,
                      "gather_groups: a single entry lies outside of its group");
    }
    rows += group[1];
  }
  STD_TORCH_CHECK(rows == num_rows, "gather_groups: groups have ", rows, " rows, the result ", num_rows);
  STD_TORCH_CHECK(
      strip == num_strips && strip_value == num_strip_values && diagonal == num_diagonals && single == num_singles,
      "gather_groups: groups must end with ", num_strips, " strips of ", num_strip_values, " diagonals, ",
      num_diagonals, " other diagonals and ", num_singles, " single entries");
}

Tensor gather_groups(const Tensor& dense, const Tensor& places, const Tensor& groups, const Tensor& strips,
                     const Tensor& strip_values, const Tensor& diagonals, const Tensor& values, const Tensor& singles,
                     const Tensor& single_values, const std::optional<Tensor>& bias, int64_t num_rows,
                     int64_t row_step) {
  const bool is_double = dense.scalar_type() == ScalarType::Double;
  const ScalarType sum = is_double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(dense.dim() == 3 && places.dim() == 1 && places.numel() == dense.size(1),
                  "gather_groups: dense must be (B, num_columns, O), places one number for each column");
  STD_TORCH_CHECK(groups.dim() == 2 && groups.size(1) == kFields && strips.dim() == 1 && strip_values.dim() == 1 &&
                      diagonals.dim() == 1 && values.dim() == 2 && values.size(0) == diagonals.numel() &&
                      values.size(1) == kGroup && singles.dim() == 2 && singles.size(1) == 2 &&
                      single_values.dim() == 1 && single_values.numel() == singles.size(0),
                  "gather_groups: expected groups (G, 7), strips and their values, diagonals (E,) with values (E, 8), "
                  "and singles (M, 2) with values (M,)");
  for (const Tensor& indices : {places, groups, strips, diagonals, singles}) {
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int && indices.is_cpu(),
                    "gather_groups: places, groups, strips, diagonals and singles must be int32 on the CPU");
  }
  STD_TORCH_CHECK(strip_values.scalar_type() == sum && values.scalar_type() == sum &&
                      single_values.scalar_type() == sum &&
                      (!bias || (bias->scalar_type() == sum && bias->dim() == 1 && bias->size(0) == dense.size(2))),
                  "gather_groups: values and bias must be ", sum, ", and the bias one number for each output");
  STD_TORCH_CHECK(
      dense.is_cpu() && strip_values.is_cpu() && values.is_cpu() && single_values.is_cpu() && (!bias || bias->is_cpu()),
      "gather_groups: all tensors must be on the CPU");
  STD_TORCH_CHECK(num_rows >= 0 && row_step >= 1, "gather_groups: num_rows must be >= 0 and row_step >= 1");

  const Tensor whole[] = {torch::stable::contiguous(places),    torch::stable::contiguous(groups),
                          torch::stable::contiguous(strips),    torch::stable::contiguous(strip_values),
                          torch::stable::contiguous(diagonals), torch::stable::contiguous(values),
                          torch::stable::contiguous(singles),   torch::stable::contiguous(single_values)};
  const std::optional<Tensor> whole_bias = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  Groups matrix{whole[0].const_data_ptr<int32_t>(),
                whole[1].const_data_ptr<int32_t>(),
                whole[2].const_data_ptr<int32_t>(),
                whole[3].const_data_ptr(),
                whole[4].const_data_ptr<int32_t>(),
                whole[5].const_data_ptr(),
                whole[6].const_data_ptr<int32_t>(),
                whole[7].const_data_ptr(),
                dense.size(1),
                groups.size(0),
                0,
                row_step};
  for (int64_t m = 0; m < matrix.num_columns; ++m) {
    STD_TORCH_CHECK(matrix.places[m] >= 0, "gather_groups: places must be >= 0");
    matrix.num_places = std::max<int64_t>(matrix.num_places, matrix.places[m] + kGroup);
  }
  check(matrix, num_rows, strips.numel(), strip_values.numel(), diagonals.numel(), singles.size(0));

  Tensor out = torch::stable::new_empty(dense, {dense.size(0), num_rows, dense.size(2)});
  if (out.numel() == 0) {
    return out;
  }
  lofi_fast::with_floating_type(dense.scalar_type(), "gather_groups", [&]<typename T>(T) {
    gather_grouped<T>(dense, matrix, bias ? whole_bias->const_data_ptr<Sum<T>>() : nullptr, out);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lofi_fast, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("gather_groups", TORCH_BOX(&gather_groups));
}
