//! What a worker does, learned from what workers did.
//!
//! A step of a batch takes about `fixed + row · rows + token · prompt tokens`: weights are read
//! once, each sequence that decodes adds its keys and values, each prompt token its arithmetic.
//! (The same shape is fitted by Sarathi-Serve, Agrawal et al., OSDI 2024, and by NVIDIA Dynamo's
//! load-based planner.) Workers count steps, rows, tokens and the time spent in steps; differences
//! between two looks are sums over steps, and the equation holds for sums too. So three numbers
//! are fitted by least squares, none below zero, in which older samples count less and less.

/// What remains of a sample's weight after [`HALF`] seconds.
const HALF: f64 = 0.5;
const HALF_SECONDS: f64 = 600.0;
/// Weight of the prior, in samples: what the samples cannot tell apart stays as it was.
const PRIOR: f64 = 0.02;

/// What one worker did between two looks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Steps.
    pub steps: f64,
    /// Sequences that decoded, summed over the steps.
    pub rows: f64,
    /// Prompt tokens computed.
    pub prompt: f64,
    /// Seconds spent in the steps.
    pub busy: f64,
}

/// The time of a step, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTime {
    /// Of any step.
    pub fixed: f64,
    /// For each sequence that decodes.
    pub row: f64,
    /// For each prompt token.
    pub token: f64,
}

/// Samples, summed up with their weights.
#[derive(Clone, Debug, Default)]
pub struct Capacity {
    /// The normal equations: products of (1, rows, tokens) of a mean step, and with its time.
    products: [[f64; 3]; 3],
    with_time: [f64; 3],
    /// Sums of (steps, rows, tokens), and of time.
    sums: [f64; 3],
    busy: f64,
    fitted: [f64; 3],
}

impl Capacity {
    /// Forgets a part of what is older, `seconds` later.
    pub fn age(&mut self, seconds: f64) {
        let left = HALF.powf(seconds / HALF_SECONDS);
        let products = self.products.iter_mut().flatten();
        let all = products.chain(&mut self.with_time).chain(&mut self.sums);
        all.chain([&mut self.busy]).for_each(|sum| *sum *= left);
    }

    /// Learns from what workers did.
    pub fn learn(&mut self, samples: &[Sample]) {
        for sample in samples.iter().filter(|it| it.steps > 0.0 && it.busy > 0.0) {
            // A mean step, with the weight of a sample that had enough steps for its mean to say
            // something: one over an hour says no more than one over ten seconds.
            let weight = (sample.steps / 20.0).min(1.0);
            let x = [1.0, sample.rows / sample.steps, sample.prompt / sample.steps];
            let y = sample.busy / sample.steps;
            for i in 0..3 {
                for j in 0..3 {
                    self.products[i][j] += weight * x[i] * x[j];
                }
                self.with_time[i] += weight * x[i] * y;
            }
            for (sum, x) in self.sums.iter_mut().zip([sample.steps, sample.rows, sample.prompt]) {
                *sum += x;
            }
            self.busy += sample.busy;
        }
        self.fit();
    }

    /// Whether anything is known.
    pub fn known(&self) -> bool {
        self.busy > 0.0
    }

    /// The time of a step.
    pub fn step(&self) -> StepTime {
        let [fixed, row, token] = self.fitted;
        StepTime { fixed, row, token }
    }

    /// Seconds that a prompt token takes where nothing decodes: with the step's fixed part.
    pub fn prompt_token(&self) -> f64 {
        let [steps, _, tokens] = self.sums;
        let StepTime { fixed, token, .. } = self.step();
        if tokens > 0.0 { token + fixed * steps / tokens } else { token }
    }

