// CPU form of conv3x3 and of its gradients in float32, by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray
// 2016): a tile of 4 x 4 outputs takes 36 products for each pair of channels, where the definition takes 144.
//
//     out        = A^T [ sum over channels of (G weight G^T) * (B^T x B) ] A          x: the tile's 6 x 6 inputs
//     grad_x     = the same of grad, with the weight turned by 180 degrees and its channels exchanged
//     grad_weight = G^T [ sum over tiles of (B^T x B) * (A grad A^T) ] G
//
// so that for each of the 36 points of a tile there is one matrix product over channels, or over tiles. Interpolation
// is at 0, +-sqrt(1/2), +-sqrt(2) and infinity: half the error of the usual 0, +-1, +-2, in as many operations.
//
// Where a side is no multiple of 4, what is left of it are tiles of 3, 2 or 1 outputs, which need 5, 4 or 3 of the 6
// points along that side. At these points G is the one of whole tiles, so that all share the transformed weight; A and
// B are their own. Images of 6 x 6 are then 100 products for each pair of channels, where whole tiles would take 144.
//
// Nothing here depends on the number of threads: a tile's outputs are worked out by one of them, and the sum over tiles
// runs in their order.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>

#include "../cpu.h"

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kTile = 4;                      // outputs of a tile, along each axis
constexpr int kIn = kTile + 2;                // its inputs
constexpr int kPoints = kIn * kIn;            // products of a tile for each pair of channels
constexpr int64_t kPanelRows = 6;             // of a matrix, kept in registers at a time
constexpr int64_t kChannels = 16;             // channels come in multiples of this
constexpr float kA = 0.70710678118654752440;  // the inner points of interpolation: sqrt(1/2)
constexpr float kB = 1.41421356237309504880;  // the outer ones: sqrt(2)

// From the matrix of one point to the next one's: a line of the cache more than it has numbers. Apart by a power of two
// of bytes, all 36 would share a few lines of the cache, and push each other out of it.
LOFI_FAST_INLINE int64_t apart(int64_t numbers) { return numbers + 64 / static_cast<int64_t>(sizeof(float)); }

constexpr int64_t kPacked = 8192;  // numbers of a matrix, from which on it is packed

LOFI_FAST_INLINE int64_t even_rows(int64_t count) { return (count + 1) / 2 * 2; }

template <int kBytes>
struct Vector {
  typedef float Lanes __attribute__((vector_size(kBytes)));
  static constexpr int64_t kLanes = kBytes / sizeof(float);
};

// Lanes in a tensor, which promises the alignment of a number and no more. An attribute of the type itself would not
// do: it is lost where the type is a template's argument, and its arrays would be aligned as little.
template <typename Lanes>
struct __attribute__((packed, may_alias)) Unaligned {
  Lanes lanes;
};

template <typename Lanes>
LOFI_FAST_INLINE Lanes load(const float* p) {
  return reinterpret_cast<const Unaligned<Lanes>*>(p)->lanes;
}

template <typename Lanes>
LOFI_FAST_INLINE void store(float* p, Lanes lanes) {
  reinterpret_cast<Unaligned<Lanes>*>(p)->lanes = lanes;
}

// Where a tile of so many outputs along an axis is interpolated, of 0, sqrt(1/2), -sqrt(1/2), sqrt(2), -sqrt(2) and
// infinity: as many points as it has inputs.
constexpr int kPointsOf[kTile + 1][kIn] = {{}, {0, 1, 5}, {0, 1, 2, 5}, {0, 1, 2, 3, 5}, {0, 1, 2, 3, 4, 5}};

// The transforms along one axis; `from` and `to` are apart by whole vectors. Those of tiles are for kSize outputs.

// B^T: kSize + 2 inputs -> as many points.
template <int kSize, typename Lanes>
LOFI_FAST_INLINE void transform_input(const Lanes* from, int from_step, Lanes* to, int to_step) {
  const Lanes d0 = from[0], d1 = from[from_step], d2 = from[2 * from_step];
  if constexpr (kSize == 1) {
    to[0] = d0 - kB * d1;
    to[to_step] = (-1.5f * kB) * d1;
    to[2 * to_step] = d2 - kA * d1;
  } else if constexpr (kSize == 2) {
    const Lanes d3 = from[3 * from_step];
    to[0] = d0 - 2.f * d2;
    const Lanes even = -1.5f * d2, odd = (-1.5f * kA) * d1;
    to[to_step] = even + odd;
    to[2 * to_step] = even - odd;
    to[3 * to_step] = d3 - 0.5f * d1;
  } else if constexpr (kSize == 3) {
    const Lanes d3 = from[3 * from_step], d4 = from[4 * from_step];
    to[0] = d0 - kA * d1 - 2.f * d2 + kB * d3;
    to[to_step] = 1.5f * (kB * (d3 - d1) - d2);
    to[2 * to_step] = kA * (d1 + d3) - 1.5f * d2;
    const Lanes odd = kB * (d3 - 0.5f * d1);
    to[3 * to_step] = 2.f * odd;
    to[4 * to_step] = d4 - odd - 0.5f * d2;
  } else {
    const Lanes d3 = from[3 * from_step], d4 = from[4 * from_step], d5 = from[5 * from_step];
    to[0] = d0 - 2.5f * d2 + d4;
    const Lanes even_a = d4 - 2.f * d2, odd_a = kA * (d3 - 2.f * d1);
    to[to_step] = even_a + odd_a;
    to[2 * to_step] = even_a - odd_a;
    const Lanes even_b = d4 - 0.5f * d2, odd_b = kB * (d3 - 0.5f * d1);
    to[3 * to_step] = even_b + odd_b;
    to[4 * to_step] = even_b - odd_b;
    to[5 * to_step] = d1 - 2.5f * d3 + d5;
  }
}

