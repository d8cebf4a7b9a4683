// Runs kernels: a host thread takes block after block, and a block's threads are fibers.
//
// A warp runs until its lanes have come together, or to the block's barrier, or to the end; then the
// next warp runs. So warps are as far apart as barriers let them be, and with BATON_DOUBLE_ORDER=reverse
// they are so the other way round: what is missing between two warps shows in one of the two orders.
// A warp whose lanes do not come together (some at a barrier or gone, others at a shuffle) is an error,
// as is an exit while the rest waits for a shuffle.

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device.h"
#include "runtime.h"

#if !defined(__x86_64__)
#error "switching between fibers is written for x86-64"
#endif

// Saves the callee's registers on the stack it leaves, and takes them from the one it goes to.
extern "C" void gpu_double_switch(void** from, void* to);
asm(R"(
.text
.globl gpu_double_switch
.hidden gpu_double_switch
.type gpu_double_switch,@function
gpu_double_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size gpu_double_switch,.-gpu_double_switch
)");

namespace gpu_double {

__thread Places places;

namespace {

constexpr size_t STACK = 128 << 10;
constexpr size_t PAGE = 4096;
constexpr int LANES = 32;
constexpr size_t MOST_THREADS = 1024;
constexpr size_t MOST_SHARED = 227 << 10;

enum State : uint8_t { READY, TOGETHER, BARRIER, DONE };

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    void* stack;
    State state;
    uint3 thread;
    std::vector<Copy> copies;
    std::vector<size_t> groups;  // where each ended group ends in `copies`
};

struct Warp {
    int arrived;
    Op op;
    void* arguments[LANES];
};

// A host thread's.
struct Runner {
    std::vector<Fiber> fibers = std::vector<Fiber>(MOST_THREADS);
    Warp warp;  // the running one's
    unsigned char* stacks;
    unsigned char* shared;  // ends at a page that cannot be touched
    unsigned char* dynamic;
    void* scheduler;
    size_t threads, running;
    const Launch* launch;

    Runner() {
        void* all = mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        stacks = static_cast<unsigned char*>(all);
        size_t room = (MOST_SHARED + PAGE - 1) / PAGE * PAGE;
        void* memory = mmap(nullptr, room + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED || memory == MAP_FAILED) fail("no memory for fibers");
        shared = static_cast<unsigned char*>(memory) + room;
        mprotect(shared, PAGE, PROT_NONE);
        // Each stack ends in a page that cannot be touched.
        for (size_t i = 0; i < MOST_THREADS; i++) mprotect(stacks + i * STACK, PAGE, PROT_NONE);
    }
};

__thread Runner* runner;

// Runners outlive the threads that use them: a stream's thread comes and goes, and making a runner
// takes longer than most kernels.
std::mutex spare_mutex;
std::vector<Runner*>& spare = *new std::vector<Runner*>;

struct Hold {
    Hold() {
        {
            std::lock_guard<std::mutex> lock(spare_mutex);
            if (!spare.empty()) {
                runner = spare.back();
                spare.pop_back();
            }
        }
        if (!runner) runner = new Runner;
    }
    ~Hold() {
        std::lock_guard<std::mutex> lock(spare_mutex);
        spare.push_back(runner);
        runner = nullptr;
    }
};

bool reversed() {
    static const bool value = [] {
        const char* order = getenv("BATON_DOUBLE_ORDER");
        return order && !strcmp(order, "reverse");
    }();
    return value;
}

void enter() {
    runner->launch->kernel->call(runner->launch->kernel->function, runner->launch->arguments);
    Runner& r = *runner;
    r.fibers[r.running].state = DONE;
    sync_block();
    fail("a thread ran after its end");
}

void prepare(Runner& r, size_t i) {
    Fiber& fiber = r.fibers[i];
    fiber.state = READY;
    fiber.copies.clear();
    fiber.groups.clear();
    uint32_t x = r.launch->block[0], y = r.launch->block[1];
    fiber.thread = {uint32_t(i) % x, uint32_t(i) / x % y, uint32_t(i) / x / y};
    // Six registers, and where to go: aligned as after a call.
    // Not all at the same place of a stack: the lanes of a warp would share a few sets of the cache.
    void** top = reinterpret_cast<void**>(r.stacks + (i + 1) * STACK - i % LANES * 17 * 64) - 2;
    *top = reinterpret_cast<void*>(enter);
    fiber.stack = top - 6;
}

void go_to(Runner& r, void** from, size_t i) {
    r.running = i;
    places.thread = r.fibers[i].thread;
    gpu_double_switch(from, r.fibers[i].stack);
}

// Leaves the running lane for one of its warp that can run; for the scheduler when there is none.
void leave(Runner& r) {
    Fiber& self = r.fibers[r.running];
    size_t first = r.running / LANES * LANES, lane = r.running % LANES;
    for (size_t step = 1; step < LANES; step++) {
        size_t next = first + (reversed() ? lane + LANES - step : lane + step) % LANES;
        if (next < r.threads && r.fibers[next].state == READY) return go_to(r, &self.stack, next);
    }
    gpu_double_switch(&self.stack, r.scheduler);
}

// Row-major matrices of a whole warp; see common.cuh for which lane has what.
void multiply(void* const* arguments) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < LANES; lane++) {
        const Product& p = *static_cast<const Product*>(arguments[lane]);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
            a[row][column] = __uint_as_float(p.a[i] << 16);
            a[row][column + 1] = __uint_as_float(p.a[i] & 0xffff0000u);
        }
        b[2 * t][g] = __uint_as_float(p.b0 << 16);
        b[2 * t + 1][g] = __uint_as_float(p.b0 & 0xffff0000u);
        b[2 * t + 8][g] = __uint_as_float(p.b1 << 16);
        b[2 * t + 9][g] = __uint_as_float(p.b1 & 0xffff0000u);
        for (int i = 0; i < 4; i++) c[g + i / 2 * 8][2 * t + i % 2] = p.c[i];
    }
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 16; k++) {
            for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
        }
    }
    for (int lane = 0; lane < LANES; lane++) {
        const Product& p = *static_cast<const Product*>(arguments[lane]);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) p.c[i] = c[g + i / 2 * 8][2 * t + i % 2];
    }
}

