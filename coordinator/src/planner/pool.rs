//! One pool's part of a decision.

use std::collections::VecDeque;

use baton_proto::InstanceRole;
use serde::Serialize;

use super::capacity::Capacity;
use super::forecast::Forecast;
use super::load::{Interval, Looks};
use super::observed::{PoolId, PoolSeen, share_within};
use super::settings::{Limits, PlannerSettings, Slo};
use super::sizing::{Demand, Worker, size};
use super::steady::Steady;

/// The weight of an interval's mean lengths, when it has as many requests as [`ENOUGH`].
const LENGTHS: f64 = 0.15;
const ENOUGH: f64 = 30.0;
/// Over how many seconds kept and broken promises are counted, and how many must be there.
const KEPT_SECONDS: f64 = 60.0;
const KEPT_ENOUGH: u64 = 20;
/// How fast the correction rises while promises are broken, and falls while they are kept; and its
/// bounds.
const CORRECT_UP: f64 = 1.1;
const CORRECT_DOWN: f64 = 0.97;
const CORRECTION: (f64, f64) = (1.0, 2.0);
/// Broken promises are the load's only where workers are this busy, and steps this long, of what is
/// promised: else prompts are too long, or something else is slow, and more workers do not help.
const LOADED: f64 = 0.6;
/// A pool shrinks to a size that would do for this much more load: else it would grow again soon.
const COMFORT: f64 = 1.1;

/// What is known of a pool.
#[derive(Clone, Debug, Default)]
pub(super) struct PoolPlanner {
    looks: Looks,
    last_ms: Option<u64>,
    /// Seconds of an interval, smoothed.
    every: f64,
    arrivals: Forecast,
    capacity: Capacity,
    /// Mean lengths of requests here.
    prompt: Mean,
    output: Mean,
    /// KV blocks of a running sequence.
    blocks: Mean,
    startup: Option<f64>,
    kept: Kept,
    correction: Option<f64>,
    steady: Steady,
}

/// What a pool should have, before the budget and the pace.
pub(super) struct Wish {
    pub(super) size: u32,
    comfortable: u32,
    inputs: Inputs,
}

/// What is to be done with a pool, and all that it was made of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PoolDecision {
    /// Which.
    pub pool: PoolId,
    /// Workers that it has.
    pub size: u32,
    /// Workers that it needs, within its limits; and within the budget.
    pub wanted: u32,
    /// See `wanted`.
    pub granted: u32,
    /// The size to go to now; that which it has, when nothing is to be done.
    pub target: u32,
    /// The pool whose workers are to be the new ones; `None` when they are launched.
    pub donor: Option<PoolId>,
    /// Workers that it could do without now, and could for some time.
    pub spare: u32,
    /// Why.
    pub reason: String,
    /// From what it was decided.
    pub inputs: Inputs,
}

/// From what a pool's size was decided. Times are in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Inputs {
    /// Workers that answer.
    pub answering: u32,
    /// Requests a second in this interval, without noise, and expected until a worker that is
    /// started now serves.
    pub requests: f64,
    /// See `requests`.
    pub level: f64,
    /// See `requests`.
    pub expected: f64,
    /// Variance of arrivals of their mean.
    pub dispersion: f64,
    /// Means of a request: prompt tokens computed here, and tokens generated.
    pub prompt: f64,
    /// See `prompt`.
    pub output: f64,
    /// Tokens a second in this interval, likewise.
    pub prompt_tokens: f64,
    /// See `prompt_tokens`.
    pub output_tokens: f64,
    /// Sequences now.
    pub running: u64,
    /// See `running`.
    pub waiting: u64,
    /// Share of the KV blocks in use.
    pub kv_used: f64,
    /// Share of the interval that workers spent in steps.
    pub busy: f64,
    /// Share of the last minute's first tokens, and of the others, that kept the promise.
    pub ttft_kept: Option<f64>,
    /// See `ttft_kept`.
    pub itl_kept: Option<f64>,
    /// Learned: the time of a step, for each sequence in it, for each prompt token in it.
    pub step: f64,
    /// See `step`.
    pub step_row: f64,
    /// See `step`.
    pub step_token: f64,
    /// Learned: the time of a prompt token where nothing decodes.
    pub prompt_token: f64,
    /// Sequences that fit a worker's KV cache.
    pub sequences: Option<f64>,
    /// By how much more load is planned with, because promises were broken.
    pub correction: f64,
    /// How long a worker takes to start.
    pub startup: f64,
}