// A: kSize gradients of outputs -> kSize + 2 points.
template <int kSize, typename Lanes>
LOFI_FAST_INLINE void transform_grad(const Lanes* from, int from_step, Lanes* to, int to_step) {
  const Lanes y0 = from[0];
  to[0] = y0;
  if constexpr (kSize == 1) {
    to[to_step] = y0;
    to[2 * to_step] = y0;
  } else if constexpr (kSize == 2) {
    const Lanes y1 = from[from_step], odd = kA * y1;
    to[to_step] = y0 + odd;
    to[2 * to_step] = y0 - odd;
    to[3 * to_step] = y1;
  } else if constexpr (kSize == 3) {
    const Lanes y1 = from[from_step], y2 = from[2 * from_step];
    const Lanes even = y0 + 0.5f * y2, odd = kA * y1;
    to[to_step] = even + odd;
    to[2 * to_step] = even - odd;
    to[3 * to_step] = y0 + kB * y1 + 2.f * y2;
    to[4 * to_step] = y2;
  } else {
    const Lanes y1 = from[from_step], y2 = from[2 * from_step], y3 = from[3 * from_step];
    const Lanes even_a = y0 + 0.5f * y2, odd_a = kA * (y1 + 0.5f * y3);
    to[to_step] = even_a + odd_a;
    to[2 * to_step] = even_a - odd_a;
    const Lanes even_b = y0 + 2.f * y2, odd_b = kB * (y1 + 2.f * y3);
    to[3 * to_step] = even_b + odd_b;
    to[4 * to_step] = even_b - odd_b;
    to[5 * to_step] = y3;
  }
}

// A^T: kSize + 2 points -> kSize outputs.
template <int kSize, typename Lanes>
LOFI_FAST_INLINE void transform_output(const Lanes* from, int from_step, Lanes* to, int to_step) {
  const Lanes p0 = from[0], p1 = from[from_step], p2 = from[2 * from_step];
  if constexpr (kSize == 1) {
    to[0] = p0 + p1 + p2;
  } else if constexpr (kSize == 2) {
    to[0] = p0 + p1 + p2;
    to[to_step] = kA * (p1 - p2) + from[3 * from_step];
  } else if constexpr (kSize == 3) {
    const Lanes even = p1 + p2, p3 = from[3 * from_step];
    to[0] = p0 + even + p3;
    to[to_step] = kA * (p1 - p2) + kB * p3;
    to[2 * to_step] = 0.5f * even + 2.f * p3 + from[4 * from_step];
  } else {
    const Lanes p3 = from[3 * from_step], p4 = from[4 * from_step];
    const Lanes even_a = p1 + p2, odd_a = kA * (p1 - p2);
    const Lanes even_b = p3 + p4, odd_b = kB * (p3 - p4);
    to[0] = p0 + even_a + even_b;
    to[to_step] = odd_a + odd_b;
    to[2 * to_step] = 0.5f * even_a + 2.f * even_b;
    to[3 * to_step] = 0.5f * odd_a + 2.f * odd_b + from[5 * from_step];
  }
}

// G: 3 weights -> 6 points.
template <typename Lanes>
LOFI_FAST_INLINE void transform_weight(const Lanes* from, int from_step, Lanes* to, int to_step) {
  const Lanes w0 = from[0], w1 = from[from_step], w2 = from[2 * from_step];
  to[0] = w0;
  const Lanes even_a = (-2 / 3.f) * w0 - (1 / 3.f) * w2, odd_a = (-2 / 3.f * kA) * w1;
  to[to_step] = even_a + odd_a;
  to[2 * to_step] = even_a - odd_a;
  const Lanes even_b = (1 / 6.f) * w0 + (1 / 3.f) * w2, odd_b = (1 / 6.f * kB) * w1;
  to[3 * to_step] = even_b + odd_b;
  to[4 * to_step] = even_b - odd_b;
  to[5 * to_step] = w2;
}

// G^T: 6 points -> 3 gradients of weights.
template <typename Lanes>
LOFI_FAST_INLINE void transform_weight_grad(const Lanes* from, int from_step, Lanes* to, int to_step) {
  const Lanes even_a = from[from_step] + from[2 * from_step], odd_a = from[from_step] - from[2 * from_step];
  const Lanes even_b = from[3 * from_step] + from[4 * from_step], odd_b = from[3 * from_step] - from[4 * from_step];
  to[0] = from[0] - (2 / 3.f) * even_a + (1 / 6.f) * even_b;
  to[to_step] = (1 / 6.f * kB) * odd_b - (2 / 3.f * kA) * odd_a;
  to[2 * to_step] = (1 / 3.f) * (even_b - even_a) + from[5 * from_step];
}

// Tiles of one size in channels-last images: `down` x `across` to an image, from (top, left) on.
struct Tiles {
  int64_t num, height, width;  // of the images
  int rows = 0, columns = 0;   // outputs of a tile
  int64_t top = 0, left = 0;
  int64_t down = 0, across = 0;

  int64_t count() const { return num * down * across; }
  LOFI_FAST_INLINE int point_rows() const { return rows + 2; }
  LOFI_FAST_INLINE int point_columns() const { return columns + 2; }
  LOFI_FAST_INLINE int points() const { return point_rows() * point_columns(); }
  // Which of the 36 points of a whole tile its p-th is.
  LOFI_FAST_INLINE int point(int p) const {
    return kPointsOf[rows][p / point_columns()] * kIn + kPointsOf[columns][p % point_columns()];
  }
};