void load(void* const* arguments, bool transposed) {
    for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t m[8][8];
        for (int row = 0; row < 8; row++) {
            std::memcpy(m[row], static_cast<const Matrices*>(arguments[matrix * 8 + row])->row, 16);
        }
        for (int lane = 0; lane < LANES; lane++) {
            int g = lane / 4, t = lane % 4;
            uint32_t first = transposed ? m[2 * t][g] : m[g][2 * t];
            uint32_t second = transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
            static_cast<const Matrices*>(arguments[lane])->r[matrix] = first | second << 16;
        }
    }
}

void perform(Warp& warp) {
    switch (warp.op) {
        case SYNC:
            break;
        case SHUFFLE:
            for (void* lane : warp.arguments) {
                Shuffle& s = *static_cast<Shuffle*>(lane);
                s.result = static_cast<const Shuffle*>(warp.arguments[s.from])->value;
            }
            break;
        case PRODUCT:
            multiply(warp.arguments);
            break;
        case MATRICES:
        case MATRICES_TRANSPOSED:
            load(warp.arguments, warp.op == MATRICES_TRANSPOSED);
            break;
    }
}

void run_block(Runner& r, const Launch& launch, uint64_t number) {
    places.block = {uint32_t(number % launch.grid[0]), uint32_t(number / launch.grid[0] % launch.grid[1]),
                    uint32_t(number / launch.grid[0] / launch.grid[1])};
    places.block_dim = {launch.block[0], launch.block[1], launch.block[2]};
    places.grid_dim = {launch.grid[0], launch.grid[1], launch.grid[2]};
    r.launch = &launch;
    r.threads = size_t(launch.block[0]) * launch.block[1] * launch.block[2];
    r.dynamic = r.shared - (launch.shared + 15) / 16 * 16;
    // Not a number, in whatever type it is read before it is written.
    std::memset(r.dynamic, 0xff, r.shared - r.dynamic);
    for (size_t i = 0; i < r.threads; i++) prepare(r, i);
    size_t warps = (r.threads + LANES - 1) / LANES;
    for (;;) {
        bool left = false;
        for (size_t i = 0; i < warps; i++) {
            size_t warp = reversed() ? warps - 1 - i : i, first = warp * LANES;
            r.warp.arrived = 0;
            size_t lane = reversed() ? LANES - 1 : 0;
            if (r.fibers[first + lane].state == READY) go_to(r, &r.scheduler, first + lane);
            for (size_t l = first; l < std::min(first + LANES, r.threads); l++) {
                State state = r.fibers[l].state;
                if (state == READY) go_to(r, &r.scheduler, l);
                if (r.fibers[l].state == TOGETHER) fail("a warp's lanes do not come together");
                left |= r.fibers[l].state == BARRIER;
            }
        }
        if (!left) return;
        // Threads that have ended count as arrived.
        for (size_t i = 0; i < r.threads; i++) {
            if (r.fibers[i].state == BARRIER) r.fibers[i].state = READY;
        }
    }
}

