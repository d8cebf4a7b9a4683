use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    block_size: 4,
    max_batch_tokens: 16,
    max_running: 6,
    max_waiting: 1000,
    max_model_len: 64,
};

fn sequence(id: SequenceId, work: Work, tokens: Vec<u32>) -> Sequence {
    Sequence::new(id, work, tokens, "", LIMITS.block_size)
}

/// Runs a plan as an engine would, with a made-up model: the next token is the length.
fn run(scheduler: &mut Scheduler, plan: &Plan) -> Vec<SequenceId> {
    let mut sampled = Vec::new();
    for chunk in &plan.chunks {
        scheduler.computed(chunk);
        if chunk.sample {
            let next = scheduler.get(chunk.id).unwrap().tokens.len() as u32;
            scheduler.push(chunk.id, next);
            sampled.push(chunk.id);
        }
    }
    sampled
}

#[derive(Clone, Debug)]
struct Arrival {
    step: usize,
    prefix: u32,
    length: usize,
    output: usize,
    work: u8,
    abort_after: Option<usize>,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    (0usize..30, 0u32..3, 1usize..30, 1usize..20, 0u8..4, prop::option::weighted(0.2, 0usize..15))
        .prop_map(|(step, prefix, length, output, work, abort_after)| Arrival {
            step, prefix, length, output, work, abort_after,
        })
}

proptest! {
    /// Whatever arrives: budgets hold, no block is written by two, everybody finishes, and at rest
    /// nobody holds a block.
    #[test]
    fn everybody_finishes_and_nothing_leaks(
        arrivals in prop::collection::vec(arrival(), 1..40),
        pool in 13usize..40,
    ) {
        let mut scheduler = Scheduler::new(LIMITS, pool);
        let mut left: HashMap<SequenceId, usize> = HashMap::new();
        let mut aborts: HashMap<SequenceId, usize> = HashMap::new();
        let mut pulling: Vec<SequenceId> = Vec::new();
        let mut finished = 0;
        let mut step = 0;
        while finished < arrivals.len() {
            for (id, arrival) in arrivals.iter().enumerate().filter(|(_, a)| a.step == step) {
                let id = id as SequenceId;
                // Prompts share prefixes by construction.
                let tokens: Vec<u32> = (0..arrival.length as u32).map(|i| arrival.prefix * 1000 + i).collect();
                let work = match arrival.work { 0 => Work::Prefill, 1 => Work::Pull { min_tokens: 8 }, _ => Work::Local };
                let max_len = tokens.len() + arrival.output;
                scheduler.add(sequence(id, work, tokens), max_len).unwrap();
                left.insert(id, if work == Work::Prefill { 1 } else { arrival.output });
                if let Some(after) = arrival.abort_after { aborts.insert(id, step + after); }
            }
            let plan = scheduler.schedule();
            let tokens: usize = plan.chunks.iter().map(|c| c.count).sum();
            prop_assert!(tokens <= LIMITS.max_batch_tokens);
            prop_assert!(scheduler.running() <= LIMITS.max_running);
            let mut written = HashSet::new();
            for chunk in &plan.chunks {
                let sequence = scheduler.get(chunk.id).unwrap();
                prop_assert_eq!(sequence.state, State::Running);
                prop_assert!(sequence.blocks.len() * LIMITS.block_size >= chunk.start + chunk.count);
                for position in chunk.start..chunk.start + chunk.count {
                    let block = sequence.blocks[position / LIMITS.block_size];
                    prop_assert!(written.insert((block, position % LIMITS.block_size)), "two writers");
                    prop_assert!(position / LIMITS.block_size >= sequence.committed, "a shared block written");
                }
            }
            pulling.extend(plan.admitted.iter().filter(|id| scheduler.get(**id).unwrap().state == State::Pulling));
            for id in run(&mut scheduler, &plan) {
                let remaining = left.get_mut(&id).unwrap();
                *remaining -= 1;
                if *remaining == 0 {
                    if scheduler.get(id).unwrap().work == Work::Prefill && id % 2 == 0 {
                        // The peer fetches at once or a little later.
                        scheduler.hold(id);
                        aborts.insert(id, step + 3);
                    } else {
                        scheduler.remove(id);
                        aborts.remove(&id);
                        finished += 1;
                    }
                }
            }
            // Pulls end after a while: in full, in part or not at all.
            if step % 3 == 0 {
                for id in pulling.drain(..) {
                    if let Some(sequence) = scheduler.get(id) {
                        let len = sequence.tokens.len();
                        scheduler.pulled(id, [0, len / 2, len - 1][id as usize % 3]);
                    }
                }
            }
            for id in aborts.iter().filter(|(_, at)| **at == step).map(|(id, _)| *id).collect::<Vec<_>>() {
                if scheduler.get(id).is_some() {
                    scheduler.remove(id);
                    finished += 1;
                }
            }
            step += 1;
            prop_assert!(step < 5000, "{} of {} finished", finished, arrivals.len());
        }
        prop_assert_eq!(scheduler.blocks().free(), pool);
        prop_assert_eq!((scheduler.waiting(), scheduler.running()), (0, 0));
    }
}

