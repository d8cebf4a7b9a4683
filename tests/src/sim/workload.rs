//! Requests and when they come.

use rand::{Rng, RngExt as _};

use crate::load::trace::Timed;

/// A request, `at` so many seconds after the beginning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    /// When it comes.
    pub at: f64,
    /// Tokens of its prompt that must be computed.
    pub prompt: u32,
    /// Tokens of its answer.
    pub output: u32,
}

/// A trace at `rate` times its rate: each request so many times, the copies within half a minute of
/// it.
pub fn multiplied(trace: &[Timed], rate: f64, rng: &mut impl Rng) -> Vec<Arrival> {
    let mut all = Vec::with_capacity((trace.len() as f64 * rate) as usize + 1);
    for it in trace {
        let copies = rate.floor() as u32 + u32::from(rng.random_bool(rate.fract()));
        for copy in 0..copies {
            let jitter = if copy == 0 { 0.0 } else { rng.random_range(-15.0..15.0) };
            all.push(arrival(it, (it.at + jitter).max(0.0)));
        }
    }
    all.sort_by(|a, b| a.at.total_cmp(&b.at));
    all
}

/// A day that a trace does not have: requests of its lengths, as a Poisson process whose rate is
/// lowest at night, twice as high in the afternoon as in the morning, and doubles for ten minutes
/// now and then. `mean` requests a second in the mean, `hours` for the whole day.
pub fn day(trace: &[Timed], mean: f64, hours: f64, rng: &mut impl Rng) -> Vec<Arrival> {
    let seconds = hours * 3600.0;
    let shape = |at: f64| {
        let hour = at / seconds * 24.0;
        let bump = |middle: f64, width: f64| (-((hour - middle) / width).powi(2)).exp();
        let burst = [8.5, 13.2, 17.9].iter().any(|from| (*from..from + 1.0 / 6.0).contains(&hour));
        (0.15 + 0.9 * bump(10.5, 2.0) + 1.6 * bump(15.5, 2.5)) * if burst { 2.0 } else { 1.0 }
    };
    let points: Vec<f64> = (0..24_000).map(|i| shape(f64::from(i) / 24_000.0 * seconds)).collect();
    let average = points.iter().sum::<f64>() / points.len() as f64;
    let most = points.iter().copied().fold(0.0, f64::max);
    let mut all = Vec::new();
    let mut at = 0.0;
    loop {
        // Thinning (Lewis and Shedler 1979).
        at -= (1.0 - rng.random::<f64>()).ln() / (most * mean / average);
        if at >= seconds {
            return all;
        }
        if rng.random::<f64>() * most < shape(at) {
            all.push(arrival(&trace[rng.random_range(..trace.len())], at));
        }
    }
}

fn arrival(it: &Timed, at: f64) -> Arrival {
    let (prompt, output) = (it.lengths.prompt - it.cached, it.lengths.answer.max(1));
    Arrival { at, prompt: prompt.max(1) as u32, output: output as u32 }
}
