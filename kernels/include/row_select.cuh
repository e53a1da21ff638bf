// SPDX-License-Identifier: Apache-2.0
// A block, or a cluster of them, looks at one row of logits that may lie in several parts (one from each rank) and finds
// the key of the k-th best token, or of the token at which the best ones' mass reaches a target. Exact for every row.
//
// Pass 1 counts tokens and mass in 2048 bins of 1/64 nat below the maximum. Pass 2 collects the bin that holds the
// answer and sorts it. A bin with more tokens than fit (flat rows) is narrowed first, ten bits of the key at a time.
// Mass is an integer in units of 2^-31 of the best token's: sums do not depend on their order, so neither
// the batch nor the number of parts can move a threshold.
#pragma once
#include "cluster.cuh"
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
    __device__ __forceinline__ void add(uint32 mass) {
        atomicAdd(&count, 1u);
        if (mass == 0) return;
        const uint32 before = atomicAdd(&mass_low, mass);
        if (before + mass < before) atomicAdd(&mass_high, 1u);
    }
};

template <int N>
__device__ __forceinline__ float largest_of(const Vector<N>& packed) {
    float largest = to_float(packed.lane[0]);
#pragma unroll
    for (int i = 1; i < N; ++i) largest = fmaxf(largest, to_float(packed.lane[i]));
    return largest;
}

// logits [num_parts, num_rows, V_local]; token = part * V_local + column, of which the first vocab_size exist.
struct Row {
    const scalar* logits;
    int64 part_stride;
    int num_parts;
    int part_size;
    int vocab_size;

    // Calls visit(vector, first token, how many of its tokens exist), all lanes of a warp together.
    template <typename Visit>
    __device__ __forceinline__ void for_each_vector(Visit visit) const {
        constexpr int STRIDE = CLUSTER * NUM_THREADS * VEC;
        for (int part = 0; part < num_parts; ++part) {
            const scalar* const columns = logits + part * part_stride;
            const int first = part * part_size;
            const int end = min(part_size, vocab_size - first);
            int at = (cluster_rank() * NUM_THREADS + threadIdx.x) * VEC;
            Vector<VEC> packed, next;
            if (at < end) packed = *reinterpret_cast<const Vector<VEC>*>(columns + at);
            for (int from = cluster_rank() * NUM_THREADS * VEC; from < end; from += STRIDE, at += STRIDE) {
                if (at + STRIDE < end) next = *reinterpret_cast<const Vector<VEC>*>(columns + at + STRIDE);
                visit(packed, first + at, min(end - at, VEC));
                packed = next;
            }
        }
    }

    // Calls visit(logit, token) for the tokens at or above `lowest` and some below: vectors that lie below it are passed
    // over.
    template <typename Visit>
    __device__ __forceinline__ void for_each(float lowest, Visit visit) const {
        for_each_vector([&](const Vector<VEC>& packed, int token, int count) {
            if (largest_of(packed) < lowest) return;
#pragma unroll
            for (int i = 0; i < VEC; ++i)
                if (i < count) visit(to_float(packed.lane[i]), token + i);
        });
    }