// All outputs of images are in tiles of up to four sizes, whole ones first.
struct Tiling {
  Tiles sizes[4];
  int num_sizes = 0;

  Tiling(int64_t num, int64_t height, int64_t width) {
    for (const bool low : {false, true}) {
      for (const bool right : {false, true}) {
        Tiles tiles{num, height, width};
        tiles.rows = low ? height % kTile : kTile;
        tiles.columns = right ? width % kTile : kTile;
        tiles.top = low ? height - tiles.rows : 0;
        tiles.left = right ? width - tiles.columns : 0;
        tiles.down = low ? tiles.rows > 0 : height / kTile;
        tiles.across = right ? tiles.columns > 0 : width / kTile;
        if (tiles.count() > 0) {
          sizes[num_sizes++] = tiles;
        }
      }
    }
  }

  const Tiles* begin() const { return sizes; }
  const Tiles* end() const { return sizes + num_sizes; }

  // A bit for each of the 36 points that some tile has.
  uint64_t points() const {
    uint64_t bits = 0;
    for (const Tiles& tiles : *this) {
      for (int p = 0; p < tiles.points(); ++p) {
        bits |= uint64_t{1} << tiles.point(p);
      }
    }
    return bits;
  }

  int64_t count() const {
    int64_t sum = 0;
    for (const Tiles& tiles : *this) {
      sum += tiles.count();
    }
    return sum;
  }
};

// Calls f.operator()<rows, columns>() of a tile.
template <typename F>
LOFI_FAST_INLINE void with_size(const Tiles& tiles, const F& f) {
  const auto with_rows = [&]<int kRows>() LOFI_FAST_INLINED {
    switch (tiles.columns) {
      case 1:
        return f.template operator()<kRows, 1>();
      case 2:
        return f.template operator()<kRows, 2>();
      case 3:
        return f.template operator()<kRows, 3>();
      default:
        return f.template operator()<kRows, 4>();
    }
  };
  switch (tiles.rows) {
    case 1:
      return with_rows.template operator()<1>();
    case 2:
      return with_rows.template operator()<2>();
    case 3:
      return with_rows.template operator()<3>();
    default:
      return with_rows.template operator()<4>();
  }
}

// Where a tile's outputs begin.
struct Place {
  int64_t image, y, x;

  LOFI_FAST_INLINE Place(const Tiles& tiles, int64_t index)
      : image(index / (tiles.down * tiles.across)),
        y(tiles.top + index / tiles.across % tiles.down * kTile),
        x(tiles.left + index % tiles.across * kTile) {}

  // Of a pixel's first channel in images of so many; pixels beyond the edge have none, but may be reckoned with.
  LOFI_FAST_INLINE int64_t offset(const Tiles& tiles, int64_t channels, int64_t row, int64_t column) const {
    return ((image * tiles.height + row) * tiles.width + column) * channels;
  }
};

// Reads kRows x kColumns pixels, from (first, first) of a tile on, each of one vector of channels, and zeros beyond the
// edge.
template <int kRows, int kColumns, typename Lanes>
LOFI_FAST_INLINE void read_tile(const Tiles& tiles, const Place& place, int first, const float* images,
                                int64_t channels, int64_t channel, Lanes* pixels) {
  const int64_t top = place.y + first, left = place.x + first;
  const int64_t corner = place.offset(tiles, channels, top, left) + channel;
  const int64_t row = tiles.width * channels;
  if (top >= 0 && left >= 0 && top + kRows <= tiles.height && left + kColumns <= tiles.width) {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        pixels[i * kColumns + j] = load<Lanes>(images + corner + i * row + j * channels);
      }
    }
    return;
  }
  for (int i = 0; i < kRows; ++i) {
    const bool inside = top + i >= 0 && top + i < tiles.height;
    for (int j = 0; j < kColumns; ++j) {
      pixels[i * kColumns + j] = inside && left + j >= 0 && left + j < tiles.width
                                     ? load<Lanes>(images + corner + i * row + j * channels)
                                     : Lanes{};
    }
  }
}

// Both transforms of tiles [first, first + count): points[p][stride of tiles][channels], whose matrices are `apart`.
template <int kBytes, bool kGrad>
LOFI_FAST_INLINE void points_of_tiles(const Tiles& tiles, const float* images, int64_t channels, int64_t first,
                                      int64_t count, int64_t stride, float* points) {
  using Lanes = typename Vector<kBytes>::Lanes;
  with_size(tiles, [&]<int kRows, int kColumns>() LOFI_FAST_INLINED {
    constexpr int kDown = kRows + 2, kAcross = kColumns + 2;
    constexpr int kHeight = kGrad ? kRows : kDown, kWidth = kGrad ? kColumns : kAcross;
    for (int64_t t = 0; t < count; ++t) {
      const Place place(tiles, first + t);
      for (int64_t channel = 0; channel < channels; channel += Vector<kBytes>::kLanes) {
        Lanes pixels[kHeight * kWidth], half[kDown * kWidth], whole[kAcross];
        read_tile<kHeight, kWidth, Lanes>(tiles, place, kGrad ? 0 : -1, images, channels, channel, pixels);
        for (int j = 0; j < kWidth; ++j) {
          if constexpr (kGrad) {
            transform_grad<kRows>(pixels + j, kWidth, half + j, kWidth);
          } else {
            transform_input<kRows>(pixels + j, kWidth, half + j, kWidth);
          }
        }
        for (int i = 0; i < kDown; ++i) {
          if constexpr (kGrad) {
            transform_grad<kColumns>(half + i * kWidth, 1, whole, 1);
          } else {
            transform_input<kColumns>(half + i * kWidth, 1, whole, 1);
          }
          for (int j = 0; j < kAcross; ++j) {
            store<Lanes>(points + (i * kAcross + j) * apart(stride * channels) + t * channels + channel, whole[j]);
          }
        }
      }
    }
  });
}

