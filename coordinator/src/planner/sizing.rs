//! The smallest pool that keeps the promise.
//!
//! *First tokens.* Prompts that come to `c` workers wait as in a queue M/M/c: Erlang's C tells how
//! many wait at all, and their wait is exponential. Arrivals that come in bursts stretch it by
//! (cₐ² + cₛ²)/2 (Allen and Cunneen; Whitt, *Approximations for the GI/G/m queue*, 1993).
//!
//! *Tokens after them.* The sequences that decode at a time are Poisson distributed, whatever the
//! lengths of their answers (M/G/∞), so their p-th percentile is R + z√R: square-root staffing
//! (Halfin and Whitt 1981). Each worker gets a part of them, and a step of so many must be within
//! the promise.

use super::capacity::StepTime;
use super::settings::Slo;

/// No pool is planned to be busier: estimates are never so good.
const BUSIEST: f64 = 0.95;
/// Of the KV cache that is planned with.
const KV_FULL: f64 = 0.9;
/// The squared coefficient of variation of the work of prompts: 1 is that of the exponential
/// distribution. Published traces have 0.9 (Azure code) to 1.3 (Azure conversation).
const SERVICE_VARIATION: f64 = 1.0;

/// What a pool must do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Demand {
    /// Requests a second.
    pub requests: f64,
    /// Variance of their count of its mean.
    pub dispersion: f64,
    /// Prompt tokens that a request has computed here, in the mean.
    pub prompt: f64,
    /// Tokens that it generates here, in the mean.
    pub output: f64,
}

/// What a worker can do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Worker {
    /// The time of a step.
    pub step: StepTime,
    /// Seconds that a prompt token takes where nothing decodes.
    pub prompt_token: f64,
    /// Sequences that fit the KV cache, if known.
    pub sequences: Option<f64>,
}

