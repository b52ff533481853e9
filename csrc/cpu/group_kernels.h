// Groups of rows that go to neighbouring slots: quantised, turned and stored together. Include
// after a simd_*.h and row_kernels.h.
//
// Four rows of codes become vectors of quads without leaving registers: packed, each run of 16
// bytes is one quad of dims of the four rows, as K lies in memory; with its 4 x 4 bytes turned it
// is four dims of four tokens, as V does. So codes are written in whole vectors, and once.
//
// A group's rows are read twice: for their scales, then, from the nearest caches, for their codes.
// The second pass, which computes most, has the rows of the next group fetched: rows of one kv head
// are apart, and no core foresees them.

#ifndef OCTAVO_CPU_GROUP_KERNELS_H_
#define OCTAVO_CPU_GROUP_KERNELS_H_

#include <cstring>

#include "isa.h"
#include "layout.h"
#include "octavo/paged_cache.h"
#include "row_scale.h"

namespace octavo::cpu {
namespace {

inline constexpr int kVectorQuads = kLanes / kQuad;  // quads of a row in one vector

static_assert(kGroupRows % kLanes == 0);

// Fetches into the second-level cache: rows at strides of a power of two would push each other out
// of the first.
inline void PrefetchRow(const char* p) { __builtin_prefetch(p, 0, 2); }

// A group's rows in the elements of a codec, and their scales.
template <typename Codec>
struct ScaledRows {
  using Element = typename Codec::Element;

  const RowGroup& group;
  uint16_t scales[kGroupRows];  // float16 bits
  float inverse_scales[kGroupRows];

  const Element* Row(int row) const {
    return reinterpret_cast<const Element*>(group.rows + row * group.row_stride);
  }

  // Returns whether all scales are finite.
  bool FindScales() {
    uint32_t amax_bits[kGroupRows];
    for (int row = 0; row < kGroupRows; ++row) {
      amax_bits[row] = LargestBits<Codec>(Row(row), group.head_dim);
    }
    bool are_finite = true;
    for (int row = 0; row < kGroupRows; ++row) {
      const RowScale scale = ScaleOf(amax_bits[row]);
      are_finite &= scale.IsFinite();
      scales[row] = scale.scale;
      inverse_scales[row] = scale.inverse_scale;
    }
    return are_finite;
  }

  // Codes of rows first_row .. first_row + 3: a vector's width of dims from `d` on, or the 8 that
  // remain.
  template <bool kIsRemainder>
  Quads PackedCodes(int first_row, int d) const {
    Floats x[kQuad];
    for (int i = 0; i < kQuad; ++i) {
      const Element* source = Row(first_row + i) + d;
      PrefetchRow(reinterpret_cast<const char*>(source) + group.next_offset);
      const Floats loaded = kIsRemainder ? Codec::LoadRemaining(source) : Codec::Load(source);
      x[i] = Mul(loaded, Broadcast(inverse_scales[first_row + i]));
    }
    return PackCodes(x[0], x[1], x[2], x[3]);
  }

  void Put(int8_t* target, Quads codes) const {
    if (group.is_streamed) {
      StreamQuads(target, codes);
    } else {
      StoreQuads(target, codes);
    }
  }
};

// Stores dims of all rows as K. target: the first dim's quads, [kGroupRows, 4].
template <bool kIsRemainder, typename Codec>
void StoreKeyDims(const ScaledRows<Codec>& rows, int d, int64_t quad_stride, int8_t* target) {
  constexpr int kNumQuads = kIsRemainder ? kHeadDimStep / kQuad : kVectorQuads;
  for (int row = 0; row < kGroupRows; row += kLanes, target += kLanes * kQuad) {
    Quads quads[kVectorQuads];
    for (int i = 0; i < kVectorQuads; ++i) {
      quads[i] = rows.template PackedCodes<kIsRemainder>(row + i * kQuad, d);
    }
    TurnRuns(quads);
    for (int i = 0; i < kNumQuads; ++i) rows.Put(target + i * quad_stride, quads[i]);
  }
}

template <typename Codec>
bool StoreKeyGroupOf(const RowGroup& group, const KvTile& tile, int64_t offset) {
  ScaledRows<Codec> rows = {group, {}, {}};
  if (!rows.FindScales()) return false;
  const int64_t quad_stride = int64_t{group.block_size} * kQuad;
  int8_t* target = tile.k_codes + offset * kQuad;
  int d = 0;
  for (; d + kLanes <= group.head_dim; d += kLanes, target += kVectorQuads * quad_stride) {
    StoreKeyDims<false>(rows, d, quad_stride, target);
  }
  if (d < group.head_dim) StoreKeyDims<true>(rows, d, quad_stride, target);
  std::memcpy(tile.k_scales + offset, rows.scales, sizeof(rows.scales));
  return true;
}

// Stores a column of all rows as V. target: [kGroupRows / 4, width, 4].
template <typename Codec>
void StoreValueColumn(const ScaledRows<Codec>& rows, int column, int width, int8_t* target) {
  for (int row = 0; row < kGroupRows; row += kQuad, target += width * kQuad) {
    int d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      const Quads codes = rows.template PackedCodes<false>(row, column + d);
      rows.Put(target + d * kQuad, TurnBytes(codes));
    }
    if (d < width) {
      StoreRemainingQuads(target, TurnBytes(rows.template PackedCodes<true>(row, column)));
    }
  }
}

template <typename Codec>
bool StoreValueGroupOf(const RowGroup& group, const KvTile& tile, int64_t offset) {
  ScaledRows<Codec> rows = {group, {}, {}};
  if (!rows.FindScales()) return false;
  int8_t* column_codes = tile.v_codes;
  for (int column = 0; column < group.head_dim; column += kValueColumn) {
    const int left = group.head_dim - column;
    const int width = left < kValueColumn ? left : kValueColumn;
    StoreValueColumn(rows, column, width, column_codes + offset * width);
    column_codes += width * group.block_size;
  }
  std::memcpy(tile.v_scales + offset, rows.scales, sizeof(rows.scales));
  return true;
}

bool StoreKeyGroup(const RowGroup& group, const KvTile& tile, int64_t offset) {
  switch (group.dtype) {
    case DataType::kFloat16:
      return StoreKeyGroupOf<Float16Codec>(group, tile, offset);
    case DataType::kBfloat16:
      return StoreKeyGroupOf<Bfloat16Codec>(group, tile, offset);
    default:
      return StoreKeyGroupOf<Float32Codec>(group, tile, offset);
  }
}

bool StoreValueGroup(const RowGroup& group, const KvTile& tile, int64_t offset) {
  switch (group.dtype) {
    case DataType::kFloat16:
      return StoreValueGroupOf<Float16Codec>(group, tile, offset);
    case DataType::kBfloat16:
      return StoreValueGroupOf<Bfloat16Codec>(group, tile, offset);
    default:
      return StoreValueGroupOf<Float32Codec>(group, tile, offset);
  }
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_GROUP_KERNELS_H_
