//! What the driver gives out, each owned by a value that gives it back: memory, streams, events,
//! graphs.

use std::marker::PhantomData;
use std::mem::size_of;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::{Device, Error};

/// A driver call's result, in Rust's way.
pub(crate) fn check(call: &'static str, result: sys::CUresult) -> Result<(), Error> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: the driver writes a pointer to a string that lives as long as the process.
    let known = unsafe { sys::cuGetErrorName(result, &mut name) };
    let name = match known == sys::CUresult::CUDA_SUCCESS && !name.is_null() {
        // SAFETY: as above; it ends in zero.
        true => unsafe { std::ffi::CStr::from_ptr(name) }.to_string_lossy().into_owned(),
        false => "unknown error".to_owned(),
    };
    Err(Error::Driver { call, name, code: result as u32 })
}

/// Types that are the same bytes on host and device, any of which are valid.
///
/// # Safety
/// Without padding, and every pattern of bits is a value.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: numbers, in two bytes.
unsafe impl Plain for half::bf16 {}

/// Device memory. Not initialized.
pub(crate) struct Buffer<T> {
    device: Arc<Device>,
    at: sys::CUdeviceptr,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    pub(crate) fn new(device: &Arc<Device>, len: usize, what: &'static str) -> Result<Self, Error> {
        device.bind()?;
        let wanted = (len * size_of::<T>()).max(1);
        let mut at = 0;
        // SAFETY: the driver writes the address.
        let result = unsafe { sys::cuMemAlloc_v2(&mut at, wanted) };
        if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::Memory { what, wanted, free: device.memory()?.0 });
        }
        check("cuMemAlloc", result)?;
        Ok(Self { device: device.clone(), at, len, of: PhantomData })
    }

    /// Memory with these values in it.
    pub(crate) fn of(stream: &Stream, values: &[T], what: &'static str) -> Result<Self, Error> {
        let buffer = Self::new(&stream.device, values.len(), what)?;
        buffer.fill_from(stream, 0, values)?;
        Ok(buffer)
    }

    /// Copies `values` to where element `first` is, and waits.
    pub(crate) fn fill_from(
        &self,
        stream: &Stream,
        first: usize,
        values: &[T],
    ) -> Result<(), Error> {
        // SAFETY: waited for while `values` are borrowed.
        unsafe { self.copy_from(stream, first, values) }?;
        stream.synchronize()
    }

    /// Copies `values` to where element `first` is. Not complete when it returns.
    ///
    /// # Safety
    /// The caller keeps `values` as they are until the stream is synchronized.
    pub(crate) unsafe fn copy_from(
        &self,
        stream: &Stream,
        first: usize,
        values: &[T],
    ) -> Result<(), Error> {
        assert!(first + values.len() <= self.len, "a copy beyond its buffer");
        if values.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let bytes = size_of_val(values);
        // SAFETY: both ranges are as long, by the assert; the source outlives the copy by the
        // caller's promise.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.address(first),
                values.as_ptr().cast(),
                bytes,
                stream.raw,
            )
        })
    }

    /// Copies elements from `first` on to `values`. Not complete when it returns.
    ///
    /// # Safety
    /// Nobody touches `values` until the stream is synchronized.
    pub(crate) unsafe fn copy_to(
        &self,
        stream: &Stream,
        first: usize,
        values: &mut [T],
    ) -> Result<(), Error> {
        assert!(first + values.len() <= self.len, "a copy beyond its buffer");
        if values.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let bytes = size_of_val(values);
        // SAFETY: as in `copy_from`.
        check("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                values.as_mut_ptr().cast(),
                self.address(first),
                bytes,
                stream.raw,
            )
        })
    }

    /// Sets all bytes to zero, and waits.
    pub(crate) fn zero(&self, stream: &Stream) -> Result<(), Error> {
        if self.len == 0 {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the range is this buffer's.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(self.at, 0, self.len * size_of::<T>(), stream.raw)
        })?;
        stream.synchronize()
    }

    /// Where element `i` is.
    pub(crate) fn address(&self, i: usize) -> u64 {
        self.at + (i * size_of::<T>()) as u64
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `new`, and nothing refers to it any more: what was put on streams
            // with it is waited for by the driver.
            let _ = unsafe { sys::cuMemFree_v2(self.at) };
        }
    }
}