// result (kHeight rows of kVectors vectors) = or += sum over k of left[row][k] * right[k].
template <int kBytes, int kHeight, int kVectors, bool kAdd>
LOFI_FAST_INLINE void multiply_panel(const float* __restrict left, int64_t left_row, int64_t left_k,
                                     const float* __restrict right, int64_t right_k, int64_t depth,
                                     float* __restrict result, int64_t result_row) {
  using Lanes = typename Vector<kBytes>::Lanes;
  constexpr int64_t kLanes = Vector<kBytes>::kLanes;
  Lanes sums[kHeight][kVectors];
  for (int i = 0; i < kHeight; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = kAdd ? load<Lanes>(result + i * result_row + j * kLanes) : Lanes{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Lanes values[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      values[j] = load<Lanes>(right + k * right_k + j * kLanes);
    }
    for (int i = 0; i < kHeight; ++i) {
      const float factor = left[i * left_row + k * left_k];
      for (int j = 0; j < kVectors; ++j) {
        sums[i][j] += factor * values[j];
      }
    }
  }
  for (int i = 0; i < kHeight; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      store<Lanes>(result + i * result_row + j * kLanes, sums[i][j]);
    }
  }
}

// Calls f.operator()<rows of a panel>(first row) for an even number of rows, cut into panels: two of 4 rather than one
// of 6 and one of 2, whose few sums would wait for each other.
template <typename F>
LOFI_FAST_INLINE void in_panels(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; rows - row >= kPanelRows && rows - row != kPanelRows + 2; row += kPanelRows) {
    f.template operator()<kPanelRows>(row);
  }
  for (; rows - row >= 4; row += 4) {
    f.template operator()<4>(row);
  }
  if (row < rows) {
    f.template operator()<2>(row);
  }
}

// Columns of a matrix that are worked on together: what registers hold, of what the number of columns is a multiple of.
template <int kBytes>
LOFI_FAST_INLINE int64_t panel_columns(int64_t columns) {
  if constexpr (kBytes == 64) {
    return columns % 64 == 0 ? 64 : columns % 32 == 0 ? 32 : 16;
  } else {
    return 16;
  }
}

// Calls f.operator()<vectors>() of a panel of so many columns.
template <int kBytes, typename F>
LOFI_FAST_INLINE void with_columns(int64_t columns, const F& f) {
  if constexpr (kBytes == 64) {
    if (columns == 64) {
      return f.template operator()<4>();
    }
    if (columns == 32) {
      return f.template operator()<2>();
    }
  }
  f.template operator()<64 / kBytes>();
}

// One call of the operator. Matrices of the transformed weight are cut into panels of `columns` output channels.
struct Forward {
  Tiling tiling;
  uint64_t points_used;
  int64_t in, out;  // channels
  int64_t columns;
  bool turned;          // the weight
  const float* x;       // (N, H, W, in)
  const float* weight;  // (out, 3, 3, in); (in, 3, 3, out) where it is turned
  const float* bias;    // (out,) or nullptr
  const float* mask;    // (N, H, W, out) or nullptr: where it is not above 0, the result is 0
  bool relu;
  float* result;  // (N, H, W, out)

  int64_t panels() const { return out / columns; }
  int64_t panel_points() const { return kPoints * apart(in * columns); }
};

// Of the weights of one input channel and one vector of output channels.
template <int kBytes>
LOFI_FAST_INLINE void weight_points(const Forward& f, const typename Vector<kBytes>::Lanes* taps, float* points) {
  using Lanes = typename Vector<kBytes>::Lanes;
  Lanes half[3 * kIn], whole[kIn];
  for (int j = 0; j < 3; ++j) {
    transform_weight(taps + j, 3, half + j, 3);
  }
  for (int i = 0; i < kIn; ++i) {
    transform_weight(half + 3 * i, 1, whole, 1);
    for (int j = 0; j < kIn; ++j) {
      if (f.points_used >> (i * kIn + j) & 1) {
        store<Lanes>(points + (i * kIn + j) * apart(f.in * f.columns), whole[j]);
      }
    }
  }
}

// Of one panel, for inputs [begin, end): points[36][in][columns].
template <int kBytes>
LOFI_FAST_INLINE void panel_points_of(const Forward& f, int64_t panel, int64_t begin, int64_t end, float* points) {
  using Lanes = typename Vector<kBytes>::Lanes;
  constexpr int64_t kLanes = Vector<kBytes>::kLanes;
  for (int64_t column = 0; column < f.columns; column += kLanes) {
    const int64_t k = panel * f.columns + column;
    if (f.turned) {
      for (int64_t c = begin; c < end; ++c) {
        Lanes taps[9];
        for (int i = 0; i < 9; ++i) {
          taps[i] = load<Lanes>(f.weight + (c * 9 + 8 - i) * f.out + k);
        }
        weight_points<kBytes>(f, taps, points + c * f.columns + column);
      }
      continue;
    }
    // Output channels lie apart in the weight, and are to lie side by side.
    for (int64_t first = begin; first < end; first += kChannels) {
      Lanes taps[kChannels][9];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < 9; ++i) {
          const float* const from = f.weight + ((k + lane) * 9 + i) * f.in + first;
          for (int64_t c = 0; c < kChannels; ++c) {
            reinterpret_cast<float*>(&taps[c][i])[lane] = from[c];
          }
        }
      }
      for (int64_t c = 0; c < kChannels; ++c) {
        weight_points<kBytes>(f, taps[c], points + (first + c) * f.columns + column);
      }
    }
  }
}

