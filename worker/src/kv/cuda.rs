//! KV blocks in a GPU's memory.

use std::sync::Arc;

use baton_cuda::{Device, Error, KvMemory, Shape};

use super::BlockId;
use super::pool::{DeviceError, DeviceMemory};

/// The blocks of a pool, all in one range of a GPU's memory.
pub struct CudaBlocks {
    device: Arc<Device>,
    memory: Arc<KvMemory>,
    shape: Shape,
}

impl CudaBlocks {
    /// Allocates so many blocks.
    pub(crate) fn new(device: Arc<Device>, shape: Shape, blocks: usize) -> Result<Self, Error> {
        let memory = KvMemory::new(&device, &shape, blocks)?;
        Ok(Self { device, memory, shape })
    }

    /// A few more blocks beside them, for what is on its way.
    #[cfg(feature = "nccl")]
    pub(crate) fn aside(&self, blocks: usize) -> Result<Arc<KvMemory>, Error> {
        KvMemory::new(&self.device, &self.shape, blocks)
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Its memory.
    pub fn memory(&self) -> &Arc<KvMemory> {
        &self.memory
    }
}

impl DeviceMemory for CudaBlocks {
    fn read(&self, block: BlockId, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.memory.read(block, bytes).map_err(failed)
    }

    fn write(&self, block: BlockId, bytes: &[u8]) -> Result<(), DeviceError> {
        self.memory.write(block, bytes).map_err(failed)
    }
}

/// A failure, for those who do not care which.
pub(crate) fn failed(error: Error) -> DeviceError {
    DeviceError(error.to_string())
}
