//! Floats that begin at a cache line: a vector of sixteen then never lies in two.

use std::ops::{Deref, DerefMut};

use super::arena::Line;
use super::lanes::LANES;

/// A buffer of floats, grown to the most seen and kept.
#[derive(Default)]
pub struct Floats {
    lines: Vec<Line>,
    len: usize,
}

impl Floats {
    /// Makes it this long. What is new is zero or of an earlier use.
    pub fn resize(&mut self, len: usize) {
        let lines = len.div_ceil(LANES);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 64]));
        }
        self.len = len;
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: the lines hold as many floats, and any bits are floats.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and the borrow is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_begin_at_a_line_and_keep_what_they_hold() {
        let mut floats = Floats::default();
        assert!(floats.is_empty());
        for len in [1, 15, 16, 17, 3, 1000] {
            floats.resize(len);
            assert_eq!(floats.len(), len);
            assert_eq!(floats.as_ptr().align_offset(64), 0);
            floats[len - 1] = len as f32;
        }
        assert_eq!((floats[0], floats[14], floats[15], floats[16]), (1.0, 15.0, 16.0, 17.0));
    }
}
