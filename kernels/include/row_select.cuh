// SPDX-License-Identifier: Apache-2.0
// One block looks at one row of logits that may lie in several parts (one from each rank) and finds the key of the
// k-th best token, or of the token at which the best ones' mass reaches a target. Exact for every row.
//
// Pass 1 counts tokens and mass in 2048 bins of 1/64 nat below the maximum. Pass 2 collects the bin that holds the
// answer and sorts it. A bin with more tokens than fit (flat rows) is narrowed first, ten bits of the key at a time.
// Mass is a 64-bit integer in units of 2^-40 of the best token's: sums do not depend on their order, so neither
// the batch nor the number of parts can move a threshold.
#pragma once
#include "reduce.cuh"
#include "sampling.cuh"

constexpr int NUM_BINS = 2048;
constexpr float BINS_PER_NAT = 64.0f;
constexpr int MAX_CANDIDATES = 2048;
constexpr int DIGIT_BITS = 10;
constexpr int NUM_DIGITS = 1 << DIGIT_BITS;

// Tokens and mass of a set. A 64-bit sum in shared memory is two 32-bit ones: those have native atomics.
struct Totals {
    uint32 count;
    uint32 mass_low;
    uint32 mass_high;

    __device__ __forceinline__ uint64 mass() const { return static_cast<uint64>(mass_high) << 32 | mass_low; }
    __device__ __forceinline__ void clear() { count = mass_low = mass_high = 0; }
    __device__ __forceinline__ void add(uint64 mass) {
        atomicAdd(&count, 1u);
        const uint32 low = static_cast<uint32>(mass);
        if (mass == 0) return;
        const uint32 before = atomicAdd(&mass_low, low);
        const uint32 high = static_cast<uint32>(mass >> 32) + (before + low < before);
        if (high != 0) atomicAdd(&mass_high, high);
    }
};

// logits [num_parts, num_rows, V_local]; token = part * V_local + column, of which the first vocab_size exist.
struct Row {
    const scalar* logits;
    int64 part_stride;
    int num_parts;
    int part_size;
    int vocab_size;
    float temperature;

    // Calls visit(scaled logit, token) for every token; each thread in increasing order of its tokens.
    template <typename Visit>
    __device__ __forceinline__ void for_each(Visit visit) const {
        for (int part = 0; part < num_parts; ++part) {
            const scalar* const columns = logits + part * part_stride;
            const int first = part * part_size;
            const int end = min(part_size, vocab_size - first);
            for (int at = threadIdx.x * VEC; at < end; at += NUM_THREADS * VEC) {
                float value[VEC];
                load(columns + at, value);
#pragma unroll
                for (int i = 0; i < VEC; ++i)
                    if (at + i < end) visit(scaled(value[i], temperature), first + at + i);
            }
        }
    }

    __device__ uint64 best() const {
        uint64 key = 0;
        for_each([&](float score, int token) { key = Max()(key, packed_key(score, token)); });
        return block_reduce<NUM_THREADS>(key, Max());
    }
};

struct Threshold {
    uint64 key;   // keep tokens whose key is at least this
    uint64 mass;  // what they weigh together
};

class RowSelect {
  public:
    struct Storage {
        Totals bins[NUM_BINS];
        union {
            uint64 candidates[MAX_CANDIDATES];
            Totals digits[NUM_DIGITS];
        };
        uint64 before_weight, before_mass;
        int found;
        int num_candidates;
    };

    // Collective over the block, like every member. `maximum` is the row's largest scaled logit.
    __device__ RowSelect(const Row& row, float maximum, Storage& storage)
        : row_(row), maximum_(maximum), at_(storage) {
        for (int bin = threadIdx.x; bin < NUM_BINS; bin += NUM_THREADS) at_.bins[bin].clear();
        __syncthreads();
        row_.for_each([&](float score, int) { at_.bins[bin_of(score)].add(mass_of(score)); });
        __syncthreads();
    }

    // A count or mass that the row does not reach keeps all of it.
    __device__ Threshold best_tokens(uint64 count) { return select<false>(count); }
    __device__ Threshold best_mass(uint64 mass) { return select<true>(mass); }

    // The keys at or above a threshold that at most MAX_CANDIDATES tokens reach, best first.
    __device__ int collect(uint64 threshold) {
        gather([&](float, uint64 key) { return key >= threshold; });
        sort();
        return at_.num_candidates;
    }

    __device__ __forceinline__ uint64 mass_of(float score) const {
        const float below = maximum_ - score;
        return below < NUM_BINS / BINS_PER_NAT ? static_cast<uint64>(expf(-below) * 0x1p40f) : 0;
    }

  private:
    __device__ __forceinline__ int bin_of(float score) const {
        const float below = maximum_ - score;
        return below < NUM_BINS / BINS_PER_NAT ? static_cast<int>(below * BINS_PER_NAT) : NUM_BINS - 1;
    }

    template <bool BY_MASS>
    __device__ Threshold select(uint64 target) {
        if (!find<BY_MASS>(at_.bins, NUM_BINS, target, 0, 0)) return {0, at_.before_mass};
        const int bin = at_.found;
        uint64 prefix = 0;
        int shift = 64;
        uint32 count = at_.bins[bin].count;
        while (count > MAX_CANDIDATES) {
            const int above = shift;
            shift = max(above - DIGIT_BITS, 0);
            count_digits(bin, prefix, above, shift);
            find<BY_MASS>(at_.digits, NUM_DIGITS, target, at_.before_weight, at_.before_mass);
            prefix = prefix << (above - shift) | static_cast<uint64>(NUM_DIGITS - 1 - at_.found);
            count = at_.digits[at_.found].count;
            __syncthreads();
        }
        gather([&](float score, uint64 key) { return bin_of(score) == bin && starts_with(key, prefix, shift); });
        sort();
        return find_candidate<BY_MASS>(target);
    }

