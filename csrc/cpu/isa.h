// The kernels of one instruction set, as a table of functions, and the choice among them.
//
// The kernels (row_kernels.h, float_attention.h, integer_scores.h, integer_attention.h) are written
// once, against a small vocabulary of vector operations (simd_*.h), and compiled once per
// instruction set (isa_*.cpp).

#ifndef OCTAVO_CPU_ISA_H_
#define OCTAVO_CPU_ISA_H_

#include <cstdint>

#include "octavo/paged_cache.h"

namespace octavo::cpu {

// Rows of one kv head (query token, query head of the group) that share each read of K and V.
inline constexpr int kMaxTileRows = 8;

// Rows of q are padded with zeros to a multiple of this: whole vectors of what they are taken apart
// to.
inline constexpr int kQueryPadding = 64;

// Neighbouring kv heads that a span walks together, so that memory is read in longer runs.
inline constexpr int kMaxSpanHeads = 8;

// Tokens whose scores are taken before the softmax state moves.
inline constexpr int kTileTokens = 64;

// A run of context that a thread reads, of some neighbouring kv heads.
struct ContextRun {
  const PagedInt8Layer* layer;
  const int32_t* block_table;  // block ids of the context, from position 0
  int32_t kv_head;             // the first one
  int32_t num_kv_heads;
  int32_t begin;  // first position
  int32_t end;    // one past the last
};

// Some rows of each of a run's kv heads.
struct SpanParams {
  const PagedInt8Cache* cache;
  const LayerOptions* options;
  ContextRun run;
  ContextRun next;                  // what the thread probably reads after it; may be empty
  int32_t kv_len;                   // valid tokens; nothing at or past it is used
  int32_t num_rows;                 // of each kv head: 1 .. kMaxTileRows
  const float* q;                   // [num_kv_heads, num_rows, kMaxHeadDim]
  const float* q_factors;           // [num_kv_heads, num_rows] what q is to be multiplied by
  int32_t row_begin[kMaxTileRows];  // [num_rows] row r attends to [row_begin[r], row_end[r])
  int32_t row_end[kMaxTileRows];
};

// The online softmax of one row: the largest score so far, and the sum of exp(score - max).
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.)
struct SoftmaxState {
  float max;
  float sum;

  // Takes in another state; returns the factors for this and the other's weighted values.
  void Merge(const SoftmaxState& other, float* own_factor, float* other_factor);
  // The factor that turns weighted values into the output, with `sink` (may be null) in the
  // denominator.
  float Normalize(const float* sink) const;
  // The natural log of the sum of exp(score), without a sink.
  float Lse() const;
};

// Tokens whose rows are stored together where they go to as many neighbouring slots, the first of
// which is a multiple of it: they lie in one block.
inline constexpr int kGroupRows = 16;

// The rows of one kv head of such tokens.
struct RowGroup {
  DataType dtype;
  int32_t head_dim;
  int32_t block_size;
  const char* rows;     // [head_dim] dtype, the first row
  int64_t row_stride;   // bytes from row to row
  int64_t next_offset;  // bytes from a row to one that is read soon after it
  bool is_streamed;     // codes go past the caches, to a tile aligned to lines
};

// What attention over a span leaves behind for one kv head.
struct SpanState {
  SoftmaxState softmax[kMaxTileRows];
  alignas(64) float values[kMaxTileRows * kMaxHeadDim];  // [num_rows, kMaxHeadDim] weighted sums
};

// The kernels of one instruction set.
struct IsaKernels {
  const char* name;

  // Converts num_elements (a multiple of 8) of dtype to FP32. Returns the largest absolute value,
  // as bits: 0x7f800000 and more say that not all are finite.
  uint32_t (*load_row)(DataType dtype, const void* source, int num_elements, float* row);

  // Converts row * factor to dtype, to nearest even; FP16 saturates.
  void (*store_row)(DataType dtype, const float* row, float factor, int num_elements, void* target);

  // Quantises a row to codes [kMaxHeadDim] and a scale, float16 bits, of which an infinite one
  // makes the codes void. Returns what load_row does.
  uint32_t (*quantize_row)(DataType dtype, const void* source, int num_elements, int8_t* codes,
                           uint16_t* scale);

  // Quantises a group and stores codes and scales in the slots of a tile from `offset` on. Returns
  // false, with nothing stored, where a row cannot be.
  bool (*store_k_group)(const RowGroup& group, const KvTile& tile, int64_t offset);
  bool (*store_v_group)(const RowGroup& group, const KvTile& tile, int64_t offset);

  // Makes streamed groups visible to the threads that this one tells of them.
  void (*finish_streams)();

  // Attends over a span from fresh states, [num_kv_heads], within the error that FP32 outputs may
  // have.
  void (*attend_span)(const SpanParams& params, SpanState* states);

  // The same within the error that FP16 and BF16 outputs may have.
  void (*attend_span_for_halves)(const SpanParams& params, SpanState* states);
};

// Each returns null on a machine that lacks the instruction set.
const IsaKernels* Avx512Kernels();
const IsaKernels* Avx2Kernels();
const IsaKernels* PortableKernels();

// Returns the kernels called `name`, or the fastest of this machine for an empty one; null when
// there are none.
const IsaKernels* FindKernels(const char* name);

}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_ISA_H_
