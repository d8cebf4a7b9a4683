//! The simulator against queues whose waits are known, and the planner in it.

use baton_coordinator::planner::capacity::StepTime;
use baton_coordinator::planner::sizing::erlang_c;
use baton_coordinator::planner::{Limits, PlannerSettings, PoolId, PoolSeen, Slo};
use baton_proto::InstanceRole::{Decode, Prefill, Unified};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::cluster::{Cluster, Outcomes};
use super::policy::{Planned, Policy, Size, Static};
use super::worker::Spec;
use super::workload::Arrival;

const FREE: StepTime = StepTime { fixed: 0.0, row: 0.0, token: 1e-9 };

fn spec(step: StepTime) -> Spec {
    Spec { step, chunk: 1e9, slots: 1_000_000, startup: 30.0, handoff: 0.0 }
}

/// Poisson arrivals, with lengths that `draw` makes.
fn arrivals(
    rate: f64,
    count: usize,
    seed: u64,
    mut draw: impl FnMut(&mut StdRng) -> (u32, u32),
) -> Vec<Arrival> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut at = 0.0;
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        at += exponential(&mut rng) / rate;
        let (prompt, output) = draw(&mut rng);
        all.push(Arrival { at, prompt, output });
    }
    all
}

fn exponential(rng: &mut StdRng) -> f64 {
    -(1.0 - rng.random::<f64>()).ln()
}

fn disaggregated(spec: Spec, sizes: (u32, u32), arrivals: &[Arrival]) -> Outcomes {
    Cluster::new(spec, &[(Prefill, sizes.0), (Decode, sizes.1)], arrivals).run(&mut Static)
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let all: Vec<f64> = values.collect();
    all.iter().sum::<f64>() / all.len() as f64
}

fn near(found: f64, expected: f64, part: f64) {
    assert!((found - expected).abs() <= part * expected, "found {found}, expected {expected}");
}

/// Pollaczek and Khinchine: with service S, always the same, the mean wait is ρS / 2(1 − ρ).
#[test]
fn one_prefill_worker_with_equal_prompts_is_the_queue_m_d_1() {
    let (service, load) = (0.1, 0.8);
    let step = StepTime { token: 1e-4, ..FREE };
    let all = arrivals(load / service, 400_000, 1, |_| (1000, 1));
    // In steps of any size: what matters is the rate.
    let outcomes = disaggregated(spec(step), (1, 1), &all);
    let wait = mean(outcomes.requests.iter().map(|it| it.times().0 - service));
    near(wait, load * service / (2.0 * (1.0 - load)), 0.03);
}

/// Erlang: with exponential service the mean wait before c servers is C(c, a) · S / (c − a).
#[test]
fn several_prefill_workers_are_the_queue_m_m_c() {
    let (service, workers, load) = (0.1, 8, 6.8);
    let step = StepTime { token: 1e-6, ..FREE };
    let prompt = |rng: &mut StdRng| ((exponential(rng) * service / 1e-6).max(1.0) as u32, 1);
    let all = arrivals(load / service, 400_000, 2, prompt);
    let outcomes = disaggregated(spec(step), (workers, 1), &all);
    let wait = mean(
        outcomes.requests.iter().zip(&all).map(|(it, a)| it.times().0 - f64::from(a.prompt) * 1e-6),
    );
    near(wait, erlang_c(workers, load) * service / (f64::from(workers) - load), 0.05);
    // And the tail is the one that the planner sizes by.
    let late =
        mean(
            outcomes.requests.iter().zip(&all).map(|(it, a)| {
                f64::from(u8::from(it.times().0 - f64::from(a.prompt) * 1e-6 > 0.1))
            }),
        );
    let tail = erlang_c(workers, load) * (-(f64::from(workers) - load) / service * 0.1).exp();
    near(late, tail, 0.05);
}

