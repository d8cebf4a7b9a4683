//! Each kernel by itself, from host memory to host memory: for tests and measurements.

use std::sync::Arc;

use half::bf16;

use crate::blas::{Blas, Outcome};
use crate::driver::{Buffer, Plain, Stream};
use crate::kernels::{Decode, Embed, Gated, Kernels, Narrow, Norm, Out, Paged, Prefill};
use crate::{Device, Error, Shape};

const WHAT: &str = "a kernel's operands";

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// bf16, `[rows, n]`.
    Store,
    /// Added to floats, `[rows, n]`.
    Add,
    /// silu of even columns times odd ones, bf16, `[rows, n / 2]`.
    Gated,
    /// Floats, `[rows, n]`.
    Floats,
}

/// A product `x wᵀ`.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// `[n, k]`.
    pub w: &'a [bf16],
    /// Rows of `x`.
    pub rows: usize,
    /// Columns of the result.
    pub n: usize,
    /// Columns of `x`.
    pub k: usize,
    /// What becomes of it.
    pub target: Target,
}

/// New tokens of one sequence, as the attention kernels see them.
#[derive(Clone, Debug)]
pub struct Span {
    /// Position of the first.
    pub start: usize,
    /// How many.
    pub count: usize,
    /// The sequence's blocks.
    pub blocks: Vec<u32>,
}

/// What attention is computed of.
#[derive(Debug)]
pub struct Attention<'a> {
    /// Layers, heads, block size and so on.
    pub shape: &'a Shape,
    /// The layer whose keys and values are meant.
    pub layer: usize,
    /// `[row][queries, keys, values]`, as the product gives them.
    pub qkv: &'a [bf16],
    /// All blocks; the new keys and values are written here.
    pub kv: &'a mut [bf16],
    /// Rows follow each other in the order of the spans.
    pub spans: &'a [Span],
    /// Of queries, keys and values.
    pub bias: Option<&'a [f32]>,
    /// RMSNorm of each query head and of each key head.
    pub norms: Option<(&'a [f32], &'a [f32])>,
    /// `[position][head_dim / 2]`: cosine and sine.
    pub angles: &'a [f32],
    /// Blocks that share a sequence's positions; spans of one token alone.
    pub splits: usize,
    /// Spans of one token: whether one kernel does all of it.
    pub fused: bool,
}

/// The kernels for heads of one width.
pub struct Single {
    stream: Stream,
    kernels: Kernels,
    blas: Blas,
}

impl std::fmt::Debug for Single {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Single").finish_non_exhaustive()
    }
}

impl Single {
    /// Loads the kernels.
    pub fn new(device: &Arc<Device>, head_dim: usize) -> Result<Self, Error> {
        let stream = Stream::new(device)?;
        let (kernels, blas) = (Kernels::load(device, head_dim)?, Blas::new(&stream)?);
        Ok(Self { stream, kernels, blas })
    }

    fn up<T: Plain>(&self, values: &[T]) -> Result<Buffer<T>, Error> {
        Buffer::of(&self.stream, values, WHAT)
    }

    fn down<T: Plain + Default>(&self, buffer: &Buffer<T>, len: usize) -> Result<Vec<T>, Error> {
        let mut values = vec![T::default(); len];
        // SAFETY: waited for below.
        unsafe { buffer.copy_to(&self.stream, 0, &mut values) }?;
        self.stream.synchronize()?;
        Ok(values)
    }

    /// Rows of `table`, `[vocab, hidden]`.
    pub fn embed(&self, tokens: &[u32], table: &[bf16], hidden: usize) -> Result<Vec<f32>, Error> {
        let (tokens_at, table) = (self.up(tokens)?, self.up(table)?);
        let x = Buffer::new(self.stream.device(), tokens.len() * hidden, WHAT)?;
        let embed = Embed {
            tokens: tokens_at.address(0),
            table: table.address(0),
            x: x.address(0),
            hidden: hidden as u32,
        };
        self.kernels.embed(&self.stream, tokens.len(), &embed)?;
        self.down(&x, tokens.len() * hidden)
    }

