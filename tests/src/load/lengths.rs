//! Lengths of prompts and answers, by a distribution or from a trace.

use rand::{Rng, RngExt as _};
use rand_distr::{Distribution as _, LogNormal};

/// The lengths of one request, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Of the prompt.
    pub prompt: usize,
    /// Of the answer.
    pub answer: usize,
}

/// A log-normal distribution, by its median and its mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Half of the lengths are at most this.
    pub median: f64,
    /// The mean; above the median.
    pub mean: f64,
}

/// Prompts of the Azure conversation trace of 2023 (Patel et al., "Splitwise", ISCA 2024).
pub const PROMPTS: Shape = Shape { median: 1020.0, mean: 1155.0 };
/// Its answers.
pub const ANSWERS: Shape = Shape { median: 129.0, mean: 211.0 };

impl Shape {
    /// One length.
    fn draw(self, rng: &mut impl Rng) -> f64 {
        // The mean of a log-normal is its median times exp(σ²/2).
        let sigma = (2.0 * (self.mean / self.median).ln()).sqrt();
        let shape = LogNormal::new(self.median.ln(), sigma).expect("a mean above the median");
        shape.sample(rng)
    }
}

/// Where lengths come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Both drawn apart from each other: in the trace they hardly correlate.
    Drawn(Shape, Shape),
    /// A trace's requests, drawn with replacement.
    Trace(Vec<Lengths>),
}

impl Source {
    /// The lengths of one request, times `scale`, within `most`.
    pub fn draw(&self, scale: f64, most: Lengths, rng: &mut impl Rng) -> Lengths {
        let (prompt, answer) = match self {
            Self::Drawn(prompts, answers) => (prompts.draw(rng), answers.draw(rng)),
            Self::Trace(requests) => {
                let Lengths { prompt, answer } = requests[rng.random_range(..requests.len())];
                (prompt as f64, answer as f64)
            }
        };
        let within = |length: f64, most| ((length * scale).round() as usize).clamp(1, most);
        Lengths { prompt: within(prompt, most.prompt), answer: within(answer, most.answer) }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::load::stats::median;

    const MOST: Lengths = Lengths { prompt: 1_000_000, answer: 1_000_000 };

    #[test]
    fn drawn_lengths_have_the_published_medians_and_means() {
        let mut rng = StdRng::seed_from_u64(7);
        let source = Source::Drawn(PROMPTS, ANSWERS);
        let drawn: Vec<Lengths> = (0..20_000).map(|_| source.draw(1.0, MOST, &mut rng)).collect();
        let of = |length: fn(&Lengths) -> usize| -> Vec<f64> {
            drawn.iter().map(|lengths| length(lengths) as f64).collect()
        };
        let sides = [(of(|l| l.prompt), PROMPTS), (of(|l| l.answer), ANSWERS)];
        for (lengths, shape) in sides {
            let mean = lengths.iter().sum::<f64>() / lengths.len() as f64;
            assert!((median(&lengths) / shape.median - 1.0).abs() < 0.05, "{}", median(&lengths));
            assert!((mean / shape.mean - 1.0).abs() < 0.05, "{mean}");
        }
    }

    #[test]
    fn lengths_are_scaled_and_bounded() {
        let mut rng = StdRng::seed_from_u64(7);
        let source = Source::Trace(vec![Lengths { prompt: 1000, answer: 1 }]);
        let most = Lengths { prompt: 400, answer: 100 };
        let got = source.draw(0.25, most, &mut rng);
        assert_eq!(got, Lengths { prompt: 250, answer: 1 });
        assert_eq!(source.draw(0.5, most, &mut rng).prompt, 400);
    }
}
