//! The planner as a whole, by property.

use baton_proto::{InstanceRole, LATENCY_US};
use proptest::prelude::*;

use super::*;

const SLO: Slo = Slo { ttft: 1.0, itl: 0.05, attainment: 0.95 };

fn pool(role: InstanceRole) -> PoolId {
    PoolId { role, model: "m".into() }
}

fn settings(min: u32, max: u32) -> PlannerSettings {
    let limits = Limits { min, max };
    PlannerSettings::new(
        SLO,
        [(pool(InstanceRole::Prefill), limits), (pool(InstanceRole::Decode), limits)],
    )
}

/// Workers that do what they are asked at once, as long as they can.
struct Fake {
    size: u32,
    role: InstanceRole,
    each: Vec<Counters>,
}

const PROMPT: u64 = 1000;
const OUTPUT: u64 = 200;
/// Seconds of a prompt token, of a step, and of a sequence in it.
const TIMES: (f64, f64, f64) = (0.0002, 0.015, 0.0004);

impl Fake {
    fn new(role: InstanceRole, size: u32) -> Self {
        Self { size, role, each: Vec::new() }
    }

    /// Ten seconds at so many requests a second.
    fn run(&mut self, rate: f64) {
        self.each.resize(self.size as usize, Counters::default());
        let (token, fixed, row) = TIMES;
        let each = rate * 10.0 / f64::from(self.size.max(1));
        for it in &mut self.each {
            it.ttft.resize(LATENCY_US.len() + 1, 0);
            it.itl.resize(LATENCY_US.len() + 1, 0);
            it.kv_blocks = 1000;
            it.requests += each as u64;
            it.finished += each as u64;
            if self.role == InstanceRole::Prefill {
                let work = each * PROMPT as f64 * token;
                it.prompt_tokens += (work.min(10.0) / token) as u64;
                it.busy_us += (work.min(10.0) * 1e6) as u64;
                it.steps += (work.min(10.0) / (token * 500.0)) as u64;
                let done = each * (10.0 / work.max(1e-9)).min(1.0);
                it.ttft[observed::bucket(if work < 9.0 { 0.4 } else { 5.0 })] += done as u64;
            } else {
                let tokens = each * OUTPUT as f64 / 10.0;
                let rows = (tokens * fixed / (1.0 - tokens * row).max(0.01)).min(200.0);
                let step = fixed + row * rows;
                it.running = rows as u32;
                it.kv_used = rows as u64 * 4;
                it.steps += (10.0 / step) as u64;
                it.rows += (10.0 / step * rows) as u64;
                it.output_tokens += (10.0 / step * rows) as u64;
                it.busy_us += 10_000_000;
                it.itl[observed::bucket(step)] += (10.0 / step * rows) as u64;
            }
        }
    }

    fn seen(&self) -> PoolSeen {
        let workers = self
            .each
            .iter()
            .enumerate()
            .map(|(i, counters)| WorkerSeen { id: i.to_string(), counters: counters.clone() });
        PoolSeen {
            pool: pool(self.role),
            size: self.size,
            workers: workers.collect(),
            startup: None,
            held: None,
        }
    }
}

/// Runs both pools under these rates, ten seconds each; gives their sizes after each.
fn play(settings: PlannerSettings, start: u32, rates: &[f64]) -> Vec<(u32, u32)> {
    let mut planner = Planner::new(settings);
    let mut prefill = Fake::new(InstanceRole::Prefill, start);
    let mut decode = Fake::new(InstanceRole::Decode, start);
    let mut sizes = Vec::new();
    for (i, rate) in rates.iter().enumerate() {
        prefill.run(*rate);
        decode.run(*rate);
        let decision = planner.observe(i as u64 * 10_000, &[prefill.seen(), decode.seen()]);
        (prefill.size, decode.size) = (decision.pools[0].target, decision.pools[1].target);
        sizes.push((prefill.size, decode.size));
    }
    sizes
}

#[test]
fn steady_load_changes_nothing_once_the_size_is_found() {
    let sizes = play(settings(1, 100), 1, &[40.0; 400]);
    let last = sizes[399];
    // Forty prompts of 0.2 s each; forty answers of 200 tokens.
    assert!((9..=12).contains(&last.0) && (4..=8).contains(&last.1), "{last:?}");
    // It only comes down, as the margin finds that nothing is ever exceeded, and then stays.
    let down = |pair: &[(u32, u32)]| pair[1].0 <= pair[0].0 && pair[1].1 <= pair[0].1;
    assert!(sizes[30..].windows(2).all(down), "{sizes:?}");
    assert!(sizes[200..].iter().all(|size| *size == last), "{sizes:?}");
}

#[test]
fn a_step_of_load_is_followed_within_a_few_decisions_and_back_after_the_window() {
    let rates = [vec![10.0; 100], vec![80.0; 60], vec![10.0; 200]].concat();
    let sizes = play(settings(1, 200), 4, &rates);
    assert!(sizes[106].0 > 16 && sizes[106].1 > 6, "{:?}", &sizes[95..110]);
    assert!(sizes[160].0 > 16, "not before the window is over: {:?}", &sizes[150..200]);
    assert!(sizes[359].0 <= sizes[99].0 + 1, "{:?} {:?}", sizes[99], sizes[359]);
}

