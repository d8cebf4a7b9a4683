//! Content addresses of KV blocks.
//!
//! A KV block's content depends on every token up to its end, so its address is a chained hash:
//! the hash of block *i* covers block *i − 1*'s hash and the tokens of block *i*. Two prompts
//! share block *i* exactly when they share all tokens through it. Gateways use the addresses to
//! route, workers to find blocks they hold.
//!
//! Keys and values depend on the LoRA adapter too, so each adapter has chains of its own, which
//! start at [`BlockHash::with_adapter`].

use std::fmt;

/// The address of one full KV block: 128 bits of a chained BLAKE3.
///
/// A strong hash, because a collision would show one client another's context.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u8; 16]);

impl BlockHash {
    /// The start of every chain with this salt.
    ///
    /// Requests share blocks only when their salts are equal (vLLM's `cache_salt`).
    pub fn root(salt: &str) -> Self {
        Self::digest(&[b"baton-kv-root", salt.as_bytes()])
    }

    /// The start of the chains of an adapter, after the root `self` of a salt. No salt makes a root
    /// that equals it.
    pub fn with_adapter(self, digest: &str) -> Self {
        Self::digest(&[b"baton-kv-adapter", &self.0, digest.as_bytes()])
    }

    /// The start of the chains of a window of sound, after the root `self` of a salt.
    pub fn with_audio(self, samples: &[u8]) -> Self {
        Self::digest(&[b"baton-kv-audio", &self.0, samples])
    }

    /// The addresses of all full blocks of `tokens` after `self`, in order. A part-filled last
    /// block has none.
    pub fn chain(self, tokens: &[u32], block_size: usize) -> Vec<Self> {
        let mut parent = self;
        tokens
            .chunks_exact(block_size)
            .map(|block| {
                parent = parent.child(block);
                parent
            })
            .collect()
    }

    /// The address of the block that holds `tokens` after the block `self`.
    pub fn child(self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self::truncate(&hasher)
    }

    /// Bytes of an address.
    pub const BYTES: usize = 16;

    /// The address as it crosses processes.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Addresses that lie one after the other; what is left at the end is none.
    pub fn read_all(bytes: &[u8]) -> impl Iterator<Item = Self> {
        bytes.as_chunks().0.iter().map(|bytes| Self(*bytes))
    }

    fn digest(parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self::truncate(&hasher)
    }

    fn truncate(hasher: &blake3::Hasher) -> Self {
        let mut bytes = [0; 16];
        hasher.finalize_xof().fill(&mut bytes);
        Self(bytes)
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The addresses of all full blocks of `tokens`, in order, without an adapter.
pub fn block_hashes(salt: &str, tokens: &[u32], block_size: usize) -> Vec<BlockHash> {
    BlockHash::root(salt).chain(tokens, block_size)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn prompts_share_exactly_the_blocks_before_their_first_difference(
            tokens in prop::collection::vec(0u32..1000, 1..200),
            at in 0usize..200,
            block_size in 1usize..32,
        ) {
            let at = at % tokens.len();
            let mut other = tokens.clone();
            other[at] += 1000;
            let (a, b) = (block_hashes("", &tokens, block_size), block_hashes("", &other, block_size));
            prop_assert_eq!(a.len(), tokens.len() / block_size);
            for (i, (a, b)) in a.iter().zip(&b).enumerate() {
                prop_assert_eq!(a == b, (i + 1) * block_size <= at);
            }
        }
    }

    #[test]
    fn salts_keep_equal_prompts_apart() {
        assert_ne!(block_hashes("a", &[1, 2], 2), block_hashes("b", &[1, 2], 2));
    }

    #[test]
    fn adapters_keep_equal_prompts_apart_under_every_salt() {
        let chain = |salt: &str, adapter: Option<&str>| {
            let root = BlockHash::root(salt);
            adapter.map_or(root, |digest| root.with_adapter(digest)).chain(&[1, 2], 2)
        };
        let all = [
            chain("", None),
            chain("", Some("a")),
            chain("", Some("b")),
            chain("a", None),
            chain("a", Some("a")),
            chain("s", Some("a")),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|other| other != one), "{i}");
        }
        assert_eq!(chain("s", Some("a")), chain("s", Some("a")));
    }
}
