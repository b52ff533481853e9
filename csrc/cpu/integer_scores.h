// Scores with integer dot products: rows of q as integers, and their products with K's codes.
// Include after context_tile.h, in an instruction set whose vocabulary has DotSums.
//
// A row of q is multiplied by the power of two that makes its largest element a number of 15 bits
// and a sign. What is left behind the point, rounded to 8 bits (14 with AVX2), has products of its
// own, for the quads of dims where anything is left: of FP16 and BF16 numbers that is in small
// elements only. Products with codes are summed without error.

#ifndef OCTAVO_CPU_INTEGER_SCORES_H_
#define OCTAVO_CPU_INTEGER_SCORES_H_

#include "context_tile.h"

namespace octavo::cpu {
namespace {

inline constexpr int kScoreVectorsInIntegers = 2;

// A row of q as multipliers.
struct QueryRow {
  alignas(64) Multiplier quads[kMaxHeadDim / kQuad];
  alignas(64) FineMultiplier fine[kMaxHeadDim / kQuad];  // of the quads that have any
  alignas(64) int32_t fine_quads[kMaxHeadDim / kQuad];   // which these are
  int num_fine;
  int32_t sum_start;
  float factor;  // what a dot product with codes is to be multiplied by
};

inline float LargestMagnitude(const float* row, int num_elements) {
  Floats largest = Zero();
  for (int i = 0; i < num_elements; i += kLanes) largest = Max(largest, Abs(Load(row + i)));
  return ReduceMax(largest);
}

// Takes a row of q with its padding apart. One so small that a power of two over it is beyond FP32
// counts as zero, and so does one that is not finite: nobody sees its answer.
inline void SplitQuery(const float* row, int head_dim, float row_factor, QueryRow* query) {
  constexpr float kSmallest = 0x1p-100f;
  const int num_elements = RoundUp(head_dim, kQueryPadding);
  const float largest = LargestMagnitude(row, num_elements);
  const bool counts = largest >= kSmallest && largest <= kLargestFloat;
  // The power of two that takes the largest element to kKeyMultiplierBits bits.
  const int shift = counts ? kKeyMultiplierBits - 1 - __builtin_ilogbf(largest) : 0;
  const Floats scale = Broadcast(counts ? __builtin_ldexpf(1.0f, shift) : 0.0f);
  alignas(64) FineMultiplier fine[kMaxHeadDim / kQuad];
  for (int d = 0; d < num_elements; d += kLanes) {
    const Floats units = Round(Mul(Mul(Load(row + d), scale), Broadcast(kFineUnits)));
    const Floats whole = Floor(Mul(units, Broadcast(1.0f / kFineUnits)));
    StoreKeyMultipliers(query->quads + d / kQuad, whole);
    StoreFineMultipliers(fine + d / kQuad, Fma(whole, Broadcast(-kFineUnits), units));
  }
  const int num_quads = num_elements / kQuad;
  query->num_fine = CollectNonZero(fine, num_quads, query->fine, query->fine_quads);
  query->sum_start = KeySumStart(query->quads, num_quads);
  query->factor = __builtin_ldexpf(row_factor, -shift);
}

// Dot products of kNumRows rows of q with kNumVectors vectors of slots.
//
// k: [head_dim / 4, stride / 4, 4] codes. scores: [kNumRows, kTileTokens].
template <int kNumRows, int kNumVectors, bool kPrefetches>
[[gnu::noinline]] void ScorePassInIntegers(const int8_t* k, int stride, const QueryRow* queries,
                                           int num_quads, const int8_t* next, float* scores) {
  constexpr int kStepBytes = kUnrolledQuads * kNumVectors * kQuadVectorBytes;
  DotSums sums[kNumRows][kNumVectors];
#pragma GCC unroll 4
  for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) sums[row][i] = StartSums(queries[row].sum_start);
  }
  for (int first_quad = 0; first_quad < num_quads; first_quad += kUnrolledQuads) {
    if constexpr (kPrefetches) {
      PrefetchLines<kStepBytes / kLineBytes>(next);
      next += kStepBytes;
    }
#pragma GCC unroll 2
    for (int quad = first_quad; quad < first_quad + kUnrolledQuads; ++quad) {
      KeyCodes codes[kNumVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kNumVectors; ++i) {
        codes[i] = ToKeyCodes(LoadQuads(k + i * kQuadVectorBytes));
      }
      k += stride;
#pragma GCC unroll 4
      for (int row = 0; row < kNumRows; ++row) {
        const Multipliers x = BroadcastMultiplier(queries[row].quads[quad]);
#pragma GCC unroll 4
        for (int i = 0; i < kNumVectors; ++i) {
          sums[row][i] = AddKeyProducts(sums[row][i], codes[i], x);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) {
      Store(scores + row * kTileTokens + i * kLanes, ToFloats(sums[row][i]));
    }
  }
}

// Fills kNumRows rows of a segment's scores with q . k_codes, scales not yet applied.
template <int kNumRows, bool kPrefetches>
void ScoreSegment(const PagedInt8Cache& cache, const Segment& segment, const QueryRow* queries,
                  float* scores) {
  constexpr int kNumVectors = kScoreVectorsInIntegers;
  const int head_dim = cache.head_dim;
  const int stride = cache.block_size * kQuad;
  int slot = 0;
  for (; slot + kNumVectors * kLanes <= segment.num_slots; slot += kNumVectors * kLanes) {
    ScorePassInIntegers<kNumRows, kNumVectors, kPrefetches>(
        segment.k_codes + slot * kQuad, stride, queries, head_dim / kQuad,
        segment.next_k_codes + slot * head_dim, scores + slot);
  }
  if constexpr (kLanes == 16) {
    if (slot < segment.num_slots) {
      ScorePassInIntegers<kNumRows, 1, kPrefetches>(
          segment.k_codes + slot * kQuad, stride, queries, head_dim / kQuad,
          segment.next_k_codes + slot * head_dim, scores + slot);
    }
  }
}

// Adds what the fine multipliers of a row of q make of kNumVectors vectors of tokens.
template <int kNumVectors>
inline void AddFineProductsOf(const int8_t* const* k, int stride, const QueryRow& query,
                              float* scores) {
  FineSums sums[kNumVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kNumVectors; ++i) sums[i] = NoFineSums();
  for (int n = 0; n < query.num_fine; ++n) {
    const int offset = query.fine_quads[n] * stride;
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) {
      sums[i] = AddFineProducts(sums[i], LoadQuads(k[i] + offset), query.fine[n]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kNumVectors; ++i) {
    float* score = scores + i * kLanes;
    Store(score, Fma(FineToFloats(sums[i]), Broadcast(1.0f / kFineUnits), Load(score)));
  }
}

// Adds what the fine multipliers of num_rows rows make of the tile.
inline void AddFineScores(const PagedInt8Cache& cache, int num_rows, const QueryRow* queries,
                          Tile* tile) {
  const int stride = cache.block_size * kQuad;
  const int8_t* k[kTileTokens / kLanes];  // the tile's tokens, by vectors
  int num_vectors = 0;
  for (int s = 0; s < tile->num_segments; ++s) {
    const Segment& segment = tile->segments[s];
    for (int slot = 0; slot < segment.num_slots; slot += kLanes) {
      k[num_vectors++] = segment.k_codes + slot * kQuad;
    }
  }
  for (int row = 0; row < num_rows; ++row) {
    if (queries[row].num_fine == 0) continue;
    float* scores = tile->scores + row * kTileTokens;
    int i = 0;
    for (; i + 4 <= num_vectors; i += 4) {
      AddFineProductsOf<4>(k + i, stride, queries[row], scores + i * kLanes);
    }
    for (; i < num_vectors; ++i) {
      AddFineProductsOf<1>(k + i, stride, queries[row], scores + i * kLanes);
    }
  }
}

// Fills the tile's scores, segment by segment: all blocks of rows take a segment while the nearest
// cache holds it, and the first one prefetches.
template <int kFirst, int kSecond>
void ScoreTileInIntegers(const PagedInt8Cache& cache, const QueryRow* queries, Tile* tile) {
  for (int s = 0; s < tile->num_segments; ++s) {
    const Segment& segment = tile->segments[s];
    float* scores = tile->scores + segment.tile_offset;
    ScoreSegment<kFirst, true>(cache, segment, queries, scores);
    if constexpr (kSecond > 0) {
      ScoreSegment<kSecond, false>(cache, segment, queries + kFirst, scores + kFirst * kTileTokens);
    }
  }
  AddFineScores(cache, kFirst + kSecond, queries, tile);
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_INTEGER_SCORES_H_
