//! A link to a process on another host, through NCCL.
//!
//! NCCL's own waiting has no end: a peer that died leaves a kernel on the device that waits for ever.
//! So communicators are made not to block, every wait here is a poll with a deadline, and what fails
//! aborts the communicator, which ends the kernel. Two ranks of a link cannot be on one GPU: NCCL
//! refuses that, and CUDA IPC is for it.

use std::os::raw::c_int;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys;

use crate::driver::Stream;
use crate::{Device, Error, KvMemory};

/// Bytes of what the two ends of a link meet by.
pub const ID_BYTES: usize = 128;

/// `NCCL_CONFIG_UNDEF_INT`: a setting that NCCL chooses.
const UNDEFINED: c_int = c_int::MIN;
/// `NCCL_VERSION_CODE` of the header that `sys` was made of: 2.30.
const VERSION: u32 = 23_000;
/// How long a link that is dropped waits for what it has sent to arrive.
const FAREWELL: Duration = Duration::from_secs(1);
/// Blocks that are sent in one group.
const GROUP: usize = 128;

fn check(call: &'static str, result: sys::ncclResult_t) -> Result<(), Error> {
    if result == sys::ncclResult_t::ncclSuccess || result == sys::ncclResult_t::ncclInProgress {
        return Ok(());
    }
    // SAFETY: NCCL returns a string that lives as long as the process.
    let reason = unsafe { std::ffi::CStr::from_ptr(sys::ncclGetErrorString(result)) };
    Err(Error::Nccl { call, reason: reason.to_string_lossy().into_owned() })
}

/// Whether NCCL can be loaded: `libnccl.so`, by this name.
pub fn present() -> bool {
    // SAFETY: loads the library, whose initialization takes no arguments.
    unsafe { sys::is_culib_present() }
}

/// A new meeting point. Made at one end, told to the other.
pub fn unique_id() -> Result<[u8; ID_BYTES], Error> {
    if !present() {
        return Err(Error::Library("libnccl.so"));
    }
    let mut id = sys::ncclUniqueId { internal: [0; ID_BYTES] };
    // SAFETY: NCCL writes the id.
    check("ncclGetUniqueId", unsafe { sys::ncclGetUniqueId(&mut id) })?;
    Ok(id.internal.map(|byte| byte as u8))
}

/// A communicator, which NCCL wants to be used by one thread at a time.
struct Communicator(sys::ncclComm_t);

// SAFETY: used under a lock.
unsafe impl Send for Communicator {}

