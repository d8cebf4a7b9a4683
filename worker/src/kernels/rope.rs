//! Rotary position embedding (Su et al. 2021).

/// Which dimensions of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// `2i` and `2i + 1`: the order in which GGUF keeps the weights of Llama models.
    Neighbours,
    /// `i` and `i + d / 2`.
    Halves,
}

/// Rotations of heads.
#[derive(Clone)]
pub struct Rope {
    pairs: Pairs,
    frequencies: Vec<f32>,
    /// `(cos, sin)` of each pair, position by position.
    table: Vec<(f32, f32)>,
}

impl Rope {
    /// For heads of `dims` dimensions.
    ///
    /// `factors`, when given, divides the frequency of each pair (`rope_freqs.weight`).
    pub fn new(pairs: Pairs, dims: usize, theta: f32, factors: Option<&[f32]>) -> Self {
        let frequency = |i: usize| {
            let frequency = f64::from(theta).powf(-2.0 * i as f64 / dims as f64) as f32;
            frequency / factors.map_or(1.0, |factors| factors[i])
        };
        Self { pairs, frequencies: (0..dims / 2).map(frequency).collect(), table: Vec::new() }
    }

    /// Prepares for positions below `positions`.
    pub fn reach(&mut self, positions: usize) {
        /// Angles are computed for so many positions at once.
        const STEP: usize = 256;
        let known = self.table.len() / self.frequencies.len();
        for position in known..positions.next_multiple_of(STEP).max(known) {
            self.table.extend(self.frequencies.iter().map(|frequency| {
                // The angle in single precision, as every other implementation has it.
                let angle = f64::from(position as f32 * frequency);
                (angle.cos() as f32, angle.sin() as f32)
            }));
        }
    }

    /// Rotates one head at a position that was [reached](Self::reach).
    pub fn rotate(&self, position: usize, head: &mut [f32]) {
        let half = self.frequencies.len();
        let angles = &self.table[position * half..(position + 1) * half];
        let rotate = |a: &mut f32, b: &mut f32, (cos, sin): (f32, f32)| {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        };
        match self.pairs {
            Pairs::Neighbours => {
                let pairs = head.as_chunks_mut::<2>().0.iter_mut().zip(angles);
                pairs.for_each(|([a, b], angle)| rotate(a, b, *angle));
            }
            Pairs::Halves => {
                let (low, high) = head.split_at_mut(half);
                let pairs = low.iter_mut().zip(high).zip(angles);
                pairs.for_each(|((a, b), angle)| rotate(a, b, *angle));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_pair_is_rotated_by_its_angle(
            position in 0usize..4096, x in -3f32..3.0, y in -3f32..3.0,
        ) {
            for pairs in [Pairs::Neighbours, Pairs::Halves] {
                let mut rope = Rope::new(pairs, 64, 10_000.0, None);
                rope.reach(position / 2);
                rope.reach(position + 1);
                let mut head = match pairs {
                    Pairs::Neighbours => [x, y].repeat(32),
                    Pairs::Halves => [[x; 32], [y; 32]].concat(),
                };
                rope.rotate(position, &mut head);
                for i in 0..32 {
                    let got = head[if pairs == Pairs::Neighbours { 2 * i } else { i }];
                    let angle = position as f64 * 10_000f64.powf(-2.0 * i as f64 / 64.0);
                    let expected = f64::from(x) * angle.cos() - f64::from(y) * angle.sin();
                    // Single-precision angles: the error grows with the position.
                    prop_assert!((f64::from(got) - expected).abs() < 2e-3, "{got} {expected}");
                }
            }
        }
    }
}