    /// RMSNorm of rows of `x`, all or those of `gather`.
    pub fn rms_norm(
        &self,
        x: &[f32],
        weight: &[f32],
        gather: Option<&[u32]>,
        eps: f32,
    ) -> Result<Vec<bf16>, Error> {
        let hidden = weight.len();
        let rows = gather.map_or(x.len() / hidden, <[u32]>::len);
        let (x, weight) = (self.up(x)?, self.up(weight)?);
        let gather = gather.map(|gather| self.up(gather)).transpose()?;
        let out = Buffer::new(self.stream.device(), rows * hidden, WHAT)?;
        let norm = Norm {
            x: x.address(0),
            weight: weight.address(0),
            gather: gather.as_ref().map_or(0, |gather| gather.address(0)),
            out: out.address(0),
            hidden: hidden as u32,
            eps,
        };
        self.kernels.rms_norm(&self.stream, rows, &norm)?;
        self.down(&out, rows * hidden)
    }

    /// silu of even columns times odd ones.
    pub fn gated(&self, pairs: &[bf16]) -> Result<Vec<bf16>, Error> {
        let count = pairs.len() / 2;
        let pairs = self.up(pairs)?;
        let out = Buffer::new(self.stream.device(), count, WHAT)?;
        let gated = Gated { pairs: pairs.address(0), out: out.address(0), count: count as u64 };
        self.kernels.gated(&self.stream, &gated)?;
        self.down(&out, count)
    }

    /// A product by the narrow kernel; what it is added to is `add`, else zeros.
    pub fn narrow(&self, x: &[bf16], p: &Product<'_>, add: &[f32]) -> Result<Vec<f32>, Error> {
        let x = self.up(x)?;
        self.product(x.address(0), None, 0.0, p, add)
    }

    /// The same of up to two rows of floats, which a norm goes before.
    pub fn normed(
        &self,
        x: &[f32],
        norm: &[f32],
        eps: f32,
        p: &Product<'_>,
    ) -> Result<Vec<f32>, Error> {
        let (x, norm) = (self.up(x)?, self.up(norm)?);
        self.product(x.address(0), Some(norm.address(0)), eps, p, &[])
    }

    fn product(
        &self,
        x: u64,
        norm: Option<u64>,
        eps: f32,
        p: &Product<'_>,
        add: &[f32],
    ) -> Result<Vec<f32>, Error> {
        let w = self.up(p.w)?;
        let narrow = |out: u64| Narrow {
            w: w.address(0),
            x,
            norm: norm.unwrap_or(0),
            out,
            n: p.n as u32,
            k: p.k as u32,
            rows: p.rows as u32,
            eps,
        };
        let (kind, len) = match p.target {
            Target::Store => (Out::Store, p.rows * p.n),
            Target::Gated => (Out::Gated, p.rows * p.n / 2),
            Target::Add => (Out::Add, p.rows * p.n),
            Target::Floats => (Out::Floats, p.rows * p.n),
        };
        if matches!(p.target, Target::Store | Target::Gated) {
            let out = Buffer::<bf16>::new(self.stream.device(), len, WHAT)?;
            self.kernels.narrow(&self.stream, kind, &narrow(out.address(0)))?;
            return Ok(self.down(&out, len)?.into_iter().map(f32::from).collect());
        }
        let out = self.up(&if add.is_empty() { vec![0.0; len] } else { add.to_vec() })?;
        self.kernels.narrow(&self.stream, kind, &narrow(out.address(0)))?;
        self.down(&out, len)
    }

    /// A product by cuBLAS; [`Target::Gated`] is not one of its.
    pub fn wide(&self, x: &[bf16], p: &Product<'_>, add: &[f32]) -> Result<Vec<f32>, Error> {
        let (x, w) = (self.up(x)?, self.up(p.w)?);
        let len = p.rows * p.n;
        let multiply = |out: u64, outcome: Outcome| {
            // SAFETY: the buffers are of these sizes.
            unsafe {
                self.blas.multiply(x.address(0), w.address(0), out, p.rows, p.n, p.k, outcome)
            }
        };
        match p.target {
            Target::Store => {
                let out = Buffer::<bf16>::new(self.stream.device(), len, WHAT)?;
                multiply(out.address(0), Outcome::Store)?;
                Ok(self.down(&out, len)?.into_iter().map(f32::from).collect())
            }
            Target::Gated => Err(Error::Mismatch("cuBLAS has no gated product".into())),
            target => {
                let out = self.up(&if add.is_empty() { vec![0.0; len] } else { add.to_vec() })?;
                let outcome = if target == Target::Add { Outcome::Add } else { Outcome::Floats };
                multiply(out.address(0), outcome)?;
                self.down(&out, len)
            }
        }
    }