/// Little, in M/G/∞: where a batch takes no longer than one, λ · L · step sequences decode.
#[test]
fn decoding_with_steps_of_one_length_is_m_g_infinity() {
    let step = StepTime { fixed: 0.02, ..FREE };
    let all = arrivals(50.0, 100_000, 3, |rng| (1, 2 + (exponential(rng) * 200.0) as u32));
    let outcomes = Cluster::new(spec(step), &[(Prefill, 100), (Decode, 4)], &all).run(&mut Static);
    let output = mean(all.iter().map(|it| f64::from(it.output) - 1.0));
    near(outcomes.decoding, 50.0 * output * 0.02, 0.02);
    let itl = mean(outcomes.requests.iter().map(|it| it.times().1));
    near(itl, 0.02, 1e-6);
}

/// Where steps take as long as they have rows, a worker is a processor that is shared: a sequence of
/// so much work stays for work / (1 − ρ) in the mean, whatever the distribution (M/G/1-PS).
#[test]
fn decoding_with_steps_as_long_as_the_batch_is_processor_sharing() {
    let (row, load) = (0.001, 0.7);
    let step = StepTime { row, ..FREE };
    let all = arrivals(load / (200.0 * row), 300_000, 4, |rng| {
        (1, 1 + (exponential(rng) * 200.0).round().max(1.0) as u32)
    });
    let outcomes = disaggregated(spec(step), (20, 1), &all);
    let work = mean(all.iter().map(|it| (f64::from(it.output) - 1.0) * row));
    let rate = all.len() as f64 / all.last().unwrap().at;
    let stay = mean(outcomes.requests.iter().map(|it| it.last - it.first));
    near(stay, work / (1.0 - rate * work), 0.05);
}

#[test]
fn a_unified_worker_slows_its_streams_by_the_prompts_it_computes() {
    let step = StepTime { fixed: 0.01, row: 0.0001, token: 0.0001 };
    let spec = Spec { chunk: 512.0, ..spec(step) };
    // One stream, and prompts that are always being computed.
    let mut all = vec![Arrival { at: 0.0, prompt: 1, output: 200 }];
    all.extend((0..100).map(|_| Arrival { at: 0.5, prompt: 5110, output: 1 }));
    let outcomes = Cluster::new(spec, &[(Unified, 1)], &all).run(&mut Static);
    let alone = (0.5 / 0.0101f64).floor();
    let beside = 0.0101 + 0.0001 * 511.0;
    let (_, itl) = outcomes.requests[0].times();
    near(itl, (alone * 0.0101 + (199.0 - alone) * beside) / 199.0, 0.01);
}

/// Workers go to the pool that is to grow, back and forth: none is launched and none is lost.
#[test]
fn workers_that_change_their_role_go_on_being_paid_for_once() {
    struct Swap;
    impl Policy for Swap {
        fn every(&self) -> f64 {
            20.0
        }
        fn waits(&self) -> bool {
            true
        }
        fn decide(&mut self, now: f64, pools: &[PoolSeen]) -> Vec<Size> {
            let grows = ((now / 100.0) as usize) % 2;
            let mut sizes: Vec<Size> = pools.iter().map(|pool| pool.size.into()).collect();
            if pools.iter().all(|pool| pool.held.is_none()) {
                sizes[grows] = Size { target: 5, converts: true };
            }
            sizes
        }
    }
    let step = StepTime { fixed: 0.01, row: 0.0005, token: 0.0001 };
    let all = arrivals(6.0, 6000, 5, |rng| (rng.random_range(1..2000), rng.random_range(1..300)));
    let spec = Spec { chunk: 512.0, slots: 64, ..spec(step) };
    let pools = [(Prefill, 5), (Decode, 2)];
    let outcomes = Cluster::new(spec, &pools, &all).run(&mut Swap);
    assert!(outcomes.converted > 12, "{}", outcomes.converted);
    assert!(outcomes.requests.iter().all(|it| it.first > it.arrived && it.last >= it.first));
    assert!(outcomes.sizes.iter().all(|sizes| sizes.iter().sum::<u32>() <= 7));
    let over = all.last().expect("requests").at;
    near(outcomes.worker_seconds, 7.0 * over, 0.02);
}

