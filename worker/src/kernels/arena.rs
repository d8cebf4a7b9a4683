//! Memory of repacked weights, in huge pages where the system has them.
//!
//! A step of decoding reads every weight once, so its speed is that of memory. With pages of four
//! kilobytes much of it is lost to page walks and to prefetchers, which stop at the end of a page.

use std::sync::Arc;

use memmap2::{Advice, MmapMut, MmapRaw};

/// A huge page of x86-64 and, by default, of aarch64.
const HUGE_PAGE: usize = 2 << 20;
/// Of one mapping. What is not used of it takes no memory.
const CHUNK: usize = 64 << 20;

/// A cache line, for its alignment.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

/// Hands out memory, piece after piece of large mappings.
#[derive(Default)]
pub struct Arena {
    chunk: Option<Arc<MmapRaw>>,
    /// Where the free part of the mapping begins, and where the mapping ends.
    free: usize,
    end: usize,
}

/// Some lines of an arena, zero at first. The mapping goes when the last of its pieces does.
pub(super) struct Lines {
    chunk: Arc<MmapRaw>,
    start: usize,
    count: usize,
}

impl Arena {
    /// # Panics
    /// When the system has no memory left.
    pub(super) fn lines(&mut self, count: usize) -> Lines {
        let bytes = count * size_of::<Line>();
        let chunk = match &self.chunk {
            Some(chunk) if self.end - self.free >= bytes => chunk,
            _ => {
                let len = bytes.next_multiple_of(HUGE_PAGE).max(CHUNK);
                let map = MmapMut::map_anon(len + HUGE_PAGE).expect("memory for weights");
                // A system without huge pages refuses; then small ones must do.
                let _ = map.advise(Advice::HugePage);
                let chunk = MmapRaw::from(map);
                self.free = chunk.as_ptr().align_offset(HUGE_PAGE);
                self.end = self.free + len;
                self.chunk.insert(Arc::new(chunk))
            }
        };
        let lines = Lines { chunk: chunk.clone(), start: self.free, count };
        self.free += bytes;
        lines
    }
}

impl Lines {
    pub(super) fn as_ptr(&self) -> *const Line {
        // SAFETY: inside the mapping.
        unsafe { self.chunk.as_ptr().add(self.start).cast() }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [Line] {
        // SAFETY: an arena gives out each part of a mapping once, aligned to lines; any bytes are
        // lines.
        unsafe {
            let first = self.chunk.as_mut_ptr().add(self.start).cast::<Line>();
            std::slice::from_raw_parts_mut(first, self.count)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_apart_and_outlive_the_arena() {
        let mut arena = Arena::default();
        let mut pieces: Vec<Lines> =
            [3, 1, CHUNK / 64 - 2, 2 * CHUNK / 64, 5].map(|count| arena.lines(count)).into();
        drop(arena);
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.as_ptr().is_aligned());
            let lines = piece.as_mut_slice();
            assert!(lines.iter().all(|line| line.0 == [0; 64]));
            let last = lines.len() - 1;
            (lines[0].0, lines[last].0) = ([i as u8 + 1; 64], [i as u8 + 1; 64]);
        }
        for (i, piece) in pieces.iter_mut().enumerate() {
            let lines = piece.as_mut_slice();
            assert_eq!((lines[0].0[0], lines[lines.len() - 1].0[63]), (i as u8 + 1, i as u8 + 1));
        }
    }
}