// From the products of tiles [first, first + count), points[p][stride of tiles][columns], to `columns` channels of the
// result from `channel` on.
template <int kBytes>
LOFI_FAST_INLINE void outputs_of_tiles(const Forward& f, const Tiles& tiles, int64_t first, int64_t count,
                                       int64_t stride, int64_t channel, const float* points) {
  using Lanes = typename Vector<kBytes>::Lanes;
  with_size(tiles, [&]<int kRows, int kColumns>() LOFI_FAST_INLINED {
    constexpr int kDown = kRows + 2, kAcross = kColumns + 2;
    for (int64_t t = 0; t < count; ++t) {
      const Place place(tiles, first + t);
      for (int64_t column = 0; column < f.columns; column += Vector<kBytes>::kLanes) {
        Lanes products[kDown * kAcross], half[kRows * kAcross], whole[kColumns];
        for (int p = 0; p < kDown * kAcross; ++p) {
          products[p] = load<Lanes>(points + p * apart(stride * f.columns) + t * f.columns + column);
        }
        for (int j = 0; j < kAcross; ++j) {
          transform_output<kRows>(products + j, kAcross, half + j, kAcross);
        }
        const Lanes bias = f.bias == nullptr ? Lanes{} : load<Lanes>(f.bias + channel + column);
        for (int i = 0; i < kRows; ++i) {
          transform_output<kColumns>(half + i * kAcross, 1, whole, 1);
          const int64_t offset = place.offset(tiles, f.out, place.y + i, place.x) + channel + column;
          for (int j = 0; j < kColumns; ++j) {
            Lanes value = whole[j] + bias;
            if (f.relu) {
              value = value < 0 ? Lanes{} : value;  // a NaN stays
            }
            if (f.mask != nullptr) {
              value = load<Lanes>(f.mask + offset + j * f.out) <= 0 ? Lanes{} : value;
            }
            store<Lanes>(f.result + offset + j * f.out, value);
          }
        }
      }
    }
  });
}

// Of tiles [first, first + count), whose points are inputs[p][stride][in], one panel of output channels, whose points
// are points[36][in][columns]. `stride` is even: where `count` is odd the tile beyond it is multiplied too, and its
// products left alone.
template <int kBytes>
LOFI_FAST_INLINE void forward_panel_of(const Forward& f, const Tiles& tiles, int64_t first, int64_t count,
                                       const float* inputs, int64_t stride, int64_t panel, const float* points,
                                       float* products) {
  const int64_t rows = even_rows(count);
  with_columns<kBytes>(f.columns, [&]<int kVectors>() LOFI_FAST_INLINED {
    for (int p = 0; p < tiles.points(); ++p) {
      const float* const left = inputs + p * apart(stride * f.in);
      const float* const right = points + tiles.point(p) * apart(f.in * f.columns);
      float* const to = products + p * apart(rows * f.columns);
      in_panels(rows, [&]<int kHeight>(int64_t row) LOFI_FAST_INLINED {
        multiply_panel<kBytes, kHeight, kVectors, false>(left + row * f.in, f.in, 1, right, f.columns, f.in,
                                                         to + row * f.columns, f.columns);
      });
    }
  });
  outputs_of_tiles<kBytes>(f, tiles, first, count, rows, panel * f.columns, products);
}

// The gradient of the weight.
struct WeightGrad {
  int64_t in, out;    // channels
  int64_t columns;    // of a panel of input channels
  const float* x;     // (N, H, W, in)
  const float* grad;  // (N, H, W, out)
  float* result;      // (out, 3, 3, in)
};

// Copies `width` numbers of each row, which lie `step` apart.
LOFI_FAST_INLINE void pack(const float* from, int64_t step, int64_t rows, int64_t width, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      to[row * width + i] = from[row * step + i];
    }
  }
}

// Of a block of `count` tiles, whose points are grads[p][count][out] and inputs[p][count][in]: the sums over its
// tiles, for their points [begin, end) and outputs [row, last), put or added to sums[36][last - row][in]. Where that is
// more than the first-level cache holds, what is read again and again is packed first.
template <int kBytes>
LOFI_FAST_INLINE void block_sums_of(const WeightGrad& g, const Tiles& tiles, const float* inputs, const float* grads,
                                    int64_t count, bool add, int64_t begin, int64_t end, int64_t row, int64_t last,
                                    float* sums) {
  const int64_t rows = last - row;
  const bool packs = count * std::max(g.in, g.out) >= kPacked;
  std::vector<float> packed(packs ? count * (rows + g.columns) : 0);
  with_columns<kBytes>(g.columns, [&]<int kVectors>() LOFI_FAST_INLINED {
    for (int64_t p = begin; p < end; ++p) {
      const float* left = grads + p * apart(count * g.out) + row;
      if (packs) {
        in_panels(rows, [&]<int kHeight>(int64_t first) LOFI_FAST_INLINED {
          pack(left + first, g.out, count, kHeight, packed.data() + first * count);
        });
        left = packed.data();
      }
      for (int64_t column = 0; column < g.in; column += g.columns) {
        const float* right = inputs + p * apart(count * g.in) + column;
        int64_t right_k = g.in;
        if (packs) {
          pack(right, g.in, count, kVectors * Vector<kBytes>::kLanes, packed.data() + rows * count);
          right = packed.data() + rows * count;
          right_k = g.columns;
        }
        float* const to = sums + tiles.point(p) * apart(rows * g.in) + column;
        in_panels(rows, [&]<int kHeight>(int64_t first) LOFI_FAST_INLINED {
          const float* const from = left + first * (packs ? count : 1);
          const int64_t left_k = packs ? kHeight : g.out;
          if (add) {
            multiply_panel<kBytes, kHeight, kVectors, true>(from, 1, left_k, right, right_k, count, to + first * g.in,
                                                            g.in);
          } else {
            multiply_panel<kBytes, kHeight, kVectors, false>(from, 1, left_k, right, right_k, count, to + first * g.in,
                                                             g.in);
          }
        });
      }
    }
  });
}