    /// Non-negative least squares by coordinate descent on the normal equations. What samples do
    /// not tell apart is drawn to the mean: all time in proportion, as if nothing were fixed, so
    /// that a worker is not believed to do what none has done.
    fn fit(&mut self) {
        let weight = self.products[0][0];
        if weight <= 0.0 {
            return;
        }
        let scale = |i: usize| (self.products[i][i] / weight).sqrt().max(1e-12);
        let scales = [scale(0), scale(1), scale(2)];
        let mean = self.with_time[0] / weight;
        let busy_rows = self.products[0][1] > 0.0;
        let busy_tokens = self.products[0][2] > 0.0;
        // Half of a step's time each, where there are both.
        let share = mean / f64::from(u8::from(busy_rows) + u8::from(busy_tokens)).max(1.0);
        let prior = [
            if busy_rows || busy_tokens { 0.0 } else { mean },
            if busy_rows { share / scales[1] } else { 0.0 },
            if busy_tokens { share / scales[2] } else { 0.0 },
        ];
        let mut fitted = if self.fitted == [0.0; 3] { prior } else { self.fitted };
        for _ in 0..500 {
            let before = fitted;
            for i in 0..3 {
                let ridge = PRIOR * scales[i] * scales[i];
                let others: f64 =
                    (0..3).filter(|j| *j != i).map(|j| self.products[i][j] * fitted[j]).sum();
                let top = self.with_time[i] - others + ridge * prior[i];
                fitted[i] = (top / (self.products[i][i] + ridge).max(1e-30)).max(0.0);
            }
            let moved = (0..3).map(|i| (fitted[i] - before[i]).abs() * scales[i]);
            if moved.fold(0.0, f64::max) < 1e-9 * mean {
                break;
            }
        }
        self.fitted = fitted;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(step: StepTime, steps: f64, rows: f64, tokens: f64) -> Sample {
        let each = step.fixed + step.row * rows + step.token * tokens;
        Sample { steps, rows: rows * steps, prompt: tokens * steps, busy: each * steps }
    }

    #[test]
    fn a_worker_that_is_as_the_model_says_is_learned_exactly() {
        let true_step = StepTime { fixed: 0.012, row: 0.0004, token: 0.00005 };
        let mut capacity = Capacity::default();
        for i in 0..60 {
            let (rows, tokens) = (f64::from(i % 7) * 5.0, f64::from(i % 5) * 100.0);
            capacity.age(10.0);
            capacity.learn(&[sample(true_step, 200.0, rows, tokens)]);
        }
        let step = capacity.step();
        let near = |a: f64, b: f64| (a - b).abs() < 0.02 * b;
        assert!(
            near(step.fixed, 0.012) && near(step.row, 0.0004) && near(step.token, 0.00005),
            "{step:?}"
        );
    }

    #[test]
    fn what_one_batch_size_does_not_tell_is_taken_for_the_worse() {
        let mut capacity = Capacity::default();
        for _ in 0..30 {
            capacity.learn(&[sample(
                StepTime { fixed: 0.02, row: 0.0, token: 0.0 },
                100.0,
                10.0,
                0.0,
            )]);
        }
        let step = capacity.step();
        assert!((step.fixed + 10.0 * step.row - 0.02).abs() < 1e-4, "{step:?}");
        assert!(
            step.fixed + 20.0 * step.row > 0.025,
            "no more is promised than was seen: {step:?}"
        );
    }

    #[test]
    fn prompts_alone_give_their_rate() {
        let mut capacity = Capacity::default();
        capacity.learn(&[sample(
            StepTime { fixed: 0.01, row: 0.0, token: 1e-4 },
            50.0,
            0.0,
            512.0,
        )]);
        let per_token = 0.01 / 512.0 + 1e-4;
        assert!((capacity.prompt_token() - per_token).abs() < 1e-6 * per_token, "{capacity:?}");
    }

    #[test]
    fn nothing_is_below_zero_whatever_comes() {
        let mut capacity = Capacity::default();
        for (steps, rows, tokens, busy) in [
            (1.0, 5.0, 0.0, 1.0),
            (100.0, 0.0, 1e5, 1e-6),
            (1e9, 1e9, 1e9, 1e3),
            (3.0, 0.0, 0.0, 9.0),
        ] {
            capacity.learn(&[Sample { steps, rows, prompt: tokens, busy }]);
            let StepTime { fixed, row, token } = capacity.step();
            assert!(
                [fixed, row, token].iter().all(|it| it.is_finite() && *it >= 0.0),
                "{capacity:?}"
            );
        }
    }
}
