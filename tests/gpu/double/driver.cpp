// libcuda.so: the driver's functions that Baton calls.
//
// Device memory is a memfd an allocation, mapped between pages that cannot be touched, so that an
// access past its end faults, and a process finds another's through /proc (CUDA IPC). Streams are
// lazy: nothing runs before somebody waits for it or asks, so that what forgets to wait reads what was
// there before. A capture keeps the work for the graph. Every call checks that the thread has a
// context, which is what is forgotten most easily.

#include "driver.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "runtime.h"

#define API extern "C" __attribute__((visibility("default"))) int

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

namespace gpu_double {

typedef std::vector<std::function<void()>> Graph;

struct Stream {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> work;
    bool wanted = false, busy = false, ending = false;
    std::unique_ptr<Graph> capture;
    std::thread::id capturer;
    std::thread thread{[this] { serve(); }};

    void serve() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            changed.wait(lock, [this] { return ending || (wanted && !work.empty()); });
            if (work.empty()) return;
            auto next = std::move(work.front());
            work.pop_front();
            busy = true;
            lock.unlock();
            next();
            lock.lock();
            busy = false;
            if (work.empty()) wanted = false;
            changed.notify_all();
        }
    }
};

namespace {

struct Context {
    int device;
};

struct Allocation {
    size_t bytes;
    void* map;
    size_t mapped;
    int fd;         // -1: another process's
    size_t offset;  // in the file
    int device;
};

// As cuIpcMemHandle: 64 bytes.
struct Handle {
    char magic[8];
    int32_t pid, fd;
    uint64_t bytes, offset, inode;
    char rest[64 - 40];
};
static_assert(sizeof(Handle) == 64);

constexpr size_t PAGE = 4096;
constexpr int MOST_DEVICES = 16;

bool initialized = false;
thread_local Context* current = nullptr;
Context contexts[MOST_DEVICES];
std::mutex memory_mutex;
std::map<uintptr_t, Allocation>& memory = *new std::map<uintptr_t, Allocation>;
size_t used[MOST_DEVICES] = {};

size_t setting(const char* name, size_t otherwise) {
    const char* value = getenv(name);
    return value ? strtoull(value, nullptr, 10) : otherwise;
}

int devices() { return std::min<size_t>(setting("BATON_DOUBLE_DEVICES", 1), MOST_DEVICES); }
size_t total_memory() { return setting("BATON_DOUBLE_MEMORY", size_t(16) << 30); }

std::mutex streams_mutex;
// Shared: one thread may wait for all of them while another destroys one.
// Never destroyed: at the process's end their threads may still run.
std::vector<std::shared_ptr<Stream>>& streams = *new std::vector<std::shared_ptr<Stream>>;

int no_context() { return !initialized ? NOT_INITIALIZED : !current ? INVALID_CONTEXT : SUCCESS; }

bool capturing(Stream* stream) {
    std::lock_guard<std::mutex> lock(stream->mutex);
    return bool(stream->capture);
}

// Whether this thread captures a stream: then it may not wait or allocate.
bool captures() {
    std::lock_guard<std::mutex> lock(streams_mutex);
    for (auto& stream : streams) {
        std::lock_guard<std::mutex> inner(stream->mutex);
        if (stream->capture && stream->capturer == std::this_thread::get_id()) return true;
    }
    return false;
}

int wait(Stream* stream) {
    std::unique_lock<std::mutex> lock(stream->mutex);
    if (stream->capture) return CAPTURE_UNSUPPORTED;
    stream->wanted = true;
    stream->changed.notify_all();
    stream->changed.wait(lock, [&] { return stream->work.empty() && !stream->busy; });
    return SUCCESS;
}

void wait_for_all() {
    std::vector<std::shared_ptr<Stream>> all;
    {
        std::lock_guard<std::mutex> lock(streams_mutex);
        all = streams;
    }
    for (auto& stream : all) wait(stream.get());
}

int map(int fd, size_t bytes, size_t offset, int device, bool own, uint64_t* at) {
    size_t inside = (offset + bytes + PAGE - 1) / PAGE * PAGE;
    void* all = mmap(nullptr, inside + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return OUT_OF_MEMORY;
    char* begin = static_cast<char*>(all) + PAGE;
    if (mmap(begin, inside, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0) == MAP_FAILED) {
        munmap(all, inside + 2 * PAGE);
        return OUT_OF_MEMORY;
    }
    uintptr_t address = reinterpret_cast<uintptr_t>(begin) + offset;
    std::lock_guard<std::mutex> lock(memory_mutex);
    memory[address] = {bytes, all, inside + 2 * PAGE, own ? fd : -1, offset, device};
    if (own) used[device] += bytes;
    *at = address;
    return SUCCESS;
}

int unmap(uint64_t at, bool own) {
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto found = memory.find(at);
    if (found == memory.end() || (found->second.fd >= 0) != own) return INVALID_VALUE;
    munmap(found->second.map, found->second.mapped);
    if (own) {
        close(found->second.fd);
        used[found->second.device] -= found->second.bytes;
    }
    memory.erase(found);
    return SUCCESS;
}

struct Event {
    std::mutex mutex;
    std::condition_variable changed;
    Stream* stream = nullptr;
    uint64_t recorded = 0, reached = 0;
    std::chrono::steady_clock::time_point when;
};

}  // namespace

void enqueue(Stream* stream, std::function<void()> work) {
    std::lock_guard<std::mutex> lock(stream->mutex);
    if (stream->capture) stream->capture->push_back(std::move(work));
    else stream->work.push_back(std::move(work));
    stream->changed.notify_all();
}

void parallel(size_t count, const std::function<void(size_t)>& work) { in_parallel(count, work); }

void check_range(const void* at, size_t bytes, const char* what) {
    uintptr_t address = reinterpret_cast<uintptr_t>(at);
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto after = memory.upper_bound(address);
    if (after != memory.begin()) {
        --after;
        if (address + bytes <= after->first + after->second.bytes) return;
    }
    fprintf(stderr, "GPU double: %s: %zu bytes at %p are not device memory\n", what, bytes, at);
    abort();
}

}  // namespace gpu_double