// Outputs [begin, end), from sums[36][stride][in] whose first are those of output `begin`.
template <int kBytes>
LOFI_FAST_INLINE void weight_grad_of(const WeightGrad& g, const float* sums, int64_t stride, int64_t begin,
                                     int64_t end) {
  using Lanes = typename Vector<kBytes>::Lanes;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < g.in; column += Vector<kBytes>::kLanes) {
      Lanes points[kPoints], half[3 * kIn], whole[3];
      for (int p = 0; p < kPoints; ++p) {
        points[p] = load<Lanes>(sums + p * apart(stride * g.in) + (row - begin) * g.in + column);
      }
      for (int j = 0; j < kIn; ++j) {
        transform_weight_grad(points + j, kIn, half + j, kIn);
      }
      for (int i = 0; i < 3; ++i) {
        transform_weight_grad(half + i * kIn, 1, whole, 1);
        for (int j = 0; j < 3; ++j) {
          store<Lanes>(g.result + (row * 9 + i * 3 + j) * g.in + column, whole[j]);
        }
      }
    }
  }
}

// The work, compiled for vectors of one size.
struct Machine {
  int64_t (*panel_columns)(int64_t);
  void (*input_points)(const Tiles&, const float*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*grad_points)(const Tiles&, const float*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*panel_points)(const Forward&, int64_t, int64_t, int64_t, float*);
  void (*forward_panel)(const Forward&, const Tiles&, int64_t, int64_t, const float*, int64_t, int64_t, const float*,
                        float*);
  void (*block_sums)(const WeightGrad&, const Tiles&, const float*, const float*, int64_t, bool, int64_t, int64_t,
                     int64_t, int64_t, float*);
  void (*weight_grad)(const WeightGrad&, const float*, int64_t, int64_t, int64_t);
};

// clang-format off
#define LOFI_FAST_MACHINE(name, bytes, target)                                                                         \
  namespace name {                                                                                                     \
  target int64_t columns(int64_t channels) { return panel_columns<bytes>(channels); }                                  \
  target void input_points(const Tiles& tiles, const float* images, int64_t channels, int64_t first, int64_t count,    \
                           int64_t stride, float* points) {                                                            \
    points_of_tiles<bytes, false>(tiles, images, channels, first, count, stride, points);                              \
  }                                                                                                                    \
  target void grad_points(const Tiles& tiles, const float* images, int64_t channels, int64_t first, int64_t count,     \
                          int64_t stride, float* points) {                                                             \
    points_of_tiles<bytes, true>(tiles, images, channels, first, count, stride, points);                               \
  }                                                                                                                    \
  target void panel_points(const Forward& f, int64_t panel, int64_t begin, int64_t end, float* points) {               \
    panel_points_of<bytes>(f, panel, begin, end, points);                                                              \
  }                                                                                                                    \
  target void forward_panel(const Forward& f, const Tiles& tiles, int64_t first, int64_t count, const float* inputs,   \
                            int64_t stride, int64_t panel, const float* points, float* products) {                     \
    forward_panel_of<bytes>(f, tiles, first, count, inputs, stride, panel, points, products);                          \
  }                                                                                                                    \
  target void block_sums(const WeightGrad& g, const Tiles& tiles, const float* inputs, const float* grads,             \
                         int64_t count, bool add, int64_t begin, int64_t end, int64_t row, int64_t last,               \
                         float* sums) {                                                                                \
    block_sums_of<bytes>(g, tiles, inputs, grads, count, add, begin, end, row, last, sums);                            \
  }                                                                                                                    \
  target void weight_grad(const WeightGrad& g, const float* sums, int64_t stride, int64_t begin, int64_t end) {        \
    weight_grad_of<bytes>(g, sums, stride, begin, end);                                                                \
  }                                                                                                                    \
  constexpr Machine machine{columns, input_points, grad_points, panel_points, forward_panel, block_sums, weight_grad}; \
  }
// clang-format on

LOFI_FAST_MACHINE(plain, 16, )
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
LOFI_FAST_MACHINE(avx2, 32, __attribute__((target("arch=x86-64-v3"))))
LOFI_FAST_MACHINE(avx512, 64, __attribute__((target("arch=x86-64-v4"))))
#endif
#undef LOFI_FAST_MACHINE

// The widest vectors of this CPU, or those that torch is told to stop at: ATEN_CPU_CAPABILITY=avx2 or default.
const Machine& choose_machine() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const char* const told = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = told == nullptr ? "" : told;
  if (most != "default" && __builtin_cpu_supports("x86-64-v3")) {
    return most != "avx2" && __builtin_cpu_supports("x86-64-v4") ? avx512::machine : avx2::machine;
  }
#endif
  return plain::machine;
}

const Machine& machine() {
  static const Machine& chosen = choose_machine();
  return chosen;
}

Tensor floats(int64_t num) { return torch::stable::empty({num}, ScalarType::Float); }

Tensor dense(const Tensor& x) { return torch::stable::contiguous(x, MemoryFormat::ChannelsLast); }

