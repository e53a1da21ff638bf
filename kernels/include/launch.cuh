// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch (Hopper and later): a kernel may start while the one before it in the stream drains.
// Every kernel that is launched so calls wait_for_previous before it touches anything that another kernel writes, in
// every thread. Where it was launched plainly, and before Hopper, both calls do nothing.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// What the kernel before this one wrote is visible afterwards.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel's blocks may take multiprocessors as this one's leave them.
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void let_next_start() {}
#endif