#[test]
fn a_run_is_repeated_bit_for_bit_and_nothing_is_lost_when_pools_change() {
    struct Swing;
    impl Policy for Swing {
        fn every(&self) -> f64 {
            20.0
        }
        fn waits(&self) -> bool {
            true
        }
        fn decide(&mut self, now: f64, pools: &[PoolSeen]) -> Vec<Size> {
            let even = ((now / 100.0) as u32).is_multiple_of(2);
            vec![Size::from(if even { 2 } else { 5 }); pools.len()]
        }
    }
    let step = StepTime { fixed: 0.01, row: 0.0005, token: 0.0001 };
    let all = arrivals(8.0, 8000, 5, |rng| (rng.random_range(1..2000), rng.random_range(1..300)));
    for pools in [&[(Prefill, 2), (Decode, 2)][..], &[(Unified, 4)]] {
        let run = || {
            let spec = Spec { chunk: 512.0, slots: 64, ..spec(step) };
            Cluster::new(spec, pools, &all).run(&mut Swing)
        };
        let (one, two) = (run(), run());
        assert!(one.changes > 8, "{}", one.changes);
        assert_eq!(one.worker_seconds.to_bits(), two.worker_seconds.to_bits());
        for (a, b) in one.requests.iter().zip(&two.requests) {
            assert_eq!(
                (a.first.to_bits(), a.last.to_bits()),
                (b.first.to_bits(), b.last.to_bits())
            );
            assert!(a.first > a.arrived && a.last >= a.first, "{a:?}");
        }
    }
}

const SLO: Slo = Slo { ttft: 2.0, itl: 0.05, attainment: 0.95 };

fn gpu() -> Spec {
    let step = StepTime { fixed: 0.015, row: 0.0004, token: 0.0002 };
    Spec { step, chunk: 512.0, slots: 128, startup: 60.0, handoff: 0.02 }
}

fn planned(max: u32) -> PlannerSettings {
    let pool = |role| (PoolId { role, model: "m".into() }, Limits { min: 1, max });
    PlannerSettings::new(SLO, [pool(Prefill), pool(Decode)])
}

/// Conversations of the usual lengths.
fn lengths(rng: &mut StdRng) -> (u32, u32) {
    ((exponential(rng) * 1100.0) as u32 + 1, (exponential(rng) * 210.0) as u32 + 1)
}

#[test]
fn under_steady_load_the_planner_settles_and_keeps_the_promise() {
    let all = arrivals(10.0, 36_000, 6, lengths);
    let cluster = Cluster::new(gpu(), &[(Prefill, 2), (Decode, 2)], &all);
    let outcomes = cluster.run(&mut Planned::new(planned(50)));
    let settled = &outcomes.sizes[15..];
    let changes = settled.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(changes <= 4, "an hour of steady load: {:?}", outcomes.sizes);
    let late = Outcomes { requests: outcomes.requests[6000..].to_vec(), ..outcomes };
    let (both, ..) = late.attainment(&SLO);
    assert!(both >= 0.95, "{both}");
}

#[test]
fn a_step_of_load_is_answered_within_two_start_up_times() {
    let mut all = arrivals(4.0, 4800, 7, lengths);
    let from = all.last().unwrap().at;
    let step = arrivals(16.0, 16 * 900, 8, lengths);
    all.extend(step.iter().map(|it| Arrival { at: it.at + from, ..*it }));
    let cluster = Cluster::new(gpu(), &[(Prefill, 3), (Decode, 3)], &all);
    let outcomes = cluster.run(&mut Planned::new(planned(50)));
    let kept = |after: f64, until: f64| {
        let within =
            |it: &&super::cluster::Outcome| (from + after..from + until).contains(&it.arrived);
        mean(outcomes.requests.iter().filter(within).map(|it| {
            let (ttft, itl) = it.times();
            f64::from(u8::from(ttft <= SLO.ttft && itl <= SLO.itl))
        }))
    };
    // Two starts, and an interval each to see it.
    assert!(kept(140.0, 900.0) >= 0.95, "{} {:?}", kept(140.0, 900.0), outcomes.sizes);
}