    __device__ uint64 best() const {
        Winner winner;
        for_each_vector([&](const Vector<VEC>& packed, int token, int count) {
#pragma unroll
            for (int i = 0; i < VEC; ++i)
                if (i < count) winner.offer(to_float(packed.lane[i]), token + i);
        });
        return cluster_reduce<NUM_THREADS>(winner.key, Max());
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

    // Collective over the cluster, like every member. `maximum` is the row's largest logit; `weighs`: masses are wanted.
    __device__ RowSelect(const Row& row, float maximum, float temperature, bool weighs, Storage& storage)
        : row_(row), maximum_(maximum), temperature_(temperature), factor_(1.0f / temperature), weighs_(weighs),
          at_(storage) {
        for (int bin = threadIdx.x; bin < NUM_BINS; bin += NUM_THREADS) at_.bins[bin].clear();
        __syncthreads();
        row_.for_each(-LARGEST_SCORE, [&](float logit, int) { at_.bins[bin_of(logit)].add(mass_of(logit)); });
        add_up_over_cluster<NUM_BINS>(at_.bins);
    }

    // A count or mass that the row does not reach keeps all of it.
    __device__ Threshold best_tokens(uint64 count) { return select(count, false); }
    __device__ Threshold best_mass(uint64 mass) { return select(mass, true); }

    // The keys at or above a threshold that at most MAX_CANDIDATES tokens reach, best first.
    __device__ void collect(uint64 threshold) { gather(-1, 0, 64, threshold, score_of(threshold)); }

    // How far a logit lies below the maximum, in nats at the row's temperature.
    __device__ __forceinline__ float below(float logit) const { return (maximum_ - logit) * factor_; }

  private:
    __device__ __forceinline__ uint32 mass_of(float logit) const {
        const float nats = below(logit);
        const bool counts = weighs_ && nats < NUM_BINS / BINS_PER_NAT;
        return counts ? __float2uint_rn(exp2f(nats * -1.4426950408889634f) * 0x1p31f) : 0;
    }

    __device__ __forceinline__ int bin_of(float logit) const {
        const float nats = below(logit);
        return nats < NUM_BINS / BINS_PER_NAT ? static_cast<int>(nats * BINS_PER_NAT) : NUM_BINS - 1;
    }

    // Below the lowest logit that the bin can hold, with room for rounding.
    __device__ __forceinline__ float lowest_of(int bin) const {
        if (bin == NUM_BINS - 1) return -LARGEST_SCORE;
        const float depth = static_cast<float>(bin + 1) / BINS_PER_NAT * temperature_;
        return maximum_ - 1.0001f * depth - 1e-5f * fabsf(maximum_);
    }

    __device__ __noinline__ Threshold select(uint64 target, bool by_mass) {
        if (!find(at_.bins, NUM_BINS, target, by_mass, 0, 0)) return {0, at_.before_mass};
        const int bin = at_.found;
        uint64 prefix = 0;
        int shift = 64;
        uint32 count = at_.bins[bin].count;
        while (count > MAX_CANDIDATES) {
            const int above = shift;
            shift = max(above - DIGIT_BITS, 0);
            count_digits(bin, prefix, above, shift);
            find(at_.digits, NUM_DIGITS, target, by_mass, at_.before_weight, at_.before_mass);
            prefix = prefix << (above - shift) | static_cast<uint64>(NUM_DIGITS - 1 - at_.found);
            count = at_.digits[at_.found].count;
            __syncthreads();
        }
        gather(bin, prefix, shift, 0, lowest_of(bin));
        return find_candidate(target, by_mass);
    }

    __device__ static __forceinline__ bool starts_with(uint64 key, uint64 prefix, int shift) {
        return shift == 64 || key >> shift == prefix;
    }

    // Digits run downwards, best first, as bins do. The last digit overlaps the one before it by six bits, which all
    // members share.
    __device__ __noinline__ void count_digits(int bin, uint64 prefix, int above, int shift) {
        for (int digit = threadIdx.x; digit < NUM_DIGITS; digit += NUM_THREADS) at_.digits[digit].clear();
        __syncthreads();
        row_.for_each(lowest_of(bin), [&](float logit, int token) {
            const uint64 key = packed_key(logit, token);
            if (bin_of(logit) != bin || !starts_with(key, prefix, above)) return;
            at_.digits[NUM_DIGITS - 1 - static_cast<int>(key >> shift & (NUM_DIGITS - 1))].add(mass_of(logit));
        });
        add_up_over_cluster<NUM_DIGITS>(at_.digits);
    }

    // Each block's own counts become those of all blocks, in every block.
    template <int NUM_ENTRIES>
    __device__ static void add_up_over_cluster(Totals* entries) {
        cluster_sync();
        if constexpr (CLUSTER > 1) {
            constexpr int SHARE = (NUM_ENTRIES + NUM_THREADS - 1) / NUM_THREADS;
            Totals sums[SHARE];
#pragma unroll
            for (int i = 0; i < SHARE; ++i) {
                uint64 mass = 0;
                uint32 count = 0;
                for (int rank = 0; rank < CLUSTER; ++rank) {
                    const Totals other = *in_block(entries + i * NUM_THREADS + threadIdx.x, rank);
                    mass += other.mass();
                    count += other.count;
                }
                sums[i] = {count, static_cast<uint32>(mass), static_cast<uint32>(mass >> 32)};
            }
            cluster_sync();
#pragma unroll
            for (int i = 0; i < SHARE; ++i) entries[i * NUM_THREADS + threadIdx.x] = sums[i];
            __syncthreads();
        }
    }

    // Finds the entry where the running weight, starting from `weight`, reaches `target`, and remembers what lies
    // before it. False when all of it does not reach that far.
    __device__ __noinline__ bool find(const Totals* entries, int num_entries, uint64 target, bool by_mass, uint64 weight,
                                      uint64 mass) {
        __syncthreads();
        if (threadIdx.x == 0) at_.found = -1;
        const int share = num_entries / NUM_THREADS;
        const int first = threadIdx.x * share;
        uint64 own_weight = 0, own_mass = 0;
        for (int i = first; i < first + share; ++i) {
            own_mass += entries[i].mass();
            own_weight += by_mass ? entries[i].mass() : entries[i].count;
        }
        uint64 weight_before = weight + block_exclusive_sum<NUM_THREADS>(own_weight);
        uint64 mass_before = mass + block_exclusive_sum<NUM_THREADS>(own_mass);
        for (int i = first; i < first + share; ++i) {
            const uint64 more = by_mass ? entries[i].mass() : entries[i].count;
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

    // Tokens of `bin` (of any, if negative) whose key starts with `prefix` and is at least `threshold`: into the first
    // block, sorted there, and from there into every block.
    __device__ __noinline__ void gather(int bin, uint64 prefix, int shift, uint64 threshold, float lowest) {
        __syncthreads();
        if (threadIdx.x == 0) at_.num_candidates = 0;
        cluster_sync();
        Storage* const leader = in_block(&at_, 0);
        row_.for_each(lowest, [&](float logit, int token) {
            if (logit < lowest || (bin >= 0 && bin_of(logit) != bin)) return;
            append(leader, packed_key(logit, token), prefix, shift, threshold);
        });
        cluster_sync();
        if (cluster_rank() == 0) sort();
        cluster_sync();
        if (cluster_rank() != 0) {
            const int count = leader->num_candidates;
            for (int i = threadIdx.x; i < count; i += NUM_THREADS) at_.candidates[i] = leader->candidates[i];
            if (threadIdx.x == 0) at_.num_candidates = count;
        }
        cluster_sync();
    }

    __device__ static __noinline__ void append(Storage* to, uint64 key, uint64 prefix, int shift, uint64 threshold) {
        if (key < threshold || !starts_with(key, prefix, shift)) return;
        to->candidates[atomicAdd(&to->num_candidates, 1)] = key;
    }

    // Bitonic, descending; padded with keys below all real ones.
    __device__ __noinline__ void sort() {
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

    __device__ __noinline__ Threshold find_candidate(uint64 target, bool by_mass) {
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
        uint64 weight_before = by_mass ? mass_before : weight + block_exclusive_sum<NUM_THREADS>(own_count);
        for (int i = 0; i < SHARE; ++i) {
            const uint64 more = by_mass ? masses[i] : first + i < at_.num_candidates;
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
    const float maximum_, temperature_, factor_;
    const bool weighs_;
    Storage& at_;
};
