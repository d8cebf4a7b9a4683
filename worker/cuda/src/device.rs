//! A GPU that was opened.

use std::ffi::CString;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;
use sys::CUdevice_attribute as Attribute;

use crate::Error;
use crate::driver::check;

/// The kernels, as PTX and as machine code for compute capability 9.0.
const IMAGES: [(&[u8], &[u8]); 4] = {
    macro_rules! image {
        ($name:literal) => {
            (
                include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".ptx")),
                include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".cubin")),
            )
        };
    }
    [
        image!("decode_attention"),
        image!("elementwise"),
        image!("narrow"),
        image!("prefill_attention"),
    ]
};

/// Whether there is a driver and at least one device.
pub fn present() -> bool {
    devices().is_ok()
}

/// How many devices there are, at least one.
fn devices() -> Result<i32, Error> {
    // SAFETY: loads the driver's library, whose initialization takes no arguments.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Absent("libcuda is not on the library path".into()));
    }
    let absent = |error: Error| Error::Absent(error.to_string());
    // SAFETY: to be called first, with zero; more than once is no error.
    check("cuInit", unsafe { sys::cuInit(0) }).map_err(absent)?;
    let mut count = 0;
    // SAFETY: the driver writes the number.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) }).map_err(absent)?;
    match count {
        0 => Err(Error::Absent("the driver has no device".into())),
        count => Ok(count),
    }
}

/// Whether the process sees the device with this [`Device::uuid`], whichever it has opened.
pub fn visible(uuid: &[u8; 16]) -> bool {
    let Ok(count) = devices() else { return false };
    (0..count).any(|ordinal| {
        let (mut raw, mut own) = (0, sys::CUuuid { bytes: [0; 16] });
        // SAFETY: the driver writes the handle.
        let found = check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut raw, ordinal) });
        let known = found.and_then(|()| {
            // SAFETY: the driver writes 16 bytes.
            check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&mut own, raw) })
        });
        known.is_ok() && own.bytes.map(|byte| byte as u8) == *uuid
    })
}

/// A GPU. Can be used from any thread.
pub struct Device {
    raw: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    multiprocessors: u32,
    /// Whether the kernels are machine code for it, not PTX for all GPUs.
    native: bool,
    uuid: [u8; 16],
}

// SAFETY: the driver's functions may be called from any thread; `context` is made current in each.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("raw", &self.raw).finish_non_exhaustive()
    }
}

/// A kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(pub(crate) sys::CUfunction);

// SAFETY: a handle that lives as long as the device.
unsafe impl Send for Function {}

impl Device {
    /// Opens a GPU by its ordinal among those that the process sees.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, Error> {
        let count = devices()?;
        let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
        if ordinal >= count {
            return Err(Error::Absent(format!("device {ordinal} of {count}")));
        }
        let mut raw = 0;
        // SAFETY: the driver writes the handle.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut raw, ordinal) })?;
        let attribute = |attribute: Attribute| {
            let mut value = 0;
            // SAFETY: the driver writes the number.
            check("cuDeviceGetAttribute", unsafe {
                sys::cuDeviceGetAttribute(&mut value, attribute, raw)
            })
            .map(|()| value)
        };
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < (8, 0) {
            return Err(Error::Unsupported(format!(
                "a GPU of compute capability {}.{} (at least 8.0: bf16)",
                capability.0, capability.1
            )));
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the driver writes 16 bytes.
        check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, raw) })?;
        let mut context = null_mut();
        // SAFETY: the driver writes the handle; given back on drop.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, raw)
        })?;
        let mut device = Self {
            raw,
            context,
            modules: Vec::new(),
            multiprocessors: multiprocessors.max(1) as u32,
            native: capability == (9, 0) && IMAGES.iter().all(|(_, cubin)| !cubin.is_empty()),
            uuid: uuid.bytes.map(|byte| byte as u8),
        };
        device.bind()?;
        for (ptx, cubin) in IMAGES {
            let image = if device.native { cubin } else { ptx };
            let mut module = null_mut();
            // SAFETY: machine code, or PTX that ends in zero; the driver writes the handle.
            check("cuModuleLoadData", unsafe {
                sys::cuModuleLoadData(&mut module, image.as_ptr().cast())
            })?;
            device.modules.push(module);
        }
        Ok(Arc::new(device))
    }

    /// Its name, such as `NVIDIA H200`.
    pub fn name(&self) -> String {
        let mut name = [0u8; 128];
        // SAFETY: the driver writes a string of at most that many bytes, zero included.
        let got = unsafe {
            sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32 - 1, self.raw)
        };
        match check("cuDeviceGetName", got) {
            Ok(()) => String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or(&[]))
                .into_owned(),
            Err(_) => "an unnamed device".to_owned(),
        }
    }

    /// Free and all bytes of its memory.
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes the numbers.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free, total))
    }

    /// What tells it from every other GPU.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Whether a kernel may start before the one before it is complete: it has to wait by itself, and
    /// PTX for GPUs that cannot do that does not.
    pub(crate) fn overlaps(&self) -> bool {
        self.native
    }

    /// Makes it the calling thread's device: before every call of the driver.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        // SAFETY: the context is retained.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// A kernel by its name, with room for `shared` bytes of dynamic shared memory.
    pub(crate) fn function(&self, name: &str, shared: usize) -> Result<Function, Error> {
        self.bind()?;
        let symbol = CString::new(name).map_err(|_| Error::Mismatch(format!("kernel {name:?}")))?;
        for module in &self.modules {
            let mut function = null_mut();
            // SAFETY: the module lives; the driver writes the handle.
            let found =
                unsafe { sys::cuModuleGetFunction(&mut function, *module, symbol.as_ptr()) };
            if found == sys::CUresult::CUDA_ERROR_NOT_FOUND {
                continue;
            }
            check("cuModuleGetFunction", found)?;
            if shared > 0 {
                let room =
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function lives.
                check("cuFuncSetAttribute", unsafe {
                    sys::cuFuncSetAttribute(function, room, shared as i32)
                })?;
            }
            return Ok(Function(function));
        }
        Err(Error::Mismatch(format!("kernel {name} is missing: built with BATON_CUDA_PTX=none?")))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.bind().is_ok() {
            for module in &self.modules {
                // SAFETY: loaded in `open`; functions of it are held by what holds the device.
                let _ = unsafe { sys::cuModuleUnload(*module) };
            }
        }
        // SAFETY: retained in `open`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.raw) };
    }
}