Tensor empty_images(int64_t num, int64_t channels, int64_t height, int64_t width) {
  return torch::stable::empty({num, channels, height, width}, ScalarType::Float, std::nullopt, std::nullopt,
                              std::nullopt, MemoryFormat::ChannelsLast);
}

// Calls f(worker, begin, end) for as many workers as there are threads, with equal shares of [0, num).
template <typename F>
void share(int64_t workers, int64_t num, const F& f) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      f(worker, num * worker / workers, num * (worker + 1) / workers);
    }
  });
}

// Many tiles: the whole weight is transformed, then tiles in blocks. A block's points and products stay in a core's
// cache beside the panel that they are multiplied with.
void convolve_blocks(const Machine& run, const Forward& f) {
  const int64_t threads = torch::stable::get_num_threads();
  constexpr int64_t kBlock = 4 * kPanelRows;
  const auto blocks_of = [](const Tiles& tiles) { return (tiles.count() + kBlock - 1) / kBlock; };
  int64_t blocks = 0;
  for (const Tiles& tiles : f.tiling) {
    blocks += blocks_of(tiles);
  }
  const int64_t workers = std::min(threads, blocks);
  const int64_t own = kPoints * (apart(kBlock * f.in) + apart(kBlock * f.columns));
  Tensor scratch = floats(f.panels() * f.panel_points() + workers * own);
  float* const points = scratch.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, f.in / kChannels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = 0; panel < f.panels(); ++panel) {
      run.panel_points(f, panel, begin * kChannels, end * kChannels, points + panel * f.panel_points());
    }
  });
  share(workers, blocks, [&](int64_t worker, int64_t begin, int64_t end) {
    float* const inputs = points + f.panels() * f.panel_points() + worker * own;
    float* const products = inputs + kPoints * apart(kBlock * f.in);
    int64_t before = 0;  // blocks of sizes before
    for (const Tiles& tiles : f.tiling) {
      for (int64_t block = std::max(begin - before, int64_t{0}); block < std::min(end - before, blocks_of(tiles));
           ++block) {
        const int64_t first = block * kBlock;
        const int64_t count = std::min(kBlock, tiles.count() - first);
        run.input_points(tiles, f.x, f.in, first, count, kBlock, inputs);
        for (int64_t panel = 0; panel < f.panels(); ++panel) {
          run.forward_panel(f, tiles, first, count, inputs, kBlock, panel, points + panel * f.panel_points(), products);
        }
      }
      before += blocks_of(tiles);
    }
  });
}

// Few tiles, many channels: all tiles are transformed, then the weight panel by panel.
void convolve_panels(const Machine& run, const Forward& f) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min(threads, f.panels());
  constexpr int64_t kBlock = 16 * kPanelRows;
  int64_t all_inputs = 0, largest = 0;
  for (const Tiles& tiles : f.tiling) {
    all_inputs += tiles.points() * apart(even_rows(tiles.count()) * f.in);
    largest = std::max(largest, tiles.points() * apart(std::min(kBlock, even_rows(tiles.count())) * f.columns));
  }
  const int64_t own = f.panel_points() + largest;
  Tensor scratch = floats(all_inputs + workers * own);
  float* to = scratch.mutable_data_ptr<float>();
  for (const Tiles& tiles : f.tiling) {
    torch::stable::parallel_for(0, tiles.count(), 8, [&](int64_t begin, int64_t end) {
      run.input_points(tiles, f.x, f.in, begin, end - begin, even_rows(tiles.count()), to + begin * f.in);
    });
    to += tiles.points() * apart(even_rows(tiles.count()) * f.in);
  }
  share(workers, f.panels(), [&](int64_t worker, int64_t begin, int64_t end) {
    float* const points = to + worker * own;
    for (int64_t panel = begin; panel < end; ++panel) {
      run.panel_points(f, panel, 0, f.in, points);
      const float* inputs = scratch.const_data_ptr<float>();
      for (const Tiles& tiles : f.tiling) {
        const int64_t stride = even_rows(tiles.count());
        for (int64_t first = 0; first < tiles.count(); first += kBlock) {
          run.forward_panel(f, tiles, first, std::min(kBlock, tiles.count() - first), inputs + first * f.in, stride,
                            panel, points, points + f.panel_points());
        }
        inputs += tiles.points() * apart(stride * f.in);
      }
    }
  });
}

// Result (N, out, H, W) of x (N, in, H, W) and of the weight (out, in, 3, 3), or (in, out, 3, 3) where it is turned;
// all channels-last.
Tensor convolve(const Tensor& x, const Tensor& weight, bool turned, const float* bias, bool relu, const float* mask) {
  const Machine& run = machine();
  const int64_t in = x.size(1), out = weight.size(turned ? 1 : 0);
  Tensor result = empty_images(x.size(0), out, x.size(2), x.size(3));
  if (result.numel() > 0) {
    const Tiling tiling(x.size(0), x.size(2), x.size(3));
    const Forward f{tiling,
                    tiling.points(),
                    in,
                    out,
                    run.panel_columns(out),
                    turned,
                    x.const_data_ptr<float>(),
                    weight.const_data_ptr<float>(),
                    bias,
                    mask,
                    relu,
                    result.mutable_data_ptr<float>()};
    // The smaller of the two sets of points is the one that is held whole.
    tiling.count() >= out ? convolve_blocks(run, f) : convolve_panels(run, f);
  }
  return result;
}

