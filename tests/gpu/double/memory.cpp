// libcuda.so: memory, and its way to other processes.
//
// Device memory is a memfd an allocation, mapped between pages that cannot be touched, so that an
// access past its end faults, and a process finds another's through /proc (CUDA IPC).

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "inside.h"

namespace gpu_double {

namespace {

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

std::mutex memory_mutex;
// Never destroyed: at the process's end streams may still run.
std::map<uintptr_t, Allocation>& memory = *new std::map<uintptr_t, Allocation>;
size_t used[MOST_DEVICES] = {};

size_t total_memory() { return setting("BATON_DOUBLE_MEMORY", size_t(16) << 30); }

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

}  // namespace

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

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    CONTEXT;
    std::lock_guard<std::mutex> lock(memory_mutex);
    *total = total_memory();
    *free = *total - std::min(*total, used[current_device()]);
    return SUCCESS;
}

API cuMemAlloc_v2(uint64_t* at, size_t bytes) {
    CONTEXT;
    if (captures()) return CAPTURE_UNSUPPORTED;
    if (bytes == 0) return INVALID_VALUE;
    {
        std::lock_guard<std::mutex> lock(memory_mutex);
        if (used[current_device()] + bytes > total_memory()) return OUT_OF_MEMORY;
    }
    // As near to the end of its last page as an allocation's alignment lets it be.
    size_t whole = (bytes + 255) / 256 * 256, offset = (PAGE - whole % PAGE) % PAGE;
    int fd = memfd_create("baton-gpu-double", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, offset + whole)) return OUT_OF_MEMORY;
    int error = map(fd, bytes, offset, current_device(), true, at);
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
                    : map(fd, handle.bytes, handle.offset, current_device(), false, at);
    close(fd);
    return error;
}

API cuIpcCloseMemHandle(uint64_t at) {
    CONTEXT;
    wait_for_all();
    return unmap(at, false);
}
