// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch (Hopper and later): a kernel may start while the one before it in the stream drains.
// Every kernel that is launched so calls wait_for_previous before it touches anything that another kernel writes, in
// every thread; what it does before that touches nothing but weights. So a kernel never ends before the one ahead of it
// has ended, and let_next_start may come first of all. A compiler may move loads through a `const T* __restrict__` that the kernel never
// writes to ahead of the wait, so such loads right after it go through plain pointers (tests/support/sass.py finds the others).
// Where a kernel was launched plainly, and before Hopper, both calls do nothing.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// What the kernel before this one wrote is visible afterwards.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Once all blocks of this kernel have said so, the next one's may take whatever room there is.
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Starts to bring memory into the second-level cache; `from` and `num_bytes` are multiples of 16.
__device__ __forceinline__ void prefetch(const void* from, int num_bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(num_bytes) : "memory");
}
// One value of a weight, loaded where the call stands: compilers move plain loads to the other side of wait_for_previous.
__device__ __forceinline__ float load_weight(const float* from) {
    float value;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
}
template <typename T>
__device__ __forceinline__ T load_weight(const T* from) {
    static_assert(sizeof(T) == sizeof(unsigned short));
    unsigned short bits;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(from));
    return reinterpret_cast<const T&>(bits);
}
#else
template <typename T>
__device__ __forceinline__ T load_weight(const T* from) {
    return *from;
}
__device__ __forceinline__ void prefetch(const void*, int) {}
__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void let_next_start() {}
#endif
