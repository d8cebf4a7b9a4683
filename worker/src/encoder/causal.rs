//! A decoder as a text encoder: the hidden states of its last layer, after the final norm.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use baton_proto::v1::KvDtype;

use super::{Encoder, Text};
use crate::kernels::pool::ThreadPool;
use crate::kv::BlockId;
use crate::kv::pool::KvPool;
use crate::model::{Decoder, Model as _, ModelError, SequenceSlice, kv_layout};

/// A decoder with a KV pool of its own, whose content lasts for one batch.
pub struct Causal {
    decoder: Decoder,
    kv: KvPool,
    /// All blocks of the pool.
    blocks: Vec<BlockId>,
}

impl Causal {
    /// Tokens of a block.
    pub(crate) const BLOCK_SIZE: usize = 16;

    /// For batches that need at most `tokens` tokens of whole blocks.
    pub(crate) fn new(decoder: Decoder, tokens: usize) -> std::io::Result<Self> {
        let blocks = tokens.div_ceil(Self::BLOCK_SIZE);
        let kv = KvPool::new(kv_layout(decoder.config(), Self::BLOCK_SIZE, KvDtype::I16), blocks)?;
        Ok(Self { decoder, kv, blocks: (0..blocks as BlockId).collect() })
    }
}

impl Encoder for Causal {
    fn hidden(&self) -> usize {
        self.decoder.config().hidden
    }

    fn set_interrupt(&mut self, flag: Arc<AtomicBool>) {
        self.decoder.set_interrupt(flag);
    }

    fn threads(&mut self) -> &mut ThreadPool {
        self.decoder.threads()
    }

    /// None: it would need a KV pool of its own.
    fn alone(&self) -> Option<Box<dyn Encoder>> {
        None
    }

    fn encode(&mut self, texts: &[Text<'_>]) -> Result<(&[f32], &mut ThreadPool), ModelError> {
        let mut free = &self.blocks[..];
        let mut batch = Vec::with_capacity(texts.len());
        for Text { tokens, .. } in texts {
            let (blocks, rest) = free.split_at(tokens.len().div_ceil(Self::BLOCK_SIZE));
            free = rest;
            batch.push(SequenceSlice {
                tokens,
                blocks,
                logits: tokens.len(),
                ..SequenceSlice::default()
            });
        }
        self.decoder.forward_hidden(&batch, &self.kv)
    }
}
