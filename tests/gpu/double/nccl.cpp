// libnccl.so: two processes send each other device memory, over a socket that the unique id names.
//
// Communicators do not block, as Baton asks for them: connecting goes on in the background, and what
// is sent or received goes on on the stream. As with the real one, a peer's death does not end what is
// on the stream: it shows in `ncclCommGetAsyncError`, and the stream comes free by `ncclCommAbort`.

#include <fcntl.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "driver.h"

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

struct Id {
    char bytes[128];
};

struct Communicator {
    int rank;
    int fd = -1;
    std::atomic<int> state{IN_PROGRESS};
    std::atomic<bool> aborted{false};
    std::atomic<int> running{0};
    std::thread connecting;

    void fail() {
        int expected = SUCCESS;
        if (!state.compare_exchange_strong(expected, REMOTE_ERROR)) state = REMOTE_ERROR;
    }

    // Waits until the socket is ready; false when the communicator was aborted.
    bool ready(short events) {
        while (!aborted) {
            pollfd p{fd, events, 0};
            if (poll(&p, 1, 20) > 0) return true;
        }
        return false;
    }

    void move(char* at, size_t bytes, bool sends) {
        running++;
        while (bytes && state == SUCCESS && ready(sends ? POLLOUT : POLLIN)) {
            ssize_t done = sends ? send(fd, at, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) : recv(fd, at, bytes, MSG_DONTWAIT);
            if (done > 0) {
                at += done;
                bytes -= done;
            } else if (done == 0 || (errno != EAGAIN && errno != EINTR)) {
                fail();
            }
        }
        // What cannot go on hangs.
        while (bytes && !aborted) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        running--;
    }
};

void address(const Id& id, sockaddr_un& to, socklen_t& length) {
    memset(&to, 0, sizeof to);
    to.sun_family = AF_UNIX;
    memcpy(to.sun_path + 1, "baton-nccl-", 11);
    for (int i = 0; i < 16; i++) snprintf(to.sun_path + 12 + 2 * i, 3, "%02x", uint8_t(id.bytes[i]));
    length = offsetof(sockaddr_un, sun_path) + 12 + 32;
}

void meet(Communicator& c, const Id& id) {
    sockaddr_un to;
    socklen_t length;
    address(id, to, length);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c.rank == 0) {
        if (bind(fd, reinterpret_cast<sockaddr*>(&to), length) || listen(fd, 1)) {
            close(fd);
            c.state = SYSTEM_ERROR;
            return;
        }
        c.fd = fd;
        bool came = c.ready(POLLIN);
        c.fd = came ? accept4(fd, nullptr, nullptr, SOCK_CLOEXEC) : -1;
        close(fd);
    } else {
        while (!c.aborted && connect(fd, reinterpret_cast<sockaddr*>(&to), length)) {
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
        c.fd = fd;
    }
    c.state = c.fd < 0 || c.aborted ? SYSTEM_ERROR : SUCCESS;
}

struct Pending {
    gpu_double::Stream* stream;
    std::function<void()> work;
};
thread_local int depth = 0;
thread_local std::vector<Pending> pending;

int add(Communicator* c, void* at, size_t bytes, int type, int peer, gpu_double::Stream* stream, bool sends) {
    // ncclInt8, and the other rank of two.
    if (type != 0 || peer != 1 - c->rank || !stream) return INVALID_ARGUMENT;
    if (c->state != SUCCESS) return c->state;
    auto work = [=] {
        gpu_double::check_range(at, bytes, sends ? "a send" : "a receive");
        c->move(static_cast<char*>(at), bytes, sends);
    };
    if (depth) pending.push_back({stream, work});
    else gpu_double::enqueue(stream, work);
    return SUCCESS;
}

}  // namespace

API ncclGetVersion(int* version) {
    *version = 23007;
    return SUCCESS;
}

API ncclGetUniqueId(Id* id) {
    memset(id, 0, sizeof *id);
    return getrandom(id->bytes, 16, 0) == 16 ? SUCCESS : SYSTEM_ERROR;
}

// The configuration begins with its size, a magic number, the version, and whether calls block.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

API ncclCommInitRankConfig(Communicator** comm, int ranks, Id id, int rank, const Config* config) {
    bool known = config && config->magic == 0xcafebeef && config->blocking == 0;
    if (ranks != 2 || rank < 0 || rank > 1 || !known) return INVALID_ARGUMENT;
    Communicator* c = new Communicator;
    c->rank = rank;
    c->connecting = std::thread([c, id] { meet(*c, id); });
    *comm = c;
    return IN_PROGRESS;
}

API ncclCommGetAsyncError(Communicator* c, int* state) {
    *state = c->state;
    return SUCCESS;
}

API ncclGroupStart() {
    depth++;
    return SUCCESS;
}

API ncclGroupEnd() {
    if (--depth) return SUCCESS;
    for (Pending& p : pending) gpu_double::enqueue(p.stream, p.work);
    pending.clear();
    return SUCCESS;
}

API ncclSend(void* at, size_t count, int type, int peer, Communicator* c, gpu_double::Stream* stream) {
    return add(c, at, count, type, peer, stream, true);
}

API ncclRecv(void* at, size_t count, int type, int peer, Communicator* c, gpu_double::Stream* stream) {
    return add(c, at, count, type, peer, stream, false);
}

static int end(Communicator* c) {
    c->aborted = true;
    if (c->connecting.joinable()) c->connecting.join();
    if (c->fd >= 0) shutdown(c->fd, SHUT_RDWR);
    while (c->running) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    // Never freed: work that was still on a stream finds it aborted.
    c->state = SYSTEM_ERROR;
    return SUCCESS;
}

API ncclCommAbort(Communicator* c) { return end(c); }
API ncclCommFinalize(Communicator*) { return SUCCESS; }
API ncclCommDestroy(Communicator* c) { return end(c); }

extern "C" __attribute__((visibility("default"))) const char* ncclGetErrorString(int error) {
    switch (error) {
        case SUCCESS: return "no error";
        case SYSTEM_ERROR: return "unhandled system error";
        case INVALID_ARGUMENT: return "invalid argument";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        case IN_PROGRESS: return "NCCL operation in progress";
        default: return "unknown result code";
    }
}
