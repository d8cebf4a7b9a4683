//! The kernels' arguments, as `kernels/*.cu` declare them, and how many blocks each is given.
//!
//! Addresses are of device memory; the decoder owns all of it for longer than any launch.

use std::ptr::null_mut;

use cudarc::driver::sys;

use crate::device::Function;
use crate::driver::{Stream, check};
use crate::{Device, Error, Shape};

/// `Paged` of `paged.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Paged {
    pub(crate) qkv: u64,
    pub(crate) kv: u64,
    pub(crate) positions: u64,
    pub(crate) tables: u64,
    pub(crate) blocks: u64,
    pub(crate) bias: u64,
    pub(crate) q_norm: u64,
    pub(crate) k_norm: u64,
    pub(crate) angles: u64,
    pub(crate) magic: u64,
    pub(crate) block_size: u32,
    pub(crate) heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) layers: u32,
    pub(crate) layer: u32,
    pub(crate) interleaved: u32,
    pub(crate) eps: f32,
    pub(crate) scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Embed {
    pub(crate) tokens: u64,
    pub(crate) table: u64,
    pub(crate) x: u64,
    pub(crate) hidden: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub(crate) x: u64,
    pub(crate) weight: u64,
    /// 0: rows in their order.
    pub(crate) gather: u64,
    pub(crate) out: u64,
    pub(crate) hidden: u32,
    pub(crate) eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gated {
    pub(crate) pairs: u64,
    pub(crate) out: u64,
    pub(crate) count: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Narrow {
    pub(crate) w: u64,
    pub(crate) x: u64,
    pub(crate) norm: u64,
    pub(crate) out: u64,
    pub(crate) n: u32,
    pub(crate) k: u32,
    pub(crate) rows: u32,
    pub(crate) eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decode {
    pub(crate) paged: Paged,
    /// 0: rows in their order.
    pub(crate) rows: u64,
    pub(crate) out: u64,
    pub(crate) parts: u64,
    pub(crate) counters: u64,
    pub(crate) splits: u32,
    pub(crate) fused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefill {
    pub(crate) paged: Paged,
    pub(crate) tiles: u64,
    pub(crate) out: u64,
}

// The same numbers are in the kernels' sources.
const _: () = {
    assert!(size_of::<Paged>() == 112);
    assert!(size_of::<Embed>() == 32);
    assert!(size_of::<Norm>() == 40);
    assert!(size_of::<Gated>() == 24);
    assert!(size_of::<ReadAll>() == 24);
    assert!(size_of::<Narrow>() == 48);
    assert!(size_of::<Decode>() == 152);
    assert!(size_of::<Prefill>() == 128);
};

/// Rows of one tile of prefill attention: tokens of a slice times the query heads of a group.
pub(crate) const TILE_ROWS: usize = 64;

/// Rows up to which a product takes the narrow kernel, at most.
pub(crate) const NARROW_ROWS: usize = 32;

/// What the narrow kernel does with its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Out {
    /// bf16.
    Store,
    /// Added to floats.
    Add,
    /// silu of even columns times odd ones, bf16.
    Gated,
    /// Floats.
    Floats,
}

/// The narrow kernel for up to so many rows, over tiles of so many columns.
struct Width {
    rows: usize,
    columns: usize,
    /// Blocks that fit on a multiprocessor.
    resident: usize,
    store: Function,
    add: Function,
    gated: Function,
    floats: Function,
}

/// All kernels that a model's shape takes.
pub(crate) struct Kernels {
    multiprocessors: u32,
    overlaps: bool,
    embed: Function,
    rms_norm: Function,
    gated: Function,
    rotate: Function,
    decode: Function,
    decode_shared: u32,
    /// Blocks of it that fit on a multiprocessor.
    decode_resident: usize,
    prefill: Function,
    prefill_shared: u32,
    /// For up to two rows, with a norm before the product.
    norm_store: Function,
    norm_gated: Function,
    widths: [Width; 4],
}

/// A kernel's place among others: whether it may start before the one before it is complete. Each of
/// ours waits by itself where it has to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    After,
    Overlapping,
}

impl Kernels {
    pub(crate) fn load(device: &Device, head_dim: usize) -> Result<Self, Error> {
        let plain = |name: &str| device.function(name, 0);
        let width = |rows: usize, columns: usize, resident: usize| {
            // Of two rows, those two kernels have a norm in them and are called by other names.
            let of = |out: &str| match (rows, out) {
                (2, "store" | "gated") => plain(&format!("narrow_2_norm_{out}")),
                _ => plain(&format!("narrow_{rows}_{out}")),
            };
            Ok::<_, Error>(Width {
                rows,
                columns,
                resident,
                store: of("store")?,
                add: of("add")?,
                gated: of("gated")?,
                floats: of("floats")?,
            })
        };
        // As in the kernels: rows of head_dim + 8 elements of two bytes.
        let row = (head_dim + 8) * 2;
        let (decode_shared, prefill_shared) = ((16 + 4 * 2 * 2 * 16) * row, 2 * 2 * 64 * row);
        Ok(Self {
            multiprocessors: device.multiprocessors(),
            overlaps: device.overlaps(),
            embed: plain("embed")?,
            rms_norm: plain("rms_norm")?,
            gated: plain("gated")?,
            rotate: plain(&format!("rotate_{head_dim}"))?,
            decode: device.function(&format!("decode_attention_{head_dim}"), decode_shared)?,
            decode_shared: decode_shared as u32,
            decode_resident: if head_dim <= 64 { 4 } else { 3 },
            prefill: device.function(&format!("prefill_attention_{head_dim}"), prefill_shared)?,
            prefill_shared: prefill_shared as u32,
            norm_store: plain("narrow_2_norm_store")?,
            norm_gated: plain("narrow_2_norm_gated")?,
            widths: [width(2, 8, 2)?, width(8, 16, 2)?, width(16, 32, 2)?, width(32, 32, 1)?],
        })
    }

    /// How many blocks share one sequence's positions, when `entries` sequences are attended to.
    pub(crate) fn splits(&self, entries: usize, kv_heads: usize) -> usize {
        splits(entries * kv_heads, self.decode_resident * self.multiprocessors as usize)
    }

    pub(crate) fn embed(&self, on: &Stream, rows: usize, p: &Embed) -> Result<(), Error> {
        // The first of a step: what came before is a copy, not a kernel.
        self.launch(on, self.embed, [rows, 1, 1], 256, 0, Order::After, p)
    }

    pub(crate) fn rms_norm(&self, on: &Stream, rows: usize, p: &Norm) -> Result<(), Error> {
        self.launch(on, self.rms_norm, [rows, 1, 1], 256, 0, Order::Overlapping, p)
    }

    pub(crate) fn gated(&self, on: &Stream, p: &Gated) -> Result<(), Error> {
        let blocks = (p.count as usize).div_ceil(256 * 8);
        self.launch(on, self.gated, [blocks, 1, 1], 256, 0, Order::Overlapping, p)
    }

    pub(crate) fn rotate(&self, on: &Stream, rows: usize, p: &Paged) -> Result<(), Error> {
        let heads = (p.heads + 2 * p.kv_heads) as usize;
        let grid = [rows, heads.div_ceil(8), 1];
        self.launch(on, self.rotate, grid, 256, 0, Order::Overlapping, p)
    }

    pub(crate) fn decode(&self, on: &Stream, entries: usize, p: &Decode) -> Result<(), Error> {
        let grid = [p.paged.kv_heads as usize, entries, p.splits as usize];
        self.launch(on, self.decode, grid, 128, self.decode_shared, Order::Overlapping, p)
    }

    pub(crate) fn prefill(&self, on: &Stream, tiles: usize, p: &Prefill) -> Result<(), Error> {
        let grid = [tiles, p.paged.kv_heads as usize, 1];
        self.launch(on, self.prefill, grid, 128, self.prefill_shared, Order::Overlapping, p)
    }

    /// A product with up to [`NARROW_ROWS`] rows of bf16. With a norm, up to two rows of floats.
    pub(crate) fn narrow(&self, on: &Stream, out: Out, p: &Narrow) -> Result<(), Error> {
        let rows = p.rows as usize;
        let normed = p.norm != 0;
        let width = if normed { Some(&self.widths[0]) } else { self.width(rows, out) };
        let Some(width) = width.filter(|width| rows <= width.rows) else {
            return Err(Error::Mismatch(format!("a narrow product of {rows} rows")));
        };
        let function = match (out, normed) {
            (Out::Store, true) => self.norm_store,
            (Out::Gated, true) => self.norm_gated,
            (Out::Store, false) => width.store,
            (Out::Gated, false) => width.gated,
            (Out::Add, _) => width.add,
            (Out::Floats, _) => width.floats,
        };
        // As many blocks as run at once; they take turns at the tiles.
        let tiles = (p.n as usize).div_ceil(width.columns);
        let grid = [tiles.min(width.resident * self.multiprocessors as usize), 1, 1];
        self.launch(on, function, grid, 256, 0, Order::Overlapping, p)
    }

    fn width(&self, rows: usize, out: Out) -> Option<&Width> {
        // The kernels for two rows without a norm: those two alone.
        let two = matches!(out, Out::Add | Out::Floats);
        self.widths[if two { 0 } else { 1 }..].iter().find(|width| rows <= width.rows)
    }

    #[allow(clippy::too_many_arguments)]
    fn launch<A: Copy>(
        &self,
        on: &Stream,
        function: Function,
        grid: [usize; 3],
        block: u32,
        shared: u32,
        order: Order,
        arguments: &A,
    ) -> Result<(), Error> {
        let overlapping = self.overlaps && order == Order::Overlapping;
        let grid = grid.map(|blocks| blocks as u32);
        launch(on, function, grid, block, shared, overlapping, arguments)
    }

    /// Kernels follow each other without overlap from now on.
    pub(crate) fn forbid_overlap(&mut self) {
        self.overlaps = false;
    }
}

/// Into how many blocks each of `sequences` is split on a device that holds `slots` blocks at once: the
/// fewest that leave little of it idle in the last wave. More than 32 cost more to merge than they
/// gain.
fn splits(sequences: usize, slots: usize) -> usize {
    let used = |splits: usize| {
        let blocks = sequences * splits;
        blocks as f64 / (blocks.div_ceil(slots) * slots) as f64
    };
    let enough = (1..=32).find(|splits| used(*splits) >= 0.85);
    let best = || (1..=32).max_by(|a, b| used(*a).total_cmp(&used(*b)));
    enough.or_else(best).unwrap_or(1)
}

/// Puts a kernel on a stream. The kernel takes one argument, of type `A`.
fn launch<A: Copy>(
    on: &Stream,
    function: Function,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    overlapping: bool,
    arguments: &A,
) -> Result<(), Error> {
    on.device().bind()?;
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: on.raw,
        attrs: if overlapping { &mut attribute } else { null_mut() },
        numAttrs: u32::from(overlapping),
    };
    let mut parameters = [std::ptr::from_ref(arguments).cast_mut().cast::<std::ffi::c_void>()];
    // SAFETY: the kernel takes one argument of type `A` (each caller's pair of function and
    // arguments), which the driver copies. The addresses in it are of buffers that outlive the work.
    check("cuLaunchKernelEx", unsafe {
        sys::cuLaunchKernelEx(&config, function.0, parameters.as_mut_ptr(), null_mut())
    })
}

impl Paged {
    /// What does not change from step to step.
    pub(crate) fn of(shape: &Shape) -> Self {
        let scale = std::f64::consts::LOG2_E / (shape.head_dim as f64).sqrt();
        Self {
            magic: (1u64 << 32).div_ceil(shape.block_size as u64),
            block_size: shape.block_size as u32,
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            layers: shape.layers as u32,
            interleaved: u32::from(shape.interleaved),
            eps: shape.rms_eps,
            scale: scale as f32,
            ..Self::default()
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ReadAll {
    from: u64,
    sums: u64,
    count: u64,
}

/// Reads a buffer to its end, for nothing but the time it takes. `sums` has room for every thread of
/// the largest grid.
pub(crate) fn read_all(
    on: &Stream,
    kernel: Function,
    from: &crate::driver::Buffer<u8>,
    bytes: usize,
    sums: &crate::driver::Buffer<f32>,
) -> Result<(), Error> {
    let blocks = 8 * on.device().multiprocessors();
    let arguments =
        ReadAll { from: from.address(0), sums: sums.address(0), count: (bytes / 16) as u64 };
    launch(on, kernel, [blocks.min(1 << 16), 1, 1], 256, 0, false, &arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_split_to_fill_the_device() {
        // One sequence of eight key/value heads on 132 multiprocessors of three blocks each.
        assert_eq!(splits(8, 396), 32);
        assert_eq!(splits(64, 396), 6);
        assert_eq!(splits(256, 396), 3);
        assert_eq!(splits(512, 396), 2);
        assert_eq!(splits(4096, 396), 1);
        for sequences in 1..500 {
            assert!((1..=32).contains(&splits(sequences, 396)));
        }
    }
}
