#include "races.h"

#include <algorithm>
#include <iterator>

#include "scheduler.h"

namespace octavo::emulator {
namespace {

// Clock, whether it is a copy in flight, thread: so that stamps compare as their clocks do.
using Stamp = uint32_t;
constexpr int kThreadBits = 10;
constexpr Stamp kFlyingBit = 1u << kThreadBits;
constexpr int kClockShift = kThreadBits + 1;
constexpr uint32_t kMaxClock = (1u << (32 - kClockShift)) - 1;

constexpr int ThreadOf(Stamp stamp) { return static_cast<int>(stamp & (kFlyingBit - 1)); }
constexpr int WarpOf(Stamp stamp) { return ThreadOf(stamp) / kLanes; }

// Of the reads, those that tell of all others: if the last one of another warp is ordered, so is
// all that came before it.
struct Cell {
  Stamp writer;
  Stamp last_reader;
  Stamp near_reader;  // the last other thread of last_reader's warp
  Stamp far_reader;   // the last thread of another warp
};

constexpr size_t kWordBytes = 4;
constexpr size_t kNumWords = kMaxSharedBytes / kWordBytes;

// The cells of whole words, and of single bytes where a block has accessed less than a word.
Cell g_words[kNumWords];
Cell g_bytes[kMaxSharedBytes];
Stamp g_split_at[kNumWords];

// Stamps of the first access that is in this block, and after its, or a warp's, last barrier.
Stamp g_now = 0;
Stamp g_block_start = 0;
Stamp g_block_since = 0;
Stamp g_warp_since[kMaxBlockThreads / kLanes];

void AdvanceClock() { g_now += 1u << kClockShift; }

void AdvanceClock(const Site& site) {
  AdvanceClock();
  if (g_now < g_block_start) FailThread(site, "more barriers in a block than the emulator counts");
}

void ForgetAll() {
  std::fill(std::begin(g_words), std::end(g_words), Cell{});
  std::fill(std::begin(g_split_at), std::end(g_split_at), Stamp{0});
  g_now = 0;
}

bool IsOfThisBlock(Stamp stamp) { return stamp >= g_block_start; }

bool IsOrdered(Stamp stamp, int thread_id) {
  if (stamp < g_block_since || ThreadOf(stamp) == thread_id) return true;
  const int warp_idx = WarpOf(stamp);
  return warp_idx == thread_id / kLanes && stamp < g_warp_since[warp_idx];
}

// An access as it is being checked.
struct Access {
  const Site& site;
  int thread_id;
  size_t offset;
  size_t num_bytes;
};

[[noreturn]] void FailRace(const Access& access, const char* does, Stamp other, const char* did) {
  FailThread(access.site,
             "race: %s %zu shared bytes at offset %zu which thread %d %s, with no barrier between",
             does, access.num_bytes, access.offset, ThreadOf(other), did);
}

void CheckInFlight(const Access& access, Stamp writer) {
  if ((writer & kFlyingBit) == 0 || !IsOfThisBlock(writer)) return;
  FailThread(
      access.site,
      "in flight: %zu shared bytes at offset %zu are the target of a copy that thread %d has "
      "not waited for",
      access.num_bytes, access.offset, ThreadOf(writer));
}

void NoteReader(Cell& cell, Stamp reader) {
  const Stamp last = cell.last_reader;
  cell.last_reader = reader;
  if (ThreadOf(last) == ThreadOf(reader)) return;
  if (WarpOf(last) == WarpOf(reader)) {
    cell.near_reader = last;
  } else {
    cell.far_reader = last;
    cell.near_reader = 0;
  }
}

void ReadCell(const Access& access, Cell& cell) {
  if (!IsOfThisBlock(cell.writer)) {
    FailThread(access.site, "unwritten: of %zu shared bytes at offset %zu, some never had a value",
               access.num_bytes, access.offset);
  }
  CheckInFlight(access, cell.writer);
  if (!IsOrdered(cell.writer, access.thread_id)) FailRace(access, "reads", cell.writer, "wrote");
  NoteReader(cell, g_now | static_cast<Stamp>(access.thread_id));
}

void WriteCell(const Access& access, Cell& cell, Stamp flying) {
  CheckInFlight(access, cell.writer);
  if (!IsOrdered(cell.writer, access.thread_id)) FailRace(access, "writes", cell.writer, "wrote");
  for (Stamp reader : {cell.last_reader, cell.near_reader, cell.far_reader}) {
    if (!IsOrdered(reader, access.thread_id)) FailRace(access, "writes", reader, "read");
  }
  cell.writer = g_now | flying | static_cast<Stamp>(access.thread_id);
}

void SplitWord(size_t word) {
  if (IsOfThisBlock(g_split_at[word])) return;
  std::fill_n(&g_bytes[word * kWordBytes], kWordBytes, g_words[word]);
  g_split_at[word] = g_now;
}

template <typename Visit>
void VisitBytes(size_t offset, size_t num_bytes, const Visit& visit) {
  for (size_t idx = offset; idx < offset + num_bytes; ++idx) visit(g_bytes[idx]);
}

template <typename Visit>
void VisitCells(size_t offset, size_t num_bytes, const Visit& visit) {
  if (num_bytes < kWordBytes) {
    SplitWord(offset / kWordBytes);
    return VisitBytes(offset, num_bytes, visit);
  }
  for (size_t word = offset / kWordBytes; word < (offset + num_bytes) / kWordBytes; ++word) {
    if (IsOfThisBlock(g_split_at[word])) {
      VisitBytes(word * kWordBytes, kWordBytes, visit);
    } else {
      visit(g_words[word]);
    }
  }
}

}  // namespace

void BeginRaces() {
  if (g_now > (kMaxClock / 2) << kClockShift) ForgetAll();
  AdvanceClock();
  g_block_start = g_block_since = g_now;
  std::fill(std::begin(g_warp_since), std::end(g_warp_since), g_now);
}

void OrderBlock(const Site& site) {
  AdvanceClock(site);
  g_block_since = g_now;
}

void OrderWarp(const Site& site, int warp_idx) {
  AdvanceClock(site);
  g_warp_since[warp_idx] = g_now;
}

void NoteRead(const Site& site, int thread_id, size_t offset, size_t num_bytes) {
  const Access access = {site, thread_id, offset, num_bytes};
  VisitCells(offset, num_bytes, [&](Cell& cell) { ReadCell(access, cell); });
}

void NoteWrite(const Site& site, int thread_id, size_t offset, size_t num_bytes, Landing landing) {
  const Access access = {site, thread_id, offset, num_bytes};
  const Stamp flying = landing == Landing::kFlying ? kFlyingBit : 0;
  VisitCells(offset, num_bytes, [&](Cell& cell) { WriteCell(access, cell, flying); });
}

void NoteLanding(int thread_id, size_t offset, size_t num_bytes) {
  const Stamp writer = g_now | static_cast<Stamp>(thread_id);
  VisitCells(offset, num_bytes, [&](Cell& cell) { cell.writer = writer; });
}

}  // namespace octavo::emulator
