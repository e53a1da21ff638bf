// SPDX-License-Identifier: Apache-2.0
// The emulator's scheduler, compiled once; kernels are compiled with cuda_emulator.h and linked to it.
#include "cuda_emulator.h"

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

using Place = void*[5];  // of __builtin_setjmp

// Serves one thread of a block after the other: a fiber whose thread is done waits for the next.
struct Fiber {
    Place place;
    std::unique_ptr<char[]> stack;  // none before it starts
};

// Of each thread of the cluster; apart from each other, since the scheduler goes through one of them at a time.
std::vector<Fiber> fibers;
std::vector<State> states;
std::vector<Dimensions> thread_indices;
std::vector<uint64_t> offered_words, exchanged_words;
std::vector<std::vector<char>> shared_of_block;
Place scheduler;
Kernel running;

void run_fiber() {
    for (;;) {
        running.body(running.context);
        wait(State::DONE);
    }
}

void start(Fiber& fiber) {
    static ucontext_t context;
    fiber.stack.reset(new char[STACK_BYTES]);
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
}

// swapcontext would do for every switch, but it saves the signal mask with a system call each time; setjmp scrambles
// what it saves. The compiler must not look into a jump: it would take it for the end of the function that jumps.
__attribute__((noipa)) void jump(Place& place) { __builtin_longjmp(place, 1); }

void resume(Fiber& fiber) {
    if (__builtin_setjmp(scheduler) != 0) return;
    if (fiber.stack) jump(fiber.place);
    start(fiber);
}

bool all_in(unsigned int first, unsigned int end, State state) {
    bool any = false;
    for (unsigned int i = first; i < end; ++i) {
        if (states[i] != state && states[i] != State::DONE) return false;
        any = any || states[i] == state;
    }
    return any;
}

void release(unsigned int first, unsigned int end, State state) {
    for (unsigned int i = first; i < end; ++i) {
        if (states[i] != state) continue;
        if (state == State::IN_EXCHANGE)
            std::copy_n(&offered_words[EXCHANGED_WORDS * i], EXCHANGED_WORDS, &exchanged[EXCHANGED_WORDS * i]);
        states[i] = State::READY;
    }
}

// Lets the threads from `first` to `end`, one block, go on as far as they can without another block.
void run_block(unsigned int first, unsigned int end) {
    for (bool progress = true; progress;) {
        progress = false;
        for (current = first; current < end; ++current) {
            if (states[current] != State::READY) continue;
            thread_index = thread_indices[current - first];
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
        if (std::all_of(states.begin(), states.end(), [](State state) { return state == State::DONE; })) return true;
        if (!all_in(0, count, State::AT_CLUSTER)) return false;
        release(0, count, State::AT_CLUSTER);
    }
}

}  // namespace

void wait(State state) {
    states[current] = state;
    if (__builtin_setjmp(fibers[current].place) == 0) jump(scheduler);
}

uint64_t* offered() { return &offered_words[EXCHANGED_WORDS * current]; }

char* shared_copy(unsigned int rank) { return shared_of_block.at(rank).data(); }

// 0 when every block finished, 1 when one could not.
int launch(Dimensions grid, Dimensions block, size_t shared_bytes, unsigned int cluster, const Kernel& kernel) {
    const unsigned int num_threads = block.x * block.y * block.z;
    std::vector<unsigned char> dynamic(shared_bytes + 128, 0xA5);
    dynamic_shared = dynamic.data() + (128 - reinterpret_cast<uintptr_t>(dynamic.data()) % 128);
    grid_dim = grid, block_dim = block, running = kernel;
    const unsigned int count = cluster * num_threads;
    if (fibers.size() < count) fibers.resize(count);
    offered_words.resize(EXCHANGED_WORDS * count);
    exchanged_words.resize(EXCHANGED_WORDS * count);
    exchanged = exchanged_words.data();
    thread_indices.resize(num_threads);
    for (unsigned int i = 0; i < num_threads; ++i) thread_indices[i] = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    for (unsigned int index = 0; index < grid.x * grid.y * grid.z; index += cluster) {
        shared_of_block.assign(cluster, std::vector<char>(running.shared_end - running.shared_begin, 0x5A));
        states.assign(count, State::READY);
        if (!run_cluster(index, cluster, num_threads)) {
            fibers.clear();  // some stopped midway
            return 1;
        }
    }
    return 0;
}

}  // namespace emulator
