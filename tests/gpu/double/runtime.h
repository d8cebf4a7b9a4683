// The double's inside: kernels by name, and how they are run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace gpu_double {

struct Kernel {
    const char* name;
    void* function;
    size_t bytes;  // of its arguments
    void (*call)(void*, const void*);
};

// Null when there is none of that name.
const Kernel* find_kernel(const char* name);

struct Launch {
    const Kernel* kernel;
    uint32_t grid[3], block[3];
    size_t shared;
    const void* arguments;
};

// Runs a kernel to its end.
void run(const Launch& launch);

// Calls `work` for 0..count on all host threads.
void in_parallel(size_t count, const std::function<void(size_t)>& work);

}  // namespace gpu_double