/// A link of two processes; carries one hand-off at a time, in either direction.
///
/// Every call that waits for the peer ends with an error when [`Link::abort`] is called from
/// another thread, or when its deadline is over. After an error the link is of no use any more.
pub struct Link {
    /// `None` after an abort.
    communicator: Mutex<Option<Communicator>>,
    stream: Stream,
    peer: c_int,
    aborted: AtomicBool,
    /// Held by the hand-off in progress.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Link {
    /// Meets the peer: one end has rank 0, the other 1.
    pub fn connect(
        device: &Arc<Device>,
        rank: usize,
        id: &[u8; ID_BYTES],
        deadline: Instant,
    ) -> Result<Self, Error> {
        if rank > 1 {
            return Err(Error::Mismatch(format!("rank {rank} of two")));
        }
        if !present() {
            return Err(Error::Library("libnccl.so"));
        }
        let stream = Stream::new(device)?;
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as _) };
        let mut config = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: 0xcafe_beef,
            version: VERSION,
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            // A hand-off runs beside the forward pass: it must leave it the multiprocessors.
            maxCTAs: 4,
            netName: std::ptr::null(),
            splitShare: UNDEFINED,
            trafficClass: UNDEFINED,
            commName: std::ptr::null(),
            collnetEnable: UNDEFINED,
            CTAPolicy: UNDEFINED,
            shrinkShare: UNDEFINED,
            nvlsCTAs: UNDEFINED,
            nChannelsPerNetPeer: UNDEFINED,
            nvlinkCentricSched: UNDEFINED,
            graphUsageMode: UNDEFINED,
            numRmaCtx: UNDEFINED,
            maxP2pPeers: UNDEFINED,
        };
        let mut raw = null_mut();
        device.bind()?;
        // SAFETY: NCCL reads the configuration and writes the handle.
        check("ncclCommInitRankConfig", unsafe {
            sys::ncclCommInitRankConfig(&mut raw, 2, id, rank as c_int, &mut config)
        })?;
        let link = Self {
            communicator: Mutex::new(Some(Communicator(raw))),
            stream,
            peer: 1 - rank as c_int,
            aborted: AtomicBool::new(false),
            turn: Mutex::default(),
        };
        link.settle("ncclCommInitRankConfig", deadline, || Ok(true))?;
        Ok(link)
    }

    /// Sends blocks; returns when they have left.
    pub fn send(&self, kv: &KvMemory, blocks: &[u32], deadline: Instant) -> Result<(), Error> {
        self.hand_off("ncclSend", kv, blocks, deadline, |at, bytes, communicator, stream| {
            // SAFETY: the address is of one block, which lives until the stream is idle.
            unsafe { sys::ncclSend(at.cast_const(), bytes, BYTES, self.peer, communicator, stream) }
        })
    }

    /// Receives as many blocks as the peer sends, into these; returns when they are complete. After an
    /// error their contents are undefined, and nothing writes them any more.
    pub fn receive(&self, kv: &KvMemory, blocks: &[u32], deadline: Instant) -> Result<(), Error> {
        self.hand_off("ncclRecv", kv, blocks, deadline, |at, bytes, communicator, stream| {
            // SAFETY: as above.
            unsafe { sys::ncclRecv(at, bytes, BYTES, self.peer, communicator, stream) }
        })
    }

    /// Makes the call in progress, and all later ones, fail. From any thread.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
    }

    fn hand_off(
        &self,
        call: &'static str,
        kv: &KvMemory,
        blocks: &[u32],
        deadline: Instant,
        put: impl Fn(
            *mut std::ffi::c_void,
            usize,
            sys::ncclComm_t,
            sys::cudaStream_t,
        ) -> sys::ncclResult_t,
    ) -> Result<(), Error> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // Before anything is put on the stream: a block that is out of range, or a link that is gone.
        let at = blocks.iter().map(|block| kv.address(*block)).collect::<Result<Vec<_>, _>>()?;
        for group in at.chunks(GROUP) {
            let put = self.with(|communicator| {
                self.stream.device().bind()?;
                // SAFETY: groups are a thread's own; ended below whatever comes between.
                check("ncclGroupStart", unsafe { sys::ncclGroupStart() })?;
                let put = group.iter().try_for_each(|&at| {
                    let stream = self.stream.raw.cast();
                    check(call, put(at as *mut _, kv.block_bytes(), communicator, stream))
                });
                // SAFETY: begun above.
                let ended = check("ncclGroupEnd", unsafe { sys::ncclGroupEnd() });
                put.and(ended)
            });
            if let Err(error) = put {
                self.end();
                return Err(error);
            }
            self.settle(call, deadline, || self.stream.is_idle())?;
        }
        Ok(())
    }

    /// Waits until NCCL has nothing in progress and `done` says so; on an error, the deadline's end or
    /// an abort it ends the communicator.
    fn settle(
        &self,
        call: &'static str,
        deadline: Instant,
        done: impl Fn() -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let failed = |reason: &str| Error::Nccl { call, reason: reason.to_owned() };
        let mut pause = Duration::from_micros(20);
        let waited = loop {
            let state = self.with(|communicator| {
                let mut state = sys::ncclResult_t::ncclSuccess;
                // SAFETY: the communicator lives; NCCL writes its state.
                check("ncclCommGetAsyncError", unsafe {
                    sys::ncclCommGetAsyncError(communicator, &mut state)
                })?;
                check(call, state)?;
                Ok(state == sys::ncclResult_t::ncclSuccess)
            });
            match state {
                Err(error) => break Err(error),
                Ok(true) => match done() {
                    Ok(true) => break Ok(()),
                    Ok(false) => {}
                    Err(error) => break Err(error),
                },
                Ok(false) => {}
            }
            if self.aborted.load(Ordering::Acquire) {
                break Err(failed("aborted"));
            }
            if Instant::now() >= deadline {
                break Err(failed("the deadline is over"));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        };
        if waited.is_err() {
            self.end();
        }
        waited
    }

    fn with<T>(&self, work: impl FnOnce(sys::ncclComm_t) -> Result<T, Error>) -> Result<T, Error> {
        let communicator = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        match &*communicator {
            Some(Communicator(raw)) if !self.aborted.load(Ordering::Acquire) => work(*raw),
            _ => Err(Error::Nccl { call: "link", reason: "aborted".into() }),
        }
    }

    /// Ends the communicator, and with it what it has on the stream.
    fn end(&self) {
        self.aborted.store(true, Ordering::Release);
        let communicator = self.communicator.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Communicator(raw)) = communicator {
            // SAFETY: made by `connect`, and taken: nobody uses it any more.
            let _ = unsafe { sys::ncclCommAbort(raw) };
            // What it had there ends now; blocks are written no more when this returns.
            let _ = self.stream.synchronize();
        }
    }
}

/// Blocks go as bytes.
const BYTES: sys::ncclDataType_t = sys::ncclDataType_t::ncclInt8;

impl Drop for Link {
    fn drop(&mut self) {
        if self.stream.device().bind().is_err() {
            return;
        }
        // What was sent may still be on its way from NCCL's own buffers: an abort would lose it.
        let begun = self.with(|communicator| {
            // SAFETY: the communicator lives.
            check("ncclCommFinalize", unsafe { sys::ncclCommFinalize(communicator) })
        });
        let soon = Instant::now() + FAREWELL;
        let ended = begun.and_then(|()| self.settle("ncclCommFinalize", soon, || Ok(true)));
        let communicator =
            self.communicator.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Communicator(raw)) = communicator {
            // SAFETY: made by `connect`, and taken: nobody uses it any more.
            let _ = unsafe {
                match ended {
                    Ok(()) => sys::ncclCommDestroy(raw),
                    Err(_) => sys::ncclCommAbort(raw),
                }
            };
        }
    }
}