using namespace gpu_double;

#define CONTEXT                                   \
    do {                                          \
        if (int error = no_context()) return error; \
    } while (0)

API cuInit(unsigned) {
    for (int i = 0; i < MOST_DEVICES; i++) contexts[i].device = i;
    initialized = true;
    return SUCCESS;
}

API cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

API cuGetErrorName(int error, const char** name) {
    switch (error) {
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case NOT_INITIALIZED: *name = "CUDA_ERROR_NOT_INITIALIZED"; break;
        case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case INVALID_HANDLE: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
        case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case CAPTURE_INVALIDATED: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
        default: *name = "CUDA_ERROR"; break;
    }
    return SUCCESS;
}

API cuDeviceGetCount(int* count) {
    if (!initialized) return NOT_INITIALIZED;
    *count = devices();
    return SUCCESS;
}

API cuDeviceGet(int* device, int ordinal) {
    if (!initialized) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= devices()) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

API cuDeviceGetName(char* name, int room, int) {
    snprintf(name, room, "Baton's double of a GPU");
    return SUCCESS;
}

// The same in every process of the host, as it must be to be compared.
API cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    memcpy(uuid, "baton-gpu-double", 16);
    uuid[15] = static_cast<unsigned char>(device);
    return SUCCESS;
}

API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: *value = setting("BATON_DOUBLE_MULTIPROCESSORS", 4); return SUCCESS;
        case 75: *value = 9; return SUCCESS;       // compute capability
        case 76: *value = 0; return SUCCESS;
        case 97: *value = 227 << 10; return SUCCESS;  // shared memory a block may ask for
        case 38: *value = 50 << 20; return SUCCESS;   // L2
        default: return INVALID_VALUE;
    }
}

API cuDevicePrimaryCtxRetain(Context** context, int device) {
    *context = &contexts[device];
    return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }

API cuCtxSetCurrent(Context* context) {
    current = context;
    return SUCCESS;
}

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    CONTEXT;
    std::lock_guard<std::mutex> lock(memory_mutex);
    *total = total_memory();
    *free = *total - std::min(*total, used[current->device]);
    return SUCCESS;
}

API cuMemAlloc_v2(uint64_t* at, size_t bytes) {
    CONTEXT;
    if (captures()) return CAPTURE_UNSUPPORTED;
    if (bytes == 0) return INVALID_VALUE;
    {
        std::lock_guard<std::mutex> lock(memory_mutex);
        if (used[current->device] + bytes > total_memory()) return OUT_OF_MEMORY;
    }
    // As near to the end of its last page as an allocation's alignment lets it be.
    size_t whole = (bytes + 255) / 256 * 256, offset = (PAGE - whole % PAGE) % PAGE;
    int fd = memfd_create("baton-gpu-double", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, offset + whole)) return OUT_OF_MEMORY;
    int error = map(fd, bytes, offset, current->device, true, at);
    if (error) {
        close(fd);
        return error;
    }
    // Not a number, in whatever type it is read before it is written; too costly for large memory.
    if (bytes <= size_t(4) << 20) memset(reinterpret_cast<void*>(*at), 0xff, bytes);
    return SUCCESS;
}

API cuMemFree_v2(uint64_t at) {
    CONTEXT;
    if (captures()) return CAPTURE_UNSUPPORTED;
    wait_for_all();
    return unmap(at, true);
}

