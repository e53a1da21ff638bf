// SPDX-License-Identifier: Apache-2.0
// The emulator's scheduler, compiled once; kernels are compiled with cuda_emulator.h and linked to it.
#include "cuda_emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace emulator {

Dimensions grid_dim, block_dim, block_index, thread_index;
unsigned char* dynamic_shared;
unsigned int current, current_block;
uint64_t* exchanged;

namespace {

constexpr size_t STACK_BYTES = 128 * 1024;

struct Fiber {
    ucontext_t start;
    jmp_buf place;
    bool has_started;
    std::unique_ptr<char[]> stack;
    State state;
    uint64_t offered[EXCHANGED_WORDS];
};

std::vector<Fiber> fibers;
std::vector<uint64_t> exchanged_words;
std::vector<std::vector<char>> shared_of_block;
jmp_buf scheduler;
Kernel running;

void run_fiber() {
    running.body(running.context);
    fibers[current].state = State::DONE;
    _longjmp(scheduler, 1);
}

// swapcontext would do for every switch, but it saves the signal mask with a system call each time.
void resume(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.has_started) _longjmp(fiber.place, 1);
    fiber.has_started = true;
    setcontext(&fiber.start);
}

bool all_in(unsigned int first, unsigned int end, State state) {
    bool any = false;
    for (unsigned int i = first; i < end; ++i) {
        if (fibers[i].state != state && fibers[i].state != State::DONE) return false;
        any = any || fibers[i].state == state;
    }
    return any;
}

void release(unsigned int first, unsigned int end, State state) {
    for (unsigned int i = first; i < end; ++i) {
        if (fibers[i].state != state) continue;
        if (state == State::IN_EXCHANGE) std::copy_n(fibers[i].offered, EXCHANGED_WORDS, &exchanged[EXCHANGED_WORDS * i]);
        fibers[i].state = State::READY;
    }
}

// Lets the threads from `first` to `end`, one block, go on as far as they can without another block.
void run_block(unsigned int first, unsigned int end) {
    for (bool progress = true; progress;) {
        progress = false;
        for (current = first; current < end; ++current) {
            if (fibers[current].state != State::READY) continue;
            const unsigned int thread = current - first;
            thread_index = {thread % block_dim.x, thread / block_dim.x % block_dim.y, thread / block_dim.x / block_dim.y};
            resume(fibers[current]);
            progress = true;
        }
        for (unsigned int warp = first; warp < end; warp += 32) {
            const unsigned int last = std::min(warp + 32, end);
            if (all_in(warp, last, State::IN_EXCHANGE)) release(warp, last, State::IN_EXCHANGE), progress = true;
        }
        if (all_in(first, end, State::AT_BARRIER)) release(first, end, State::AT_BARRIER), progress = true;
    }
}

// False when the cluster's threads wait for each other in vain.
bool run_cluster(unsigned int index, unsigned int num_blocks, unsigned int num_threads) {
    const unsigned int count = num_blocks * num_threads;
    for (;;) {
        for (current_block = 0; current_block < num_blocks; ++current_block) {
            const unsigned int block = index + current_block;
            block_index = {block % grid_dim.x, block / grid_dim.x % grid_dim.y, block / grid_dim.x / grid_dim.y};
            auto& shared = shared_of_block[current_block];
            std::copy(shared.begin(), shared.end(), running.shared_begin);
            run_block(current_block * num_threads, (current_block + 1) * num_threads);
            std::copy(running.shared_begin, running.shared_end, shared.begin());
        }
        if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.state == State::DONE; }))
            return true;
        if (!all_in(0, count, State::AT_CLUSTER)) return false;
        release(0, count, State::AT_CLUSTER);
    }
}

void start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[STACK_BYTES]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.start, run_fiber, 0);
    fiber.has_started = false;
    fiber.state = State::READY;
}

}  // namespace

void wait(State state) {
    fibers[current].state = state;
    if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

uint64_t* offered() { return fibers[current].offered; }

char* shared_copy(unsigned int rank) { return shared_of_block.at(rank).data(); }

// 0 when every block finished, 1 when one could not.
int launch(Dimensions grid, Dimensions block, size_t shared_bytes, unsigned int cluster, const Kernel& kernel) {
    const unsigned int num_threads = block.x * block.y * block.z;
    std::vector<unsigned char> dynamic(shared_bytes + 128, 0xA5);
    dynamic_shared = dynamic.data() + (128 - reinterpret_cast<uintptr_t>(dynamic.data()) % 128);
    grid_dim = grid, block_dim = block, running = kernel;
    fibers.resize(cluster * num_threads);
    exchanged_words.resize(EXCHANGED_WORDS * fibers.size());
    exchanged = exchanged_words.data();
    for (unsigned int index = 0; index < grid.x * grid.y * grid.z; index += cluster) {
        shared_of_block.assign(cluster, std::vector<char>(running.shared_end - running.shared_begin, 0x5A));
        for (auto& fiber : fibers) start(fiber);
        if (!run_cluster(index, cluster, num_threads)) return 1;
    }
    return 0;
}

}  // namespace emulator