    __device__ static __forceinline__ bool starts_with(uint64 key, uint64 prefix, int shift) {
        return shift == 64 || key >> shift == prefix;
    }

    // Digits run downwards, best first, as bins do. The last digit overlaps the one before it by six bits, which all
    // members share.
    __device__ void count_digits(int bin, uint64 prefix, int above, int shift) {
        for (int digit = threadIdx.x; digit < NUM_DIGITS; digit += NUM_THREADS) at_.digits[digit].clear();
        __syncthreads();
        row_.for_each([&](float score, int token) {
            const uint64 key = packed_key(score, token);
            if (bin_of(score) != bin || !starts_with(key, prefix, above)) return;
            at_.digits[NUM_DIGITS - 1 - static_cast<int>(key >> shift & (NUM_DIGITS - 1))].add(mass_of(score));
        });
        __syncthreads();
    }

    // Finds the entry where the running weight, starting from `weight`, reaches `target`, and remembers what lies
    // before it. False when all of it does not reach that far.
    template <bool BY_MASS>
    __device__ bool find(const Totals* entries, int num_entries, uint64 target, uint64 weight, uint64 mass) {
        __syncthreads();
        if (threadIdx.x == 0) at_.found = -1;
        const int share = num_entries / NUM_THREADS;
        const int first = threadIdx.x * share;
        uint64 own_weight = 0, own_mass = 0;
        for (int i = first; i < first + share; ++i) {
            own_mass += entries[i].mass();
            own_weight += BY_MASS ? entries[i].mass() : entries[i].count;
        }
        uint64 weight_before = weight + block_exclusive_sum<NUM_THREADS>(own_weight);
        uint64 mass_before = mass + block_exclusive_sum<NUM_THREADS>(own_mass);
        for (int i = first; i < first + share; ++i) {
            const uint64 more = BY_MASS ? entries[i].mass() : entries[i].count;
            if (weight_before < target && weight_before + more >= target) remember(i, weight_before, mass_before);
            weight_before += more;
            mass_before += entries[i].mass();
        }
        __syncthreads();
        if (at_.found < 0 && threadIdx.x == NUM_THREADS - 1) at_.before_mass = mass_before;
        __syncthreads();
        return at_.found >= 0;
    }

    __device__ __forceinline__ void remember(int found, uint64 weight, uint64 mass) {
        at_.found = found;
        at_.before_weight = weight;
        at_.before_mass = mass;
    }

    template <typename Wanted>
    __device__ void gather(Wanted wanted) {
        __syncthreads();
        if (threadIdx.x == 0) at_.num_candidates = 0;
        __syncthreads();
        row_.for_each([&](float score, int token) {
            const uint64 key = packed_key(score, token);
            if (wanted(score, key)) at_.candidates[atomicAdd(&at_.num_candidates, 1)] = key;
        });
        __syncthreads();
    }

    // Bitonic, descending; padded with keys below all real ones.
    __device__ void sort() {
        int size = 2;
        while (size < at_.num_candidates) size *= 2;
        for (int i = at_.num_candidates + threadIdx.x; i < size; i += NUM_THREADS) at_.candidates[i] = 0;
        __syncthreads();
        for (int run = 2; run <= size; run *= 2) {
            for (int step = run / 2; step > 0; step /= 2) {
                for (int i = threadIdx.x; i < size / 2; i += NUM_THREADS) {
                    const int a = i / step * 2 * step + i % step;
                    const uint64 x = at_.candidates[a], y = at_.candidates[a + step];
                    if ((x < y) == ((a & run) == 0)) {
                        at_.candidates[a] = y;
                        at_.candidates[a + step] = x;
                    }
                }
                __syncthreads();
            }
        }
    }

    template <bool BY_MASS>
    __device__ Threshold find_candidate(uint64 target) {
        constexpr int SHARE = MAX_CANDIDATES / NUM_THREADS;
        const int first = threadIdx.x * SHARE;
        uint64 masses[SHARE];
        uint64 own_mass = 0, own_count = 0;
        for (int i = 0; i < SHARE; ++i) {
            const bool exists = first + i < at_.num_candidates;
            masses[i] = exists ? mass_of(score_of(at_.candidates[first + i])) : 0;
            own_mass += masses[i];
            own_count += exists;
        }
        const uint64 weight = at_.before_weight, mass = at_.before_mass;
        uint64 mass_before = mass + block_exclusive_sum<NUM_THREADS>(own_mass);
        uint64 weight_before = BY_MASS ? mass_before : weight + block_exclusive_sum<NUM_THREADS>(own_count);
        for (int i = 0; i < SHARE; ++i) {
            const uint64 more = BY_MASS ? masses[i] : first + i < at_.num_candidates;
            if (weight_before < target && weight_before + more >= target) remember(first + i, 0, mass_before + masses[i]);
            weight_before += more;
            mass_before += masses[i];
        }
        __syncthreads();
        const Threshold threshold = {at_.candidates[at_.found], at_.before_mass};
        __syncthreads();
        return threshold;
    }

    const Row& row_;
    const float maximum_;
    Storage& at_;
};
