// kernels/include/attention_instructions.cuh for the emulator: copies happen at once, waiting is giving way to other threads.
#ifndef ATTENTION_INSTRUCTIONS
#define ATTENTION_INSTRUCTIONS
#include "cuda_bf16.h"
#include "cuda_fp16.h"

typedef unsigned short Element;
#if KV_FP8
typedef unsigned char KvElement;
#else
typedef Element KvElement;
#endif
#define OPERANDS_BFLOAT16 (BFLOAT16 && !KV_FP8)

#define NEGATIVE_INFINITY (-INFINITY)

inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - emulator::dynamic_shared);
}

inline void give_way() { emulator::wait(emulator::State::READY); }

inline float element_to_float(unsigned bits) {
    const auto narrow = static_cast<uint16_t>(bits);
#if BFLOAT16
    return __bfloat162float(__nv_bfloat16{narrow});
#else
    __half half;
    std::memcpy(&half, &narrow, sizeof(half));
    return __half2float(half);
#endif
}

inline unsigned float_to_element(float value) {
#if BFLOAT16
    return __float2bfloat16_rn(value).bits;
#else
    const __half half = __float2half_rn(value);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof(bits));
    return bits;
#endif
}

inline unsigned pack(float low, float high) { return float_to_element(low) | float_to_element(high) << 16; }
inline float half_to_float(unsigned bits) {
    const auto narrow = static_cast<uint16_t>(bits);
    __half half;
    std::memcpy(&half, &narrow, sizeof(half));
    return __half2float(half);
}

inline unsigned float_to_half(float value) {
    const __half half = __float2half_rn(value);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof(bits));
    return bits;
}

inline unsigned pack_operands(float low, float high) {
    return KV_FP8 ? float_to_half(low) | float_to_half(high) << 16 : pack(low, high);
}
inline float operand_to_float(unsigned bits) { return KV_FP8 ? half_to_float(bits) : element_to_float(bits); }
inline float unpack(unsigned packed, int index) { return element_to_float(packed >> 16 * index); }
inline void store_16_bytes(unsigned destination, uint4 value) {
    std::memcpy(emulator::dynamic_shared + destination, &value, 16);
}

inline float exp2_fast(float x) { return exp2f(x); }

inline unsigned element_at(unsigned row_address, int column) {
    uint16_t bits;
    std::memcpy(&bits, emulator::dynamic_shared + row_address + 2 * column, sizeof(bits));
    return bits;
}

// ldmatrix: lane i gives the address of row i % 8 of matrix i / 8 and gets row lane / 4, columns 2 (lane % 4) and the next.
inline void load_matrices(unsigned (&r)[4], unsigned address) {
    emulator::offer(address);
    const int lane = emulator::current % 32;
    for (int matrix = 0; matrix < 4; ++matrix) {
        const auto row = emulator::offered_by<unsigned>(matrix * 8 + lane / 4);
        r[matrix] = element_at(row, lane % 4 * 2) | element_at(row, lane % 4 * 2 + 1) << 16;
    }
}

inline void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
    emulator::offer(address);
    const int lane = emulator::current % 32;
    for (int matrix = 0; matrix < 4; ++matrix) {
        const int row = matrix * 8 + lane % 4 * 2;
        r[matrix] = element_at(emulator::offered_by<unsigned>(row), lane / 4) |
                    element_at(emulator::offered_by<unsigned>(row + 1), lane / 4) << 16;
    }
}

inline void load_matrix_pair(unsigned& r0, unsigned& r1, unsigned address) {
    unsigned r[4];
    emulator::offer(address);
    const int lane = emulator::current % 32;
    for (int matrix = 0; matrix < 2; ++matrix) {
        const auto row = emulator::offered_by<unsigned>(matrix * 8 + lane / 4);
        r[matrix] = element_at(row, lane % 4 * 2) | element_at(row, lane % 4 * 2 + 1) << 16;
    }
    r0 = r[0], r1 = r[1];
}

struct MultiplyOperands {
    unsigned a[4], b[2];
};

inline void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulator::offer(MultiplyOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int lane = emulator::current % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const auto left = emulator::offered_by<MultiplyOperands>(row % 8 * 4 + k % 8 / 2);
            const auto right = emulator::offered_by<MultiplyOperands>(column * 4 + k % 8 / 2);
            d[i] += operand_to_float(left.a[row / 8 + k / 8 * 2] >> 16 * (k % 2)) * operand_to_float(right.b[k / 8] >> 16 * (k % 2));
        }
    }
}

inline void copy_bytes(unsigned destination, const void* source, bool valid, int num_bytes) {
    if (valid)
        std::memcpy(emulator::dynamic_shared + destination, source, num_bytes);
    else
        std::memset(emulator::dynamic_shared + destination, 0, num_bytes);
}
inline void copy_16_bytes(unsigned destination, const void* source, bool valid) { copy_bytes(destination, source, valid, 16); }
inline void copy_8_bytes(unsigned destination, const void* source, bool valid) { copy_bytes(destination, source, valid, 8); }
inline void commit_copies() {}
inline void wait_for_copies() {}
template <int>
inline void wait_for_copies_but() {}

struct Mbarrier {
    short expected, pending;
    unsigned phase;
};
inline Mbarrier& mbarrier_at(unsigned address) { return *reinterpret_cast<Mbarrier*>(emulator::dynamic_shared + address); }
inline void barrier_init(unsigned barrier, int count) {
    mbarrier_at(barrier) = {static_cast<short>(count), static_cast<short>(count), 0};
}
inline void barrier_arrive(unsigned barrier) {
    Mbarrier& state = mbarrier_at(barrier);
    if (--state.pending > 0) return;
    state.pending = state.expected;
    state.phase ^= 1;
}
inline void barrier_arrive_after_copies(unsigned barrier) { barrier_arrive(barrier); }
inline void barrier_wait(unsigned barrier, unsigned parity) {
    while (mbarrier_at(barrier).phase == parity) give_way();
}

inline void group_barrier(int id, int threads) {
    static int arrived[16];
    static unsigned generations[16];
    const unsigned generation = generations[id];
    if (++arrived[id] == threads) {
        arrived[id] = 0;
        ++generations[id];
    }
    while (generations[id] == generation) give_way();
}

inline void store_release(int* flag, int value) { *flag = value; }
inline int load_acquire(const int* flag) {
    if (!*flag) give_way();
    return *flag;
}
inline float __fdividef(float a, float b) { return a / b; }
template <typename T>
T __ldcg(const T* address) {
    return *address;
}
template <typename T>
void __stcg(T* address, T value) {
    *address = value;
}

#endif
