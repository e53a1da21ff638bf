// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch (Hopper and later): a kernel may start while the one before it in the stream drains.
// Every kernel that is launched so calls wait_for_previous before it touches anything that another kernel writes, in
// every thread; what it does before that touches nothing but weights. So a kernel never ends before the one ahead of it
// has ended, and let_next_start may come first of all. Where a kernel was launched plainly, and before Hopper, both
// calls do nothing.
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
#else
__device__ __forceinline__ void prefetch(const void*, int) {}
__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void let_next_start() {}
#endif
