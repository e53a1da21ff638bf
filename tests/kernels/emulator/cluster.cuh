// SPDX-License-Identifier: Apache-2.0
// kernels/include/cluster.cuh for the emulator.
#pragma once
#include "reduce.cuh"

#define CLUSTER_DIMENSIONS

inline int cluster_rank() { return emulator::current_block; }
inline void cluster_sync() { emulator::wait(emulator::State::AT_CLUSTER); }

template <typename T>
T* in_block(T* own, int rank) {
    if (rank == cluster_rank()) return own;
    return reinterpret_cast<T*>(emulator::shared_copy(rank) + (reinterpret_cast<char*>(own) - __start_emulated_shared));
}

// Values meet outside of shared memory: a template's shared variable cannot live across a cluster barrier here.
template <int THREADS, typename Operation, typename T>
T cluster_reduce(T value, Operation operation) {
    static T of_block[CLUSTER];
    of_block[cluster_rank()] = block_reduce<THREADS>(value, operation);
    cluster_sync();
    value = of_block[0];
    for (int rank = 1; rank < CLUSTER; ++rank) value = operation(value, of_block[rank]);
    cluster_sync();
    return value;
}