/// The smallest number of workers, from `min` to `max`, that keeps `slo`; `max` when none does.
pub fn size(demand: &Demand, worker: &Worker, slo: &Slo, (min, max): (u32, u32)) -> u32 {
    let (mut low, mut high) = (min, min);
    // A larger pool is never worse: doubled until it is large enough, then halved.
    while high < max && !keeps(high, demand, worker, slo) {
        low = (high + 1).min(max);
        high = (2 * high).clamp(low, max);
    }
    while low < high {
        let middle = low + (high - low) / 2;
        match keeps(middle, demand, worker, slo) {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    low
}

/// Whether so many workers keep `slo`.
pub fn keeps(workers: u32, demand: &Demand, worker: &Worker, slo: &Slo) -> bool {
    if demand.requests <= 0.0 {
        return true;
    }
    if workers == 0 {
        return false;
    }
    let count = f64::from(workers);
    let each = demand.requests / count;
    let StepTime { fixed, row, .. } = worker.step;
    // Of a worker's time: for prompts, and for what each decoding sequence adds to steps.
    let prompts = each * demand.prompt * worker.prompt_token;
    let rows = each * demand.output * row;
    let left = 1.0 - prompts;
    if prompts + rows > BUSIEST {
        return false;
    }
    let mut decoding = 0.0;
    if demand.output > 1.0 {
        // Little: sequences = rate × time; their time is output × step, stretched by prompts.
        let sequences = each * demand.output * fixed / (left - rows);
        let spread = normal(slo.attainment) * (sequences * demand.dispersion / count).sqrt();
        let most = sequences + spread;
        let itl = (fixed + row * most) / left;
        // No number of workers makes a step shorter than its fixed part.
        let helps = fixed + row < slo.itl;
        if (helps && itl > slo.itl) || worker.sequences.is_some_and(|fit| most > KV_FULL * fit) {
            return false;
        }
        // While a prompt is computed, those who decode have their part of each step.
        decoding = rows;
    }
    if demand.prompt < 1.0 {
        return true;
    }
    let service = demand.prompt * worker.prompt_token / (1.0 - decoding);
    let load = demand.requests * service;
    let waits = erlang_c(workers, load);
    let variation = (demand.dispersion + SERVICE_VARIATION) / 2.0;
    let budget = slo.ttft - service;
    if budget <= 0.0 {
        // Prompts alone take longer: no number of workers helps, but they need not wait as well.
        return waits <= 1.0 - slo.attainment;
    }
    let late = waits * (-(count - load) / service * budget / variation).exp();
    late <= 1.0 - slo.attainment
}

/// The probability that an arrival of an M/M/c queue has to wait (Erlang's C), at a load in
/// Erlangs; 1 when it is overloaded.
pub fn erlang_c(servers: u32, load: f64) -> f64 {
    let count = f64::from(servers);
    if load >= count {
        return 1.0;
    }
    // Erlang's B by its recursion, which neither overflows nor cancels.
    let blocked = (1..=servers).fold(1.0, |b, k| load * b / (f64::from(k) + load * b));
    count * blocked / (count - load * (1.0 - blocked))
}

/// The quantile of the standard normal distribution: Abramowitz and Stegun 26.2.23, to 4.5e-4.
pub fn normal(probability: f64) -> f64 {
    let tail = probability.min(1.0 - probability).max(1e-12);
    let t = (-2.0 * tail.ln()).sqrt();
    let top = 2.515_517 + t * (0.802_853 + t * 0.010_328);
    let bottom = 1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308));
    let z = t - top / bottom;
    if probability < 0.5 { -z } else { z }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SLO: Slo = Slo { ttft: 1.0, itl: 0.05, attainment: 0.95 };

    fn worker() -> Worker {
        let step = StepTime { fixed: 0.015, row: 0.0003, token: 0.0001 };
        Worker { step, prompt_token: 0.0001, sequences: Some(200.0) }
    }

    #[test]
    fn erlangs_formula_gives_the_values_of_its_tables() {
        // One server: the utilization. Two at one Erlang: a third. Ten at eight: 0.409.
        for (servers, load, expected) in [(1, 0.7, 0.7), (2, 1.0, 1.0 / 3.0), (10, 8.0, 0.4092)] {
            let found = erlang_c(servers, load);
            assert!((found - expected).abs() < 1e-4, "{servers} {load}: {found}");
        }
        assert_eq!(erlang_c(3, 3.0), 1.0);
        assert!((0.0..1.0).contains(&erlang_c(5000, 4990.0)));
    }

    #[test]
    fn quantiles_are_those_of_the_table() {
        for (p, z) in [(0.5, 0.0), (0.95, 1.645), (0.99, 2.326), (0.05, -1.645)] {
            assert!((normal(p) - z).abs() < 1e-3, "{p}");
        }
    }

    #[test]
    fn a_thousand_workers_need_less_room_than_a_thousand_times_one() {
        let at = |requests: f64| {
            let demand = Demand { requests, dispersion: 1.0, prompt: 1000.0, output: 200.0 };
            size(&demand, &worker(), &SLO, (1, 100_000))
        };
        let (one, many) = (at(5.0), at(5000.0));
        assert!(many < 1000 * one && many > 400, "{one} {many}");
    }

    proptest! {
        #[test]
        fn more_load_never_needs_fewer_workers(
            requests in 0.0..500.0f64, prompt in 0.0..8000.0f64, output in 0.0..2000.0f64,
            dispersion in 1.0..20.0f64, more in 1.0..3.0f64, which in 0..4u8,
        ) {
            let less = Demand { requests, dispersion, prompt, output };
            let mut greater = less;
            match which {
                0 => greater.requests *= more,
                1 => greater.prompt *= more,
                2 => greater.output *= more,
                _ => greater.dispersion *= more,
            }
            let limits = (1, 2000);
            let (a, b) = (size(&less, &worker(), &SLO, limits), size(&greater, &worker(), &SLO, limits));
            prop_assert!(a <= b, "{less:?} needs {a}, {greater:?} {b}");
            prop_assert!(a == 2000 || keeps(a, &less, &worker(), &SLO));
            prop_assert!(a == 1 || !keeps(a - 1, &less, &worker(), &SLO));
        }
    }
}