    /// `[row][heads][head_dim]`. All spans have one token, or all go through the prefill kernel.
    pub fn attention(&self, a: Attention<'_>) -> Result<Vec<bf16>, Error> {
        let shape = a.shape;
        let rows: usize = a.spans.iter().map(|span| span.count).sum();
        let (mut positions, mut tables, mut blocks, mut tiles) =
            (vec![], vec![], Vec::<u32>::new(), vec![]);
        let group = shape.heads / shape.kv_heads;
        for span in a.spans {
            for first in (0..span.count * group).step_by(crate::kernels::TILE_ROWS) {
                let row = positions.len();
                tiles.extend([row, span.start, span.count, first].map(|x| x as u32));
            }
            positions.extend((span.start..span.start + span.count).map(|x| x as u32));
            tables.extend(std::iter::repeat_n(blocks.len() as u32, span.count));
            blocks.extend(&span.blocks);
        }
        let (qkv, kv, angles) = (self.up(a.qkv)?, self.up(a.kv)?, self.up(a.angles)?);
        let (positions, tables, blocks, tiles) =
            (self.up(&positions)?, self.up(&tables)?, self.up(&blocks)?, self.up(&tiles)?);
        let bias = a.bias.map(|bias| self.up(bias)).transpose()?;
        let norms = a.norms.map(|(q, k)| Ok::<_, Error>((self.up(q)?, self.up(k)?))).transpose()?;
        let out = Buffer::new(self.stream.device(), rows * shape.q_width(), WHAT)?;
        let parts = a.spans.len() * a.splits * shape.heads * (shape.head_dim + 2);
        let parts = Buffer::<f32>::new(self.stream.device(), parts, WHAT)?;
        let counters = self.up(&vec![0u32; a.spans.len() * shape.kv_heads])?;
        let paged = Paged {
            qkv: qkv.address(0),
            kv: kv.address(0),
            positions: positions.address(0),
            tables: tables.address(0),
            blocks: blocks.address(0),
            bias: bias.as_ref().map_or(0, |bias| bias.address(0)),
            q_norm: norms.as_ref().map_or(0, |norms| norms.0.address(0)),
            k_norm: norms.as_ref().map_or(0, |norms| norms.1.address(0)),
            angles: angles.address(0),
            layer: a.layer as u32,
            ..Paged::of(shape)
        };
        let single = a.spans.iter().all(|span| span.count == 1);
        if !(single && a.fused) {
            self.kernels.rotate(&self.stream, rows, &paged)?;
        }
        if single {
            let decode = Decode {
                paged,
                rows: 0,
                out: out.address(0),
                parts: parts.address(0),
                counters: counters.address(0),
                splits: a.splits as u32,
                fused: u32::from(a.fused),
            };
            self.kernels.decode(&self.stream, rows, &decode)?;
            let counters = self.down(&counters, a.spans.len() * shape.kv_heads)?;
            if counters.iter().any(|count| *count != 0) {
                return Err(Error::Mismatch("a counter was not reset".into()));
            }
        } else {
            let prefill = Prefill { paged, tiles: tiles.address(0), out: out.address(0) };
            let count =
                a.spans.iter().map(|s| (s.count * group).div_ceil(crate::kernels::TILE_ROWS));
            self.kernels.prefill(&self.stream, count.sum(), &prefill)?;
        }
        let blocks = self.down(&kv, a.kv.len())?;
        a.kv.copy_from_slice(&blocks);
        self.down(&out, rows * shape.q_width())
    }
}
