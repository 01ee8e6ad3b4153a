// Bulk copies, the barriers in shared memory that count their bytes, and the two proxies, as the PTX ISA has them
// ("Asynchronous operations", "mbarrier", "Proxies"). A copy is cut into pieces, and each lands at some time between
// its issue and its end: schedule 0 lands nothing before somebody must have it, 1 everything at once, others pieces of
// any copy in any order. Whatever lands when, these are errors:
//
//   a load    read or written over by a thread that has not seen its barrier's phase complete; issued onto memory that
//             another copy has in hand or that a thread has written without a proxy fence; of other bytes than its
//             barrier expects
//   a store   of what a thread has written without a proxy fence, or of what it has not seen loaded; written or loaded
//             over before its thread has waited for it; not waited for when its block ends
//
// So it is of accesses of 16 bytes, which are followed (uint4 in cuda_emulation.h). Smaller ones read NaN from where a
// load is on its way.
#pragma once

#include "machine.h"

namespace emulation {

constexpr size_t kChunk = 16;

struct Counted {  // a barrier in shared memory
  unsigned arrivals = 0, pending = 0;
  long bytes = 0;      // expected and not yet there
  long completed = 0;  // phases
  bool visible = false;  // to the asynchronous proxy
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  std::vector<std::pair<size_t, size_t>> pieces;  // offset and bytes, of what has not landed
  Counted* barrier;  // of a load
  long phase;
  bool committed = false;  // of a store
};

struct Chunk {  // 16 bytes of shared memory
  const Copy* load = nullptr;   // the last that was to fill it, unless written since
  const Copy* store = nullptr;  // that may still read it
  int writer = -1;              // a thread that has written it and has not fenced
};

struct Asynchronous {
  std::map<const void*, Counted> barriers;
  std::vector<std::unique_ptr<Copy>> copies;
  std::vector<Chunk> chunks;
};

inline Asynchronous& here() { return *running->block->asynchronous; }

inline void begin_asynchronous(Block& block) {
  block.asynchronous = std::make_shared<Asynchronous>();
  block.asynchronous->chunks.resize(launched->shared_bytes / kChunk + 1);
}

inline void end_asynchronous(Block& block) {
  for (const Thread& thread : block.threads)
    if (!thread.stores.empty()) misuse("a block ends while a bulk store may still read its shared memory");
  for (const auto& copy : block.asynchronous->copies)
    if (!copy->pieces.empty()) misuse("a block ends while a bulk copy is on its way");
  for (const auto& [at, barrier] : block.asynchronous->barriers)
    if (barrier.bytes || barrier.pending != barrier.arrivals) misuse("a block ends in the middle of a barrier's phase");
}

// ---- barriers -------------------------------------------------------------------------------------------------------

inline void complete_if_due(Asynchronous& on, Counted& barrier) {
  if (barrier.pending || barrier.bytes) return;
  for (const auto& copy : on.copies)
    if (copy->barrier == &barrier && copy->phase == barrier.completed && !copy->pieces.empty())
      misuse("a barrier completes its phase before its copies have landed");
  ++barrier.completed, barrier.pending = barrier.arrivals;
}

inline Counted& barrier_at(const uint64_t* b) {
  const auto found = here().barriers.find(b);
  if (found == here().barriers.end()) misuse("a barrier that was not initialised");
  return found->second;
}

inline void land(Asynchronous& on, Copy& copy, size_t piece) {
  const auto [offset, bytes] = copy.pieces[piece];
  copy.pieces.erase(copy.pieces.begin() + long(piece));
  std::memcpy(copy.to + offset, copy.from + offset, bytes);
  if (copy.barrier) copy.barrier->bytes -= long(bytes), complete_if_due(on, *copy.barrier);
}

inline bool land_something(Block& block) {
  std::vector<Copy*> pending;
  for (const auto& copy : block.asynchronous->copies)
    if (!copy->pieces.empty()) pending.push_back(copy.get());
  if (pending.empty()) return false;
  Copy& copy = *pending[launched->draw(unsigned(pending.size()))];
  land(*block.asynchronous, copy, launched->draw(unsigned(copy.pieces.size())));
  return true;
}

// ---- shared memory, as threads see it -------------------------------------------------------------------------------

inline Chunk* chunk_of(const void* p) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - running->block->shared;
  return offset < 0 || size_t(offset) >= launched->shared_bytes ? nullptr : &here().chunks[size_t(offset) / kChunk];
}

