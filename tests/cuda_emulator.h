// Runs CUDA kernels on a CPU, slowly and strictly: every thread of a block is a fiber of its own, and a barrier really
// waits for all. What the tensor cores and the copy engine do is written out by the book:
//
//     a background copy arrives only when it is waited for, so reading too early reads poison
//     shared memory is poisoned before each block
//     a 16-byte access to an address that is no multiple of 16 ends the program
//
// It takes the place of the part of gpu.cu between #ifndef EMULATED and #endif. One block runs after the other.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n)

typedef _Float16 half;
using std::max;
using std::min;

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
alignas(128) unsigned char shared[1 << 18];
static float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace emulator {

constexpr size_t STACK = 1 << 17;

struct Copy {
    void* to;
    const void* from;
    bool inside;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
    Index thread;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};
struct Barrier {
    unsigned waiting = 0, round = 0;
};
struct Warp {
    Barrier barrier;
    unsigned lanes;
    const void* address[32];
    double value[32];
    unsigned a[32][4], b[32][2];
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier block_barrier;
static ucontext_t scheduler;
static unsigned current, alive;
static std::function<void()> body;

static void fail(const char* what) {
    fprintf(stderr, "CUDA emulator: %s, block (%u, %u, %u), thread %u\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
            current);
    abort();
}
static void wait(Barrier& barrier, const unsigned& expected) {
    const unsigned round = barrier.round;
    ++barrier.waiting;
    while (barrier.round == round) {
        if (barrier.waiting >= expected) {
            barrier.waiting = 0, ++barrier.round;
            break;
        }
        swapcontext(&fibers[current].context, &scheduler);
    }
}
static Warp& warp() { return warps[current / 32]; }
static void wait_for_warp() { wait(warp().barrier, warp().lanes); }

static void start() {
    body();
    fibers[current].done = true;
    --alive, --warp().lanes;
    swapcontext(&fibers[current].context, &scheduler);
}

// Run a kernel's call for every block of the grid and every thread of a block.
static void run(Index blocks, Index threads, std::function<void()> call) {
    const unsigned count = threads.x * threads.y * threads.z;
    gridDim = blocks, blockDim = threads, body = call;
    if (fibers.size() < count) fibers.resize(count);
    for (unsigned z = 0; z < blocks.z; ++z)
        for (unsigned y = 0; y < blocks.y; ++y)
            for (unsigned x = 0; x < blocks.x; ++x) {
                blockIdx = {x, y, z};
                memset(shared, 0xff, sizeof shared);
                warps.assign((count + 31) / 32, Warp());
                block_barrier = Barrier();
                alive = count;
                for (unsigned t = 0; t < count; ++t) {
                    Fiber& fiber = fibers[t];
                    fiber.stack.resize(STACK);
                    fiber.done = false, fiber.open.clear(), fiber.groups.clear();
                    fiber.thread = {t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
                    ++warps[t / 32].lanes;
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.data();
                    fiber.context.uc_stack.ss_size = STACK;
                    fiber.context.uc_link = &scheduler;
                    makecontext(&fiber.context, start, 0);
                }
                while (alive)
                    for (unsigned t = 0; t < count; ++t)
                        if (!fibers[t].done) {
                            current = t, threadIdx = fibers[t].thread;
                            swapcontext(&scheduler, &fibers[t].context);
                        }
            }
}

static void carry_out(const Copy& copy) {
    if (copy.inside)
        memcpy(copy.to, copy.from, 16);
    else
        memset(copy.to, 0, 16);
}

static void matrices(unsigned (&r)[4], const void* row, bool transposed) {
    if ((uintptr_t)row % 16) fail("ldmatrix from an address that is no multiple of 16");
    const unsigned lane = current % 32;
    warp().address[lane] = row;
    wait_for_warp();
    for (unsigned m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (unsigned e = 0; e < 2; ++e) {
            unsigned i = lane / 4, j = lane % 4 * 2 + e;
            if (transposed) std::swap(i, j);
            memcpy(&pair[e], (const char*)warp().address[m * 8 + i] + j * 2, 2);
        }
        memcpy(&r[m], pair, 4);
    }
    wait_for_warp();
}

// A number of a register: its lower or upper half, or all of it with 10 bits of the fraction
static float as_half(unsigned word, unsigned upper) {
    uint16_t bits = word >> 16 * upper;
    half value;
    memcpy(&value, &bits, 2);
    return value;
}
static float as_tf32(unsigned word, unsigned) {
    word &= 0xffffe000u;
    float value;
    memcpy(&value, &word, 4);
    return value;
}
// c += a b, with factors that lie in registers as the PTX ISA says, `per` numbers to a register
static void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned* b, unsigned per,
                     float (*number)(unsigned, unsigned)) {
    const unsigned lane = current % 32, inner = 8 * per;
    Warp& w = warp();
    memcpy(w.a[lane], a, 16), memcpy(w.b[lane], b, 8);
    wait_for_warp();
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (unsigned k = 0; k < inner; ++k) {
            const unsigned position = k / per % 4, later = k >= inner / 2;
            sum += number(w.a[row % 8 * 4 + position][row / 8 + 2 * later], k % per) *
                   number(w.b[column * 4 + position][later], k % per);
        }
        c[i] += sum;
    }
    wait_for_warp();
}

}  // namespace emulator

static void __syncthreads() { emulator::wait(emulator::block_barrier, emulator::alive); }
template <typename V>
static V __shfl_xor_sync(unsigned, V value, int mask) {
    emulator::Warp& w = emulator::warp();
    w.value[emulator::current % 32] = value;
    emulator::wait_for_warp();
    const V other = V(w.value[(emulator::current % 32) ^ mask]);
    emulator::wait_for_warp();
    return other;
}
static void copy16(void* to, const void* from, bool inside) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) emulator::fail("a copy of 16 bytes that is not aligned");
    emulator::fibers[emulator::current].open.push_back({to, from, inside});
}
static void end_of_copies() {
    auto& fiber = emulator::fibers[emulator::current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int N>
static void wait_for_copies() {
    auto& groups = emulator::fibers[emulator::current].groups;
    for (; groups.size() > N; groups.pop_front())
        for (const auto& copy : groups.front()) emulator::carry_out(copy);
}
static void load_matrices(unsigned (&r)[4], const void* row) { emulator::matrices(r, row, false); }
static void load_matrices_transposed(unsigned (&r)[4], const void* row) { emulator::matrices(r, row, true); }
static void multiply_add(half, float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
    emulator::multiply(c, a, b, 2, emulator::as_half);
}
static void multiply_add(float, float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
    emulator::multiply(c, a, b, 1, emulator::as_tf32);
}

// Call a kernel as the CUDA driver does: an array of pointers to its arguments.
namespace emulator {
template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_const_t<A>*)arguments[I]...);
}
template <typename... A>
void launch(void (*kernel)(A...), const unsigned* blocks, const unsigned* threads, void** arguments) {
    run({blocks[0], blocks[1], blocks[2]}, {threads[0], threads[1], threads[2]},
        [=] { call(kernel, arguments, std::index_sequence_for<A...>()); });
}
}  // namespace emulator
