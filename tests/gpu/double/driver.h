// What the double's libraries share: streams, and the driver's types as far as they are needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace gpu_double {

struct Stream;

// Puts work on a stream: it runs when somebody waits for the stream, or asks how far it is; or it is
// kept, where the stream is being captured.
__attribute__((visibility("default"))) void enqueue(Stream* stream, std::function<void()> work);

// Calls `work` for 0..count on all host threads.
__attribute__((visibility("default"))) void parallel(size_t count, const std::function<void(size_t)>& work);

// Ends the process when the range is not in one allocation of device memory.
__attribute__((visibility("default"))) void check_range(const void* at, size_t bytes, const char* what);

}  // namespace gpu_double