API cuMemGetAddressRange_v2(uint64_t* base, size_t* bytes, uint64_t at) {
    CONTEXT;
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto found = memory.find(at);
    if (found == memory.end()) return INVALID_VALUE;
    *base = at;
    *bytes = found->second.bytes;
    return SUCCESS;
}

API cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    CONTEXT;
    *at = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    return *at ? SUCCESS : OUT_OF_MEMORY;
}

API cuMemFreeHost(void* at) {
    CONTEXT;
    free(at);
    return SUCCESS;
}

static int copy(void* to, const void* from, size_t bytes, Stream* stream, bool to_device, bool from_device) {
    CONTEXT;
    if (!stream) return INVALID_HANDLE;
    enqueue(stream, [=] {
        if (to_device) check_range(to, bytes, "a copy to the device");
        if (from_device) check_range(from, bytes, "a copy from the device");
        memmove(to, from, bytes);
    });
    return SUCCESS;
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
    return copy(reinterpret_cast<void*>(to), from, bytes, stream, true, false);
}

API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
    return copy(to, reinterpret_cast<void*>(from), bytes, stream, false, true);
}

API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
    return copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes, stream, true, true);
}

API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, Stream* stream) {
    CONTEXT;
    enqueue(stream, [=] {
        check_range(reinterpret_cast<void*>(to), bytes, "a memset");
        memset(reinterpret_cast<void*>(to), value, bytes);
    });
    return SUCCESS;
}

API cuStreamCreate(Stream** stream, unsigned) {
    CONTEXT;
    auto made = std::make_shared<Stream>();
    *stream = made.get();
    std::lock_guard<std::mutex> lock(streams_mutex);
    streams.push_back(made);
    return SUCCESS;
}

API cuStreamDestroy_v2(Stream* stream) {
    CONTEXT;
    wait(stream);
    std::shared_ptr<Stream> last;
    {
        std::lock_guard<std::mutex> lock(streams_mutex);
        auto own = [stream](const std::shared_ptr<Stream>& other) { return other.get() == stream; };
        auto found = std::find_if(streams.begin(), streams.end(), own);
        if (found == streams.end()) return INVALID_HANDLE;
        last = *found;
        streams.erase(found);
    }
    {
        std::lock_guard<std::mutex> lock(stream->mutex);
        stream->ending = true;
        stream->changed.notify_all();
    }
    stream->thread.join();
    return SUCCESS;
}

API cuStreamSynchronize(Stream* stream) {
    CONTEXT;
    return wait(stream);
}

API cuStreamQuery(Stream* stream) {
    CONTEXT;
    std::lock_guard<std::mutex> lock(stream->mutex);
    if (stream->capture) return CAPTURE_UNSUPPORTED;
    stream->wanted = true;
    stream->changed.notify_all();
    return stream->work.empty() && !stream->busy ? SUCCESS : NOT_READY;
}

API cuStreamBeginCapture_v2(Stream* stream, int) {
    CONTEXT;
    std::lock_guard<std::mutex> lock(stream->mutex);
    if (stream->capture) return INVALID_VALUE;
    stream->capture = std::make_unique<Graph>();
    stream->capturer = std::this_thread::get_id();
    return SUCCESS;
}

API cuStreamEndCapture(Stream* stream, Graph** graph) {
    CONTEXT;
    std::lock_guard<std::mutex> lock(stream->mutex);
    if (!stream->capture) return INVALID_VALUE;
    *graph = stream->capture.release();
    return SUCCESS;
}

API cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
    CONTEXT;
    *executable = new Graph(*graph);
    return SUCCESS;
}

API cuGraphDestroy(Graph* graph) {
    delete graph;
    return SUCCESS;
}

API cuGraphExecDestroy(Graph* graph) {
    CONTEXT;
    wait_for_all();
    delete graph;
    return SUCCESS;
}

API cuGraphLaunch(Graph* graph, Stream* stream) {
    CONTEXT;
    enqueue(stream, [graph] {
        for (auto& work : *graph) work();
    });
    return SUCCESS;
}

// The image is not looked at: the kernels are in this library.
API cuModuleLoadData(void** module, const void*) {
    CONTEXT;
    *module = new char;
    return SUCCESS;
}

API cuModuleUnload(void* module) {
    CONTEXT;
    delete static_cast<char*>(module);
    return SUCCESS;
}

API cuModuleGetFunction(const Kernel** function, void*, const char* name) {
    CONTEXT;
    *function = find_kernel(name);
    return *function ? SUCCESS : NOT_FOUND;
}

static std::map<const Kernel*, int>& room = *new std::map<const Kernel*, int>;
static std::mutex room_mutex;