impl PoolPlanner {
    /// Takes a look, and says what the pool needs.
    pub(super) fn wish(
        &mut self,
        now_ms: u64,
        seen: &PoolSeen,
        limits: Limits,
        settings: &PlannerSettings,
    ) -> Wish {
        let seconds = self.last_ms.map_or(0.0, |last| now_ms.saturating_sub(last) as f64 / 1e3);
        let interval = self.looks.interval(seen, seconds);
        self.last_ms = Some(now_ms);
        if let Some(startup) = seen.startup {
            // The worst lately, forgotten slowly.
            self.startup = Some(self.startup.map_or(startup, |it| startup.max(0.9 * it)));
        }
        let startup = self.startup.unwrap_or(settings.startup);
        self.learn(&interval, seconds);
        self.kept.push(now_ms, seen, &interval);
        let (ttft_kept, itl_kept) = self.kept.shares(&settings.slo);
        let watched = match seen.pool.role {
            InstanceRole::Prefill => [ttft_kept, None],
            // Its first tokens wait for prefill workers.
            InstanceRole::Decode => [None, itl_kept],
            _ => [ttft_kept, itl_kept],
        };
        let count = seen.workers.len() as u32;
        let busy = match seconds > 0.0 {
            true => interval.busy / seconds / f64::from(count.max(1)),
            false => 0.0,
        };
        let steps: f64 = interval.samples.iter().map(|sample| sample.steps).sum();
        let step = if steps > 0.0 { interval.busy / steps } else { 0.0 };
        let loaded = match seen.pool.role {
            InstanceRole::Decode => step > LOADED * settings.slo.itl,
            _ => busy > LOADED,
        };
        let movable = seen.held.is_none() && loaded;
        let correction = self.correct(watched, movable, &settings.slo);
        // Workers that are started now serve after one start; the next are decided on then, and
        // serve after another.
        let ahead = if self.every > 0.0 { 2.0 * startup / self.every + 1.0 } else { 1.0 };
        let expected = self.arrivals.bound(ahead, settings.slo.attainment);
        let step = self.capacity.step();
        let sequences = (self.blocks.value > 0.0 && interval.kv_blocks > 0)
            .then(|| interval.kv_blocks as f64 / self.blocks.value);
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let inputs = Inputs {
            answering: count,
            requests: rate(interval.requests),
            level: self.arrivals.level(),
            expected,
            dispersion: self.arrivals.dispersion(),
            prompt: self.prompt.value,
            output: self.output.value,
            prompt_tokens: rate(interval.prompt_tokens),
            output_tokens: rate(interval.output_tokens),
            running: interval.running,
            waiting: interval.waiting,
            kv_used: interval.kv_used as f64
                / (interval.kv_blocks * u64::from(count)).max(1) as f64,
            busy,
            ttft_kept,
            itl_kept,
            step: step.fixed,
            step_row: step.row,
            step_token: step.token,
            prompt_token: self.capacity.prompt_token(),
            sequences,
            correction,
            startup,
        };
        let needed = |more: f64| match self.capacity.known() {
            true => self.needed(&inputs, seen.pool.role, (startup, more), limits, &settings.slo),
            // Nothing was ever asked of it.
            false => seen.size.clamp(limits.min, limits.max),
        };
        Wish { size: needed(1.0), comfortable: needed(COMFORT), inputs }
    }

    fn learn(&mut self, interval: &Interval, seconds: f64) {
        if seconds <= 0.0 {
            return;
        }
        self.every = if self.every > 0.0 { 0.9 * self.every + 0.1 * seconds } else { seconds };
        self.arrivals.push(interval.requests as f64, seconds);
        self.capacity.age(seconds);
        self.capacity.learn(&interval.samples);
        // Of those whose prompts were computed: in an overload far more come.
        let first: u64 = interval.ttft.iter().sum();
        self.prompt.push(interval.prompt_tokens as f64, first as f64);
        self.output.push(interval.output_tokens as f64, interval.finished as f64);
        self.blocks.push(interval.kv_used as f64, interval.running as f64);
    }

    /// Workers that keep the promise with the load that is expected.
    fn needed(
        &self,
        inputs: &Inputs,
        role: InstanceRole,
        (startup, more): (f64, f64),
        limits: Limits,
        slo: &Slo,
    ) -> u32 {
        let decodes = role != InstanceRole::Prefill;
        let mut demand = Demand {
            requests: inputs.expected * inputs.correction * more,
            dispersion: inputs.dispersion,
            prompt: inputs.prompt,
            output: if decodes { inputs.output } else { 0.0 },
        };
        let worker = Worker {
            step: self.capacity.step(),
            prompt_token: inputs.prompt_token,
            sequences: inputs.sequences.filter(|_| decodes),
        };
        // What waits is to be gone when those that are started now have been there for as long as
        // their start took.
        let service = demand.prompt * worker.prompt_token;
        let queue = if decodes { inputs.waiting } else { inputs.waiting + inputs.running } as f64;
        let in_time = f64::from(inputs.answering) * (slo.ttft / service.max(1e-9)).clamp(1.0, 1e6);
        let usual = if decodes { 0.0 } else { in_time };
        demand.requests += (queue - usual).max(0.0) / startup.max(self.every).max(10.0);
        size(&demand, &worker, slo, (limits.min, limits.max))
    }

