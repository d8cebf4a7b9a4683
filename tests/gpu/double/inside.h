// What the parts of libcuda.so share.
#pragma once

#include "driver.h"

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

#define CONTEXT                                   \
    do {                                          \
        if (int error = no_context()) return error; \
    } while (0)

namespace gpu_double {

struct Context {
    int device;
};

constexpr int MOST_DEVICES = 16;

// A number of the environment.
size_t setting(const char* name, size_t otherwise);

// An error, where the driver is not initialized or the thread has no context.
int no_context();
int current_device();

// Whether this thread captures a stream: then it may not wait or allocate.
bool captures();

// Waits until all streams are empty.
void wait_for_all();

}  // namespace gpu_double