#[test]
fn a_running_stream_goes_before_prompts() {
    let mut scheduler = Scheduler::new(LIMITS, 64);
    scheduler.add(sequence(0, Work::Local, vec![1, 2, 3]), 20).unwrap();
    let plan = scheduler.schedule();
    run(&mut scheduler, &plan);
    scheduler.add(sequence(1, Work::Local, (100..150).collect()), 60).unwrap();
    let plan = scheduler.schedule();
    assert_eq!(plan.chunks[0], Chunk { id: 0, start: 3, count: 1, sample: true });
    assert_eq!(plan.chunks[1], Chunk { id: 1, start: 0, count: 15, sample: false });
}

#[test]
fn equal_prompts_are_computed_once() {
    let mut scheduler = Scheduler::new(LIMITS, 64);
    for id in 0..4 {
        scheduler.add(sequence(id, Work::Local, (0..40).collect()), 60).unwrap();
    }
    let mut computed = 0;
    while (0..4).any(|id| scheduler.get(id).unwrap().tokens.len() == 40) {
        let plan = scheduler.schedule();
        computed += plan.chunks.iter().filter(|c| c.start < 40).map(|c| c.count).sum::<usize>();
        run(&mut scheduler, &plan);
    }
    // The first computes all forty; the others only their last, part-filled block.
    assert_eq!(computed, 40 + 3 * 4);
}

#[test]
fn what_can_never_fit_is_refused_at_the_door() {
    let mut scheduler = Scheduler::new(LIMITS, 4);
    let refused = scheduler.add(sequence(0, Work::Local, vec![0; 10]), 18);
    assert_eq!(refused, Err(Refused::TooLong { needs: 18, has: 16 }));
    let mut limits = LIMITS;
    limits.max_waiting = 1;
    let mut scheduler = Scheduler::new(limits, 4);
    scheduler.add(sequence(0, Work::Local, vec![0; 10]), 16).unwrap();
    assert_eq!(scheduler.add(sequence(1, Work::Local, vec![0]), 2), Err(Refused::QueueFull));
}

#[test]
fn a_short_remainder_is_not_worth_a_pull() {
    let mut scheduler = Scheduler::new(LIMITS, 64);
    scheduler.add(sequence(0, Work::Pull { min_tokens: 10 }, (0..20).collect()), 30).unwrap();
    let plan = scheduler.schedule();
    assert_eq!((plan.admitted, plan.chunks), (vec![0], vec![]));
    scheduler.pulled(0, 20);
    assert_eq!(scheduler.get(0).unwrap().missing(), 0);
    scheduler.push(0, 7);
    let plan = scheduler.schedule();
    assert_eq!(plan.chunks, vec![Chunk { id: 0, start: 20, count: 1, sample: true }]);
    // The same prompt again has all but its last block cached.
    scheduler.add(sequence(1, Work::Pull { min_tokens: 10 }, (0..20).collect()), 30).unwrap();
    let plan = scheduler.schedule();
    assert_eq!(scheduler.get(1).unwrap().state, State::Running);
    assert!(plan.chunks.contains(&Chunk { id: 1, start: 16, count: 4, sample: true }));
}
