"""A network link between this network namespace and a new one, that can be slow, lossy or cut.

Two TUN devices, one in each namespace, with this program as the wire between them: every packet
goes through it. It is what `tc qdisc ... netem` does, for kernels that are built without netem.

    link.py NAME NEAR_ADDRESS FAR_ADDRESS

NAME names the namespace and, with -n and -f added, the devices; the addresses are the ends of the
link. Prints `ready` when packets pass. Commands on stdin, one a line: `delay MS LOSS` (each packet
from near to far waits MS milliseconds, and of a hundred LOSS are lost), `cut`, `heal`. Ends, and
removes the namespace, when stdin ends. Needs root.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
# Packets that wait for their time: more are dropped, as by a full queue of a router.
QUEUE = 10_000
MTU = 1500


def tun(name: str) -> int:
    """A TUN device of this name in the namespace that this thread is in."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def enter(path: str) -> None:
    """Moves this thread to a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path) as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {path}")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def up(name: str, own: str, peer: str, *where: str) -> None:
    ip(*where, "address", "add", own, "peer", peer, "dev", name)
    ip(*where, "link", "set", name, "mtu", str(MTU), "up")


def forward(near: int, far: int) -> None:
    """Carries packets until stdin ends."""
    delay, loss, cut = 0.0, 0.0, False
    waiting: list[tuple[float, int, bytes]] = []
    number = 0
    commands = b""
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([near, far, 0], [], [], wait)
        for source in readable:
            if source == 0:
                read = os.read(0, 4096)
                if not read:
                    return
                *lines, commands = (commands + read).split(b"\n")
                for line in lines:
                    match line.decode().split():
                        case ["delay", milliseconds, percent]:
                            delay, loss = float(milliseconds) / 1000, float(percent) / 100
                        case ["cut"]:
                            cut = True
                        case ["heal"]:
                            delay, loss, cut = 0.0, 0.0, False
                        case other:
                            sys.exit(f"no such command: {other}")
                continue
            for _ in range(64):
                try:
                    packet = os.read(source, MTU + 64)
                except BlockingIOError:
                    break
                lost = source == near and random.random() < loss
                if cut or lost or len(waiting) >= QUEUE:
                    continue
                late = delay if source == near else 0.0
                number += 1
                heapq.heappush(waiting, (time.monotonic() + late, number, (source, packet)))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, (source, packet) = heapq.heappop(waiting)
            try:
                os.write(far if source == near else near, packet)
            except OSError:
                pass  # The device's queue is full: lost, as on any wire.


def main() -> None:
    name, near_address, far_address = sys.argv[1:]
    ip("netns", "add", name)
    try:
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        near = tun(f"{name}-n")
        up(f"{name}-n", near_address, far_address)
        enter(f"/var/run/netns/{name}")
        far = tun(f"{name}-f")
        enter(f"/proc/self/fd/{home}")
        inside = ("-n", name)
        ip(*inside, "link", "set", "lo", "up")
        up(f"{name}-f", far_address, near_address, *inside)
        print("ready", flush=True)
        forward(near, far)
    finally:
        ip("netns", "delete", name)


main()
