// libcuda.so: the driver's functions that Baton calls.
//
// Device memory is in memory.cpp; here is the rest. Streams are lazy: nothing runs before somebody waits for it or asks, so that what forgets to wait reads what was
// there before. A capture keeps the work for the graph. Every call checks that the thread has a
// context, which is what is forgotten most easily.


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

#include "inside.h"
#include "runtime.h"

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


bool initialized = false;
thread_local Context* current = nullptr;
Context contexts[MOST_DEVICES];

int devices() { return std::min<size_t>(setting("BATON_DOUBLE_DEVICES", 1), MOST_DEVICES); }
std::mutex streams_mutex;
// Shared: one thread may wait for all of them while another destroys one.
// Never destroyed: at the process's end their threads may still run.
std::vector<std::shared_ptr<Stream>>& streams = *new std::vector<std::shared_ptr<Stream>>;

bool capturing(Stream* stream) {
    std::lock_guard<std::mutex> lock(stream->mutex);
    return bool(stream->capture);
}

struct Event {
    std::mutex mutex;
    std::condition_variable changed;
    Stream* stream = nullptr;
    uint64_t recorded = 0, reached = 0;
    std::chrono::steady_clock::time_point when;
};

}  // namespace

size_t setting(const char* name, size_t otherwise) {
    const char* value = getenv(name);
    return value ? strtoull(value, nullptr, 10) : otherwise;
}

int no_context() { return !initialized ? NOT_INITIALIZED : !current ? INVALID_CONTEXT : SUCCESS; }

int current_device() { return current->device; }

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

void enqueue(Stream* stream, std::function<void()> work) {
    std::lock_guard<std::mutex> lock(stream->mutex);
    if (stream->capture) stream->capture->push_back(std::move(work));
    else stream->work.push_back(std::move(work));
    stream->changed.notify_all();
}

void parallel(size_t count, const std::function<void(size_t)>& work) { in_parallel(count, work); }

}  // namespace gpu_double

using namespace gpu_double;

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