// Host threads that run blocks.
class Pool {
public:
    Pool() {
        const char* wanted = getenv("BATON_DOUBLE_THREADS");
        size_t count = wanted ? atoi(wanted) : std::min(std::thread::hardware_concurrency(), 8u);
        for (size_t i = 1; i < count; i++) std::thread([this] { serve(); }).detach();
        helpers = count > 1 ? count - 1 : 0;
    }

    void run(size_t count, const std::function<void(size_t)>& work) {
        std::lock_guard<std::mutex> one(turn);
        {
            std::lock_guard<std::mutex> lock(mutex);
            this->work = &work;
            this->count = count;
            next = 0;
            busy = count > 1 ? helpers : 0;
            if (busy) round++;
        }
        if (count > 1) wake.notify_all();
        take(work, count);
        std::unique_lock<std::mutex> lock(mutex);
        idle.wait(lock, [this] { return busy == 0; });
    }

private:
    void take(const std::function<void(size_t)>& work, size_t count) {
        for (size_t i; (i = next.fetch_add(1)) < count;) work(reversed() ? count - 1 - i : i);
    }

    void serve() {
        uint64_t seen = 0;
        for (;;) {
            const std::function<void(size_t)>* mine;
            size_t all;
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return round != seen; });
                seen = round;
                mine = work;
                all = count;
            }
            take(*mine, all);
            std::lock_guard<std::mutex> lock(mutex);
            if (--busy == 0) idle.notify_all();
        }
    }

    std::mutex turn, mutex;
    std::condition_variable wake, idle;
    const std::function<void(size_t)>* work = nullptr;
    size_t count = 0, helpers = 0, busy = 0;
    uint64_t round = 0;
    std::atomic<size_t> next{0};
};

Pool& pool() {
    // Never destroyed: its threads may outlive what runs at exit.
    static Pool* pool = new Pool;
    return *pool;
}

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel>* all = new std::map<std::string, Kernel>;
    return *all;
}

}  // namespace

void fail(const char* what) {
    if (runner && runner->launch) {
        fprintf(stderr, "GPU double: %s (kernel %s, block %u %u %u, thread %u)\n", what, runner->launch->kernel->name,
                places.block.x, places.block.y, places.block.z, places.thread.x);
    } else {
        fprintf(stderr, "GPU double: %s\n", what);
    }
    abort();
}

unsigned char* dynamic_shared() { return runner->dynamic; }

void sync_block() {
    Runner& r = *runner;
    Fiber& self = r.fibers[r.running];
    if (self.state != DONE) self.state = BARRIER;
    leave(r);
}

void together(Op op, void* arguments) {
    Runner& r = *runner;
    Warp& warp = r.warp;
    size_t lane = r.running % LANES, first = r.running - lane;
    if (warp.arrived == 0) warp.op = op;
    if (warp.op != op) fail("lanes of a warp do different things together");
    warp.arguments[lane] = arguments;
    if (++warp.arrived == LANES) {
        perform(warp);
        warp.arrived = 0;
        for (size_t i = first; i < first + LANES; i++) r.fibers[i].state = READY;
        return;
    }
    r.fibers[r.running].state = TOGETHER;
    leave(r);
}

void copy_later(void* to, const void* from) { runner->fibers[runner->running].copies.push_back({to, from}); }

void end_group() {
    Fiber& self = runner->fibers[runner->running];
    self.groups.push_back(self.copies.size());
}

void finish_groups(int but) {
    Fiber& self = runner->fibers[runner->running];
    if (self.groups.size() <= size_t(but)) return;
    size_t groups = self.groups.size() - but, done = self.groups[groups - 1];
    for (size_t i = 0; i < done; i++) {
        const Copy& copy = self.copies[i];
        if (copy.from) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + done);
    self.groups.erase(self.groups.begin(), self.groups.begin() + groups);
    for (size_t& end : self.groups) end -= done;
}

void Register::add(const char* name, void* kernel, size_t bytes, void (*call)(void*, const void*)) {
    kernels()[name] = {name, kernel, bytes, call};
}

const Kernel* find_kernel(const char* name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

void in_parallel(size_t count, const std::function<void(size_t)>& work) { pool().run(count, work); }

void run(const Launch& launch) {
    uint64_t blocks = uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    in_parallel(blocks, [&](size_t i) {
        static thread_local Hold hold;
        (void)hold;
        run_block(*runner, launch, i);
        runner->launch = nullptr;
    });
}

}  // namespace gpu_double
