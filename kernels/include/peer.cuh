// SPDX-License-Identifier: Apache-2.0
// Words that arrive from another GPU without a flag: memory holds ABSENT until the word itself is there, so a
// reader needs no order between two words, no fence, and no store of 16 bytes to arrive in one piece. The idea is the LL
// protocol of NCCL and the one-shot all-reduce of TensorRT-LLM. ABSENT is a NaN (or two) in every type that is sent.
//
// Included by name, so that the emulator's version, which defines the same guard, can take its place.
#ifndef PEER
#define PEER

constexpr unsigned int ABSENT = 0xffffffffu;
constexpr unsigned int OTHER_NAN = 0x7fff7fffu;  // a NaN in float32, two in float16 and bfloat16

__device__ __forceinline__ void write_to_peer(uint4* to, const uint4& words) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
                 : "memory");
}

__device__ __forceinline__ uint4 read_from_peer(const uint4* from) {
    uint4 words;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from)
                 : "memory");
    return words;
}

// A word that the host or another block changes.
__device__ __forceinline__ unsigned int read_shared_word(const unsigned int* from) {
    unsigned int word;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

__device__ __forceinline__ void yield_processor() {}

#endif