/// Host memory that the device copies from and to by itself.
pub(crate) struct Pinned<T> {
    device: Arc<Device>,
    at: *mut T,
    len: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl<T: Plain> Send for Pinned<T> {}

impl<T: Plain> Pinned<T> {
    pub(crate) fn new(device: &Arc<Device>, len: usize) -> Result<Self, Error> {
        device.bind()?;
        let mut at = null_mut();
        // SAFETY: the driver writes the address.
        check("cuMemHostAlloc", unsafe {
            sys::cuMemHostAlloc(&mut at, (len * size_of::<T>()).max(1), 0)
        })?;
        let at = at.cast::<T>();
        // SAFETY: `len` elements were allocated; zeros are a value of a plain type.
        unsafe { at.write_bytes(0, len) };
        Ok(Self { device: device.clone(), at, len })
    }
}

impl<T> std::ops::Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: allocated and initialized in `new`.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }
}

impl<T> std::ops::DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `new`.
            let _ = unsafe { sys::cuMemFreeHost(self.at.cast()) };
        }
    }
}

/// A queue of work for the device. Does not wait for other streams, nor they for it.
pub(crate) struct Stream {
    device: Arc<Device>,
    pub(crate) raw: sys::CUstream,
}

// SAFETY: the driver's functions may be called with a stream from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, Error> {
        device.bind()?;
        let mut raw = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the driver writes the handle.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, flags) })?;
        Ok(Self { device: device.clone(), raw })
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Waits for all that was put on it.
    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        self.device.bind()?;
        // SAFETY: the stream lives.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) })
    }

    /// Whether all that was put on it is complete.
    #[cfg(feature = "nccl")]
    pub(crate) fn is_idle(&self) -> Result<bool, Error> {
        self.device.bind()?;
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuStreamQuery", result).map(|()| true),
        }
    }

    /// Makes a graph of what `work` puts on the stream, instead of running it.
    pub(crate) fn capture(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        self.device.bind()?;
        // What other threads do meanwhile (allocating, copying blocks) is none of the capture's.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.raw, mode) })?;
        let done = work();
        let mut graph = null_mut();
        // SAFETY: the driver writes the handle. Ended whatever came of the work, since the stream
        // is of no use before.
        let ended = unsafe { sys::cuStreamEndCapture(self.raw, &mut graph) };
        let made = done.and_then(|()| check("cuStreamEndCapture", ended)).and_then(|()| {
            let mut executable = null_mut();
            // SAFETY: the graph was made above; the driver writes the handle.
            check("cuGraphInstantiate", unsafe {
                sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0)
            })?;
            Ok(Graph { device: self.device.clone(), raw: executable })
        });
        if !graph.is_null() {
            // SAFETY: made above; the executable does not need it.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        made
    }

    pub(crate) fn launch(&self, graph: &Graph) -> Result<(), Error> {
        self.device.bind()?;
        // SAFETY: both live.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.raw, self.raw) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: the stream lives; what is on it refers to buffers that may be freed next.
            let _ = unsafe { sys::cuStreamSynchronize(self.raw) };
            // SAFETY: made by `new`.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// Work that is launched as a whole. Refers to the memory that it was captured with.
pub(crate) struct Graph {
    device: Arc<Device>,
    raw: sys::CUgraphExec,
}

// SAFETY: used by one thread at a time, whichever.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `Stream::capture`.
            let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
        }
    }
}

/// A point in a stream.
pub(crate) struct Event {
    device: Arc<Device>,
    raw: sys::CUevent,
}

// SAFETY: the driver's functions may be called with an event from any thread.
unsafe impl Send for Event {}

impl Event {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, Error> {
        device.bind()?;
        let mut raw = null_mut();
        // SAFETY: the driver writes the handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, 0) })?;
        Ok(Self { device: device.clone(), raw })
    }

    pub(crate) fn record(&self, stream: &Stream) -> Result<(), Error> {
        self.device.bind()?;
        // SAFETY: both live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, stream.raw) })
    }

    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        self.device.bind()?;
        // SAFETY: the event lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }

    /// Seconds of the device between two events that were reached.
    pub(crate) fn since(&self, start: &Self) -> Result<f64, Error> {
        self.device.bind()?;
        let mut milliseconds = 0.0;
        // SAFETY: both live; the driver writes the number.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime_v2(&mut milliseconds, start.raw, self.raw)
        })?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `new`.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}