API cuFuncSetAttribute(const Kernel* function, int attribute, int value) {
    CONTEXT;
    if (attribute != 8 || value > (227 << 10)) return INVALID_VALUE;
    std::lock_guard<std::mutex> lock(room_mutex);
    room[function] = value;
    return SUCCESS;
}

struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    Stream* stream;
    void* attributes;
    unsigned count;
};

API cuLaunchKernelEx(const LaunchConfig* config, const Kernel* function, void** arguments, void** extra) {
    CONTEXT;
    if (!config->stream || extra) return INVALID_VALUE;
    size_t threads = size_t(config->block[0]) * config->block[1] * config->block[2];
    bool empty = !config->grid[0] || !config->grid[1] || !config->grid[2] || !threads;
    if (empty || threads > 1024 || config->grid[1] > 65535 || config->grid[2] > 65535) return INVALID_VALUE;
    {
        std::lock_guard<std::mutex> lock(room_mutex);
        auto found = room.find(function);
        if (config->shared > unsigned(found == room.end() ? 48 << 10 : found->second)) return INVALID_VALUE;
    }
    const char* from = static_cast<const char*>(arguments[0]);
    std::vector<char> copied(from, from + function->bytes);
    LaunchConfig c = *config;
    enqueue(config->stream, [function, c, copied] {
        alignas(16) char own[1024];
        if (function->bytes > sizeof own) abort();
        memcpy(own, copied.data(), function->bytes);
        run({function, {c.grid[0], c.grid[1], c.grid[2]}, {c.block[0], c.block[1], c.block[2]}, c.shared, own});
    });
    return SUCCESS;
}

// Events outlive their handles: work that records one may still be on a stream.
typedef std::shared_ptr<Event> Shared;

API cuEventCreate(Shared** event, unsigned) {
    CONTEXT;
    *event = new Shared(std::make_shared<Event>());
    return SUCCESS;
}

API cuEventDestroy_v2(Shared* event) {
    CONTEXT;
    delete event;
    return SUCCESS;
}

API cuEventRecord(Shared* handle, Stream* stream) {
    CONTEXT;
    if (capturing(stream)) return CAPTURE_UNSUPPORTED;
    Shared event = *handle;
    std::lock_guard<std::mutex> lock(event->mutex);
    event->stream = stream;
    uint64_t number = ++event->recorded;
    enqueue(stream, [=] {
        std::lock_guard<std::mutex> lock(event->mutex);
        event->reached = number;
        event->when = std::chrono::steady_clock::now();
        event->changed.notify_all();
    });
    return SUCCESS;
}

API cuEventSynchronize(Shared* handle) {
    CONTEXT;
    Shared event = *handle;
    std::unique_lock<std::mutex> lock(event->mutex);
    if (!event->stream) return SUCCESS;
    uint64_t number = event->recorded;
    {
        std::lock_guard<std::mutex> inner(event->stream->mutex);
        event->stream->wanted = true;
        event->stream->changed.notify_all();
    }
    event->changed.wait(lock, [&] { return event->reached >= number; });
    return SUCCESS;
}

API cuEventElapsedTime_v2(float* milliseconds, Shared* start, Shared* end) {
    CONTEXT;
    *milliseconds = std::chrono::duration<float, std::milli>((*end)->when - (*start)->when).count();
    return SUCCESS;
}

API cuIpcGetMemHandle(Handle* handle, uint64_t at) {
    CONTEXT;
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto found = memory.find(at);
    if (found == memory.end() || found->second.fd < 0) return INVALID_VALUE;
    struct stat status;
    fstat(found->second.fd, &status);
    memset(handle, 0, sizeof *handle);
    memcpy(handle->magic, "gpu-dbl", 8);
    handle->pid = getpid();
    handle->fd = found->second.fd;
    handle->bytes = found->second.bytes;
    handle->offset = found->second.offset;
    handle->inode = status.st_ino;
    return SUCCESS;
}

API cuIpcOpenMemHandle_v2(uint64_t* at, Handle handle, unsigned) {
    CONTEXT;
    // As where another GPU's memory cannot be reached.
    if (memcmp(handle.magic, "gpu-dbl", 8) || setting("BATON_DOUBLE_NO_IPC", 0)) return INVALID_VALUE;
    // As the driver has it: only in another process.
    if (handle.pid == getpid()) return INVALID_CONTEXT;
    std::string path = "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.fd);
    int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) return INVALID_HANDLE;
    struct stat status;
    int error = fstat(fd, &status) || status.st_ino != handle.inode
                    ? INVALID_HANDLE
                    : map(fd, handle.bytes, handle.offset, current->device, false, at);
    close(fd);
    return error;
}

API cuIpcCloseMemHandle(uint64_t at) {
    CONTEXT;
    wait_for_all();
    return unmap(at, false);
}