// The sum over tiles, in blocks; those of many channels are so large that their points take the room of the sums.
Tensor weight_gradient(const Tensor& grad, const Tensor& x) {
  const Machine& run = machine();
  const int64_t in = x.size(1), out = grad.size(1);
  Tensor result = empty_images(out, in, 3, 3);
  const Tiling tiling(x.size(0), x.size(2), x.size(3));
  if (tiling.count() == 0) {
    return torch::stable::zero_(result);
  }
  const WeightGrad g{in,
                     out,
                     run.panel_columns(in),
                     x.const_data_ptr<float>(),
                     grad.const_data_ptr<float>(),
                     result.mutable_data_ptr<float>()};
  // Threads meet twice a block, so that there is more of it for more of them.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t least = 8 * kPanelRows * std::min<int64_t>(threads, 12);
  const int64_t most = std::max(least, in * out / (in + out));
  const bool one = tiling.count() <= most;
  // Where all tiles are one block, a panel's sums are done with before the next panel's begin. All inputs are read once
  // for each panel, so that panels are wide where they are many.
  const int64_t wide = out % 64 == 0 ? 64 : out % 32 == 0 ? 32 : 16;
  const int64_t rows = !one ? out : tiling.count() < 64 ? run.panel_columns(out) : wide;
  const int64_t workers = one ? std::min(threads, out / rows) : 1;
  const auto numbers = [&](const Tiles& tiles, int64_t count) {
    return tiles.points() * (apart(count * in) + apart(count * out));
  };
  int64_t own = 0;  // points of a block
  for (const Tiles& tiles : tiling) {
    own = one ? own + numbers(tiles, tiles.count()) : std::max(own, numbers(tiles, std::min(tiles.count(), most)));
  }
  const int64_t num_sums = kPoints * apart(rows * in);
  Tensor scratch = floats(own + workers * num_sums);
  float* const points = scratch.mutable_data_ptr<float>();
  float* const sums = points + own;
  const auto transform = [&](const Tiles& tiles, int64_t first, int64_t count, float* inputs) {
    float* const grads = inputs + tiles.points() * apart(count * in);
    torch::stable::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
      run.input_points(tiles, g.x, in, first + begin, end - begin, count, inputs + begin * in);
      run.grad_points(tiles, g.grad, out, first + begin, end - begin, count, grads + begin * out);
    });
    return grads;
  };
  // The first tiles put sums, unless they are without some of the points; all others add to them.
  const bool whole = tiling.sizes[0].points() == kPoints;
  if (one) {
    const float* inputs[4];
    const float* grads[4];
    float* to = points;
    for (int i = 0; i < tiling.num_sizes; ++i) {
      const Tiles& tiles = tiling.sizes[i];
      inputs[i] = to;
      grads[i] = transform(tiles, 0, tiles.count(), to);
      to += numbers(tiles, tiles.count());
    }
    share(workers, out / rows, [&](int64_t worker, int64_t begin, int64_t end) {
      float* const own_sums = sums + worker * num_sums;
      for (int64_t row = begin * rows; row < end * rows; row += rows) {
        if (!whole) {
          std::fill_n(own_sums, num_sums, 0.f);
        }
        for (int i = 0; i < tiling.num_sizes; ++i) {
          const Tiles& tiles = tiling.sizes[i];
          run.block_sums(g, tiles, inputs[i], grads[i], tiles.count(), i > 0 || !whole, 0, tiles.points(), row,
                         row + rows, own_sums);
        }
        run.weight_grad(g, own_sums, rows, row, row + rows);
      }
    });
    return result;
  }
  bool add = !whole;
  if (!whole) {
    std::fill_n(sums, num_sums, 0.f);
  }
  for (const Tiles& tiles : tiling) {
    for (int64_t first = 0; first < tiles.count(); first += most) {
      const int64_t count = std::min(most, tiles.count() - first);
      const float* const grads = transform(tiles, first, count, points);
      torch::stable::parallel_for(0, tiles.points(), 1, [&](int64_t begin, int64_t end) {
        run.block_sums(g, tiles, points, grads, count, add, begin, end, 0, out, sums);
      });
      add = true;
    }
  }
  torch::stable::parallel_for(
      0, out, 8, [&](int64_t begin, int64_t end) { run.weight_grad(g, sums + begin * in, out, begin, end); });
  return result;
}

void check(const char* op, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(
      x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3,
      op, ": expected x (N, C, H, W) and weight (K, C, 3, 3)");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float, op,
                  ": expected float32");
  STD_TORCH_CHECK(weight.size(0) % kChannels == 0 && weight.size(1) % kChannels == 0, op,
                  ": channels must come in multiples of 16, got ", weight.size(1), " and ", weight.size(0));
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu) {
  check("conv3x3", x, weight);
  std::optional<Tensor> dense_bias;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == ScalarType::Float,
                    "conv3x3: bias must be (", weight.size(0), ",) float32");
    dense_bias = torch::stable::contiguous(*bias);
  }
  return convolve(dense(x), dense(weight), false, dense_bias ? dense_bias->const_data_ptr<float>() : nullptr, relu,
                  nullptr);
}

std::tuple<Tensor, Tensor> conv3x3_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool relu,
                                            bool with_x, bool with_weight) {
  check("conv3x3_backward", x, weight);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.scalar_type() == ScalarType::Float && grad.size(0) == x.size(0) &&
                      grad.size(1) == weight.size(0) && grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                  "conv3x3_backward: expected grad (N, K, H, W) float32");
  const Tensor dense_grad = dense(grad), dense_x = dense(x);
  Tensor grad_weight = with_weight ? weight_gradient(dense_grad, dense_x) : floats(0);
  Tensor grad_x = with_x ? convolve(dense_grad, dense(weight), true, nullptr, false,
                                    relu ? dense_x.const_data_ptr<float>() : nullptr)
                         : floats(0);
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lofi_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_backward", TORCH_BOX(&conv3x3_backward));
}