    /// The factor by which load is planned higher, for what the model does not know. It moves only
    /// while the pool is as it was wanted: else it would count a lack twice.
    fn correct(&mut self, kept: [Option<f64>; 2], movable: bool, slo: &Slo) -> f64 {
        let correction = self.correction.get_or_insert(1.0);
        let worst = kept.into_iter().flatten().reduce(f64::min);
        if worst.is_some_and(|worst| worst < slo.attainment) && movable {
            *correction *= CORRECT_UP;
        } else {
            *correction *= CORRECT_DOWN;
        }
        *correction = correction.clamp(CORRECTION.0, CORRECTION.1);
        *correction
    }

    /// What is done, within the budget and at the pace of [`Steady`].
    pub(super) fn decide(
        &mut self,
        now_ms: u64,
        seen: &PoolSeen,
        limits: Limits,
        wish: Wish,
        granted: u32,
        settings: &PlannerSettings,
    ) -> PoolDecision {
        let times = ((settings.down_window * 1e3) as u64, (settings.cooldown * 1e3) as u64);
        let comfortable = wish.comfortable.min(granted.max(seen.size));
        let (next, why) = self.steady.next(now_ms, seen.size, (granted, comfortable), times);
        let mut reason = why.to_owned();
        if granted < wish.size {
            reason += &format!("; the budget leaves {granted} of {}", wish.size);
        } else if wish.size == limits.max && next == limits.max {
            reason += "; more is not allowed";
        }
        let mut target = next.clamp(limits.min, limits.max);
        let lately = self.steady.highest_since(now_ms.saturating_sub(times.1));
        let mut spare = seen.size.saturating_sub(lately.max(limits.min));
        if let Some(held) = &seen.held {
            (target, spare, reason) = (seen.size, 0, held.clone());
        }
        PoolDecision {
            pool: seen.pool.clone(),
            size: seen.size,
            wanted: wish.size,
            granted,
            target,
            donor: None,
            spare,
            reason,
            inputs: wish.inputs,
        }
    }
}

/// A ratio of two sums, in which older ones count less.
#[derive(Clone, Debug, Default)]
struct Mean {
    value: f64,
}

impl Mean {
    fn push(&mut self, sum: f64, count: f64) {
        if count <= 0.0 {
            return;
        }
        let weight = match self.value > 0.0 {
            true => LENGTHS * (count / ENOUGH).min(1.0),
            false => 1.0,
        };
        self.value += weight * (sum / count - self.value);
    }
}

/// The times of the last minute, of the pool at its present size.
#[derive(Clone, Debug, Default)]
struct Kept {
    intervals: VecDeque<Times>,
    size: u32,
}

/// First tokens, and the tokens after them, by their times.
#[derive(Clone, Debug, Default)]
struct Times {
    at_ms: u64,
    ttft: Vec<u64>,
    itl: Vec<u64>,
}

impl Kept {
    fn push(&mut self, now_ms: u64, seen: &PoolSeen, interval: &Interval) {
        if seen.size != self.size {
            // What was too slow with fewer workers says nothing of more.
            self.intervals.clear();
            self.size = seen.size;
        }
        let (ttft, itl) = (interval.ttft.clone(), interval.itl.clone());
        self.intervals.push_back(Times { at_ms: now_ms, ttft, itl });
        let oldest = now_ms.saturating_sub((KEPT_SECONDS * 1e3) as u64);
        self.intervals.retain(|it| it.at_ms >= oldest);
    }

    fn shares(&self, slo: &Slo) -> (Option<f64>, Option<f64>) {
        let share = |of: fn(&Times) -> &Vec<u64>, limit: f64| {
            let mut sum = Vec::new();
            for times in self.intervals.iter().map(of) {
                sum.resize(sum.len().max(times.len()), 0);
                sum.iter_mut().zip(times).for_each(|(sum, count)| *sum += count);
            }
            share_within(&sum, limit).filter(|_| sum.iter().sum::<u64>() >= KEPT_ENOUGH)
        };
        (share(|it| &it.ttft, slo.ttft), share(|it| &it.itl, slo.itl))
    }
}