#[test]
fn a_pool_that_is_held_or_has_no_limits_is_left_alone() {
    let mut planner = Planner::new(PlannerSettings::new(
        SLO,
        [(pool(InstanceRole::Decode), Limits { min: 3, max: 9 })],
    ));
    let (prefill, decode) =
        (Fake::new(InstanceRole::Prefill, 1).seen(), Fake::new(InstanceRole::Decode, 1).seen());
    let held = PoolSeen { held: Some("an operation runs".into()), ..decode.clone() };
    let decision = planner.observe(0, &[prefill.clone(), held]);
    assert_eq!(decision.pools.len(), 1);
    assert_eq!(
        (decision.pools[0].target, decision.pools[0].reason.as_str()),
        (1, "an operation runs")
    );
    let decision = planner.observe(10_000, &[prefill, decode]);
    assert_eq!(decision.pools[0].target, 3, "its least size, whatever is known");
}

/// First prompts are long and answers short, then it is the other way round.
#[test]
fn what_one_pool_has_to_spare_goes_to_the_other_at_once() {
    let play = |convert: bool| {
        let mut planner = Planner::new(PlannerSettings { convert, ..settings(1, 100) });
        let mut prefill = Fake::new(InstanceRole::Prefill, 8);
        let mut decode = Fake::new(InstanceRole::Decode, 2);
        let mut moved = Vec::new();
        for i in 0..60u64 {
            let (prompts, answers) = if i < 30 { (30.0, 10.0) } else { (4.0, 80.0) };
            prefill.run(prompts);
            decode.run(answers);
            let decision = planner.observe(i * 10_000, &[prefill.seen(), decode.seen()]);
            let [before, after] = [&decision.pools[0], &decision.pools[1]];
            if let Some(donor) = &after.donor {
                assert_eq!(*donor, pool(InstanceRole::Prefill));
                assert_eq!(before.target, before.size, "it is not scaled down too: {before:?}");
                moved.push((i, after.target - after.size));
                prefill.size -= after.target - after.size;
            } else {
                prefill.size = before.target;
            }
            decode.size = after.target;
        }
        moved
    };
    let moved = play(true);
    assert!(moved.iter().any(|(at, _)| (30..45).contains(at)), "{moved:?}");
    assert!(moved.iter().all(|(at, _)| *at >= 30), "not while both have enough to do: {moved:?}");
    assert_eq!(play(false), []);
}

#[test]
fn a_budget_is_divided_and_never_exceeded() {
    assert_eq!(within_budget(&[(1, 5), (1, 7)], None), [5, 7]);
    assert_eq!(within_budget(&[(1, 5), (1, 7)], Some(12)), [5, 7]);
    assert_eq!(within_budget(&[(1, 5), (1, 7)], Some(7)), [3, 4]);
    assert_eq!(within_budget(&[(2, 2), (1, 9)], Some(6)), [2, 4]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sizes_stay_within_limits_and_budget_whatever_happens(
        rates in prop::collection::vec(0.0..300.0f64, 1..80),
        min in 1..4u32, more in 0..30u32, spare in 0..20u32,
    ) {
        let mut settings = settings(min, min + more);
        settings.budget = Some(2 * min + spare);
        settings.down_window = 60.0;
        for (prefill, decode) in play(settings, min, &rates) {
            prop_assert!((min..=min + more).contains(&prefill));
            prop_assert!((min..=min + more).contains(&decode));
            prop_assert!(prefill + decode <= 2 * min + spare);
        }
    }

    #[test]
    fn more_load_never_ends_in_a_smaller_pool(rate in 4.0..60.0f64, factor in 1.0..4.0f64) {
        let less = *play(settings(1, 500), 10, &[rate; 150]).last().unwrap();
        let more = *play(settings(1, 500), 10, &[rate * factor; 150]).last().unwrap();
        // Requests are counted in whole ones for each worker.
        prop_assert!(less.0 <= more.0 + 1 && less.1 <= more.1 + 1, "{less:?} {more:?}");
    }

    #[test]
    fn no_counters_make_it_panic_or_leave_the_limits(
        numbers in prop::collection::vec(prop::collection::vec(any::<u64>(), 12), 1..12),
    ) {
        let mut planner = Planner::new(settings(1, 7));
        for (i, n) in numbers.iter().enumerate() {
            let counters = Counters {
                running: n[0] as u32, waiting: n[1] as u32, kv_blocks: n[2] >> 8, kv_used: n[3] >> 8,
                requests: n[4] >> 8, finished: n[5] >> 8, output_tokens: n[6] >> 8,
                prompt_tokens: n[7] >> 8, steps: n[8] >> 8, rows: n[9] >> 8, busy_us: n[10] >> 8,
                ttft: vec![n[11] >> 8; 35], itl: vec![n[0] >> 8; 35],
            };
            let workers = vec![WorkerSeen { id: "a".into(), counters }];
            let seen = PoolSeen {
                pool: pool(InstanceRole::Decode), size: 1, workers, startup: None, held: None,
            };
            let decision = planner.observe(i as u64 * 1000, &[seen]);
            prop_assert!((1..=7).contains(&decision.pools[0].target), "{decision:?}");
        }
    }
}
