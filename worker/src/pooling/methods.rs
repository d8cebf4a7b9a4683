//! How the vectors of a text's tokens become one vector: the modes of sentence-transformers'
//! `Pooling` module (Reimers and Gurevych 2019).

/// A way to make one vector of many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pooling {
    /// The first token's.
    Cls,
    /// Of each dimension the largest value.
    Max,
    /// The mean.
    Mean,
    /// The sum, divided by the square root of the number of tokens.
    #[value(name = "mean_sqrt_len_tokens")]
    MeanSqrtLen,
    /// The mean, the first token counting once, the second twice and so on (Muennighoff 2022).
    #[value(name = "weightedmean")]
    WeightedMean,
    /// The last token's.
    #[value(name = "lasttoken", alias = "last")]
    Last,
}

impl Pooling {
    const ALL: [(&'static str, Self); 6] = [
        ("cls", Self::Cls),
        ("max", Self::Max),
        ("mean", Self::Mean),
        ("mean_sqrt_len_tokens", Self::MeanSqrtLen),
        ("weightedmean", Self::WeightedMean),
        ("lasttoken", Self::Last),
    ];

    /// The mode of a name in `1_Pooling/config.json`.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, mode)| *mode)
    }

    /// Its name there.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, mode)| *mode == self).map_or("", |(name, _)| name)
    }

    /// Makes one vector of the rows of `states`, each as long as `out`, at least one.
    pub fn apply(self, states: &[f32], out: &mut [f32]) {
        let width = out.len();
        let rows = states.chunks_exact(width);
        let count = rows.len() as f32;
        match self {
            Self::Cls => out.copy_from_slice(&states[..width]),
            Self::Last => out.copy_from_slice(&states[states.len() - width..]),
            Self::Max => {
                out.copy_from_slice(&states[..width]);
                for row in rows.skip(1) {
                    out.iter_mut().zip(row).for_each(|(out, x)| *out = out.max(*x));
                }
            }
            Self::Mean => weighted(rows.map(|row| (1.0, row)), count, out),
            Self::MeanSqrtLen => weighted(rows.map(|row| (1.0, row)), count.sqrt(), out),
            Self::WeightedMean => {
                let all = count * (count + 1.0) / 2.0;
                let rows = rows.enumerate();
                weighted(rows.map(|(i, row)| ((i + 1) as f32, row)), all, out);
            }
        }
    }
}

/// The sum of weighted rows, divided.
fn weighted<'a>(rows: impl Iterator<Item = (f32, &'a [f32])>, divisor: f32, out: &mut [f32]) {
    out.fill(0.0);
    for (weight, row) in rows {
        out.iter_mut().zip(row).for_each(|(out, x)| *out += weight * x);
    }
    out.iter_mut().for_each(|out| *out /= divisor);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_is_its_formula() {
        let states = [1.0, -4.0, 3.0, 2.0, 8.0, -1.0, 0.0, 7.0];
        let expected = [
            ("cls", [1.0, -4.0]),
            ("max", [8.0, 7.0]),
            ("mean", [3.0, 1.0]),
            ("mean_sqrt_len_tokens", [6.0, 2.0]),
            ("weightedmean", [3.1, 2.5]),
            ("lasttoken", [0.0, 7.0]),
        ];
        for (name, expected) in expected {
            let mode = Pooling::by_name(name).unwrap();
            let mut out = [f32::NAN; 2];
            mode.apply(&states, &mut out);
            assert_eq!((mode.name(), out), (name, expected));
        }
    }
}