inline void check_filled(const Chunk& chunk, const char* what) {
  if (!chunk.load) return;
  const auto seen = running->observed.find(chunk.load->barrier);
  if (seen == running->observed.end() || seen->second <= chunk.load->phase)
    misuse(std::string(what) + " what a bulk load fills, without having seen its barrier complete");
}

inline void note_read(const void* p) {
  if (!running) return;
  if (const Chunk* chunk = chunk_of(p)) check_filled(*chunk, "a thread reads");
}

inline void note_write(const void* p) {
  if (!running) return;
  Chunk* chunk = chunk_of(p);
  if (!chunk) return;
  check_filled(*chunk, "a thread writes over");
  if (chunk->store) misuse("a thread writes over what a bulk store may still read");
  chunk->load = nullptr, chunk->writer = int(running->index);
  running->unfenced.push_back(size_t(chunk - here().chunks.data()));
}

inline void fence_proxy() {
  for (size_t chunk : running->unfenced)
    if (here().chunks[chunk].writer == int(running->index)) here().chunks[chunk].writer = -1;
  running->unfenced.clear();
}

// ---- copies ---------------------------------------------------------------------------------------------------------

inline Copy& issue(void* to, const void* from, const void* shared, size_t bytes, Counted* barrier) {
  if (uintptr_t(to) % kChunk || uintptr_t(from) % kChunk || bytes % kChunk || !bytes)
    misuse("a bulk copy that is not of whole 16 bytes");
  if (!chunk_of(shared) || !chunk_of(static_cast<const unsigned char*>(shared) + bytes - 1))
    misuse("a bulk copy outside of the block's shared memory");
  here().copies.push_back(std::make_unique<Copy>());
  Copy& copy = *here().copies.back();
  copy.to = static_cast<unsigned char*>(to), copy.from = static_cast<const unsigned char*>(from);
  copy.barrier = barrier, copy.phase = barrier ? barrier->completed : 0;
  for (size_t at = 0; at < bytes;) {
    const size_t piece = std::min(bytes - at, (1 + launched->draw(unsigned(bytes / kChunk / 2 + 1))) * kChunk);
    copy.pieces.push_back({at, piece});
    at += piece;
  }
  return copy;
}

inline void load(void* to, const void* from, size_t bytes, const uint64_t* b) {
  Counted& barrier = barrier_at(b);
  if (!barrier.visible) misuse("a bulk load on a barrier whose initialisation was not fenced");
  Copy& copy = issue(to, from, to, bytes, &barrier);
  for (size_t at = 0; at < bytes; at += kChunk) {
    Chunk& chunk = *chunk_of(copy.to + at);
    if (chunk.store) misuse("a bulk load into what a bulk store may still read");
    if (chunk.writer >= 0) misuse("a bulk load onto what a thread has written without fence.proxy.async");
    if (chunk.load && !chunk.load->pieces.empty()) misuse("a bulk load into what another one fills");
    chunk.load = &copy;
  }
  std::memset(to, kPoison, bytes);  // it may be written from now on
  while (launched->schedule == 1 && !copy.pieces.empty()) land(here(), copy, 0);
}

inline void store(void* to, const void* from, size_t bytes) {
  Copy& copy = issue(to, from, from, bytes, nullptr);
  for (size_t at = 0; at < bytes; at += kChunk) {
    Chunk& chunk = *chunk_of(copy.from + at);
    if (chunk.writer >= 0) misuse("a bulk store of what a thread has written without fence.proxy.async");
    check_filled(chunk, "a bulk store reads");
    chunk.store = &copy;
  }
  running->stores.push_back(&copy);
  while (launched->schedule == 1 && !copy.pieces.empty()) land(here(), copy, 0);
}

inline void wait_for_stores() {  // those that were committed
  auto& stores = running->stores;
  for (Copy* copy : stores)
    while (copy->committed && !copy->pieces.empty()) land(here(), *copy, launched->draw(unsigned(copy->pieces.size())));
  for (Chunk& chunk : here().chunks)
    if (chunk.store && chunk.store->committed) chunk.store = nullptr;
  stores.erase(std::remove_if(stores.begin(), stores.end(), [](Copy* copy) { return copy->committed; }), stores.end());
}

}  // namespace emulation
