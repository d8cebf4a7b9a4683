//! Ports for programs that must know theirs beforehand.

use std::fs::{self, File};
use std::net::TcpListener;
use std::sync::Mutex;

use crate::binaries::build_dir;

/// Below the range that the kernel gives to outgoing connections and to port 0, so that nobody
/// takes a port of ours while its owner is down for a while.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// Locks of the ports given out, held until this process ends: no other test gets them.
static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// A port that is free now, and that no other test is given.
pub fn free() -> u16 {
    let locks = build_dir().join("test-ports");
    fs::create_dir_all(&locks).expect("create the folder of locks");
    (0..1000)
        .map(|_| rand::random_range(RANGE))
        .find(|port| {
            let lock = File::create(locks.join(port.to_string())).expect("create a lock");
            let ours = lock.try_lock().is_ok();
            let free = ours && TcpListener::bind(("127.0.0.1", *port)).is_ok();
            if free {
                HELD.lock().expect("the list of locks").push(lock);
            }
            free
        })
        .expect("a free port")
}
