use baton_proto::v1::TokenSequence;
use proptest::prelude::*;

use super::*;

fn params() -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        top_p: 1.0,
        repetition_penalty: 1.0,
        max_tokens: 100,
        ..Default::default()
    }
}

fn draw(params: SamplingParams, logits: &[f32]) -> u32 {
    next(&mut Sampler::new(params, &[], &[], &[]), logits).id
}

fn next(sampler: &mut Sampler, logits: &[f32]) -> Token {
    match sampler.draw(&mut logits.to_vec(), &mut Scratch::default()) {
        Draw::Token(token) => token,
        other => panic!("{other:?}"),
    }
}

/// The tokens that may be drawn and their probabilities, by sorting everything.
fn reference(params: &SamplingParams, logits: &[f32]) -> Vec<(u32, f64)> {
    let weights = logits.iter().map(|&l| (f64::from(l) / f64::from(params.temperature)).exp());
    let mut all: Vec<(u32, f64)> = weights.enumerate().map(|(i, w)| (i as u32, w)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let largest = all[0].1;
    all.retain(|(_, w)| *w >= f64::from(params.min_p) * largest);
    if params.top_k > 0 {
        all.truncate(params.top_k as usize);
    }
    let total: f64 = all.iter().map(|(_, w)| w).sum();
    let mut sum = 0.0;
    let keep = all
        .iter()
        .take_while(|(_, w)| {
            let before = sum;
            sum += w;
            before < f64::from(params.top_p) * total
        })
        .count();
    all.truncate(keep.max(1));
    let total: f64 = all.iter().map(|(_, w)| w).sum();
    all.iter().map(|(id, w)| (*id, w / total)).collect()
}

proptest! {
    #[test]
    fn draws_only_what_the_filters_leave(
        logits in prop::collection::vec(-6f32..6.0, 2..400),
        temperature in 0.2f32..2.0, top_p in 0.05f32..1.0, top_k in 0u32..50, min_p in 0f32..0.5, seed: u64,
    ) {
        let params = SamplingParams { temperature, top_p, top_k, min_p, seed, ..params() };
        let allowed = reference(&params, &logits);
        let token = draw(params, &logits);
        // At the very edge of a threshold single precision may decide otherwise.
        let edge = allowed.last().unwrap().1 * 0.999;
        let weight = |id: u32| f64::from(logits[id as usize]) / f64::from(temperature);
        let least = allowed.iter().map(|(id, _)| weight(*id)).fold(f64::INFINITY, f64::min);
        prop_assert!(allowed.iter().any(|(id, _)| *id == token) || weight(token) >= least - 1e-3, "{token} {edge}");
    }

    #[test]
    fn greedy_is_the_lowest_of_the_largest(logits in prop::collection::vec(-3i8..3, 1..100)) {
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        let token = draw(SamplingParams { temperature: 0.0, ..params() }, &logits) as usize;
        prop_assert!(logits[..token].iter().all(|&l| l < logits[token]));
        prop_assert!(logits[token..].iter().all(|&l| l <= logits[token]));
    }

    #[test]
    fn log_probabilities_are_a_log_softmax(logits in prop::collection::vec(-20f32..20.0, 5..200), count in 0u32..5) {
        let mut sampler = Sampler::new(SamplingParams { logprobs: Some(count), ..params() }, &[], &[], &[]);
        let token = next(&mut sampler, &logits);
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let expected = |id: u32| f64::from(logits[id as usize]) - sum.ln();
        prop_assert!((f64::from(token.logprob.unwrap()) - expected(token.id)).abs() < 1e-4);
        prop_assert_eq!(token.top.len(), count as usize);
        for (i, top) in token.top.iter().enumerate() {
            prop_assert!((f64::from(top.logprob) - expected(top.id)).abs() < 1e-4);
            let above = logits.iter().filter(|&&l| l > logits[top.id as usize]).count();
            prop_assert!(above <= i);
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [0.0, 1.0, -1.0, 2.0, 0.5, -3.0];
    for settings in [
        params(),
        SamplingParams { temperature: 0.7, ..params() },
        SamplingParams { top_k: 4, ..params() },
        SamplingParams { top_p: 0.9, ..params() },
        SamplingParams { min_p: 0.1, temperature: 1.3, ..params() },
    ] {
        const DRAWS: usize = 40_000;
        let mut counts = [0usize; 6];
        // Half by seed, half by index: both must be random.
        for i in 0..DRAWS as u64 {
            let mut sampler =
                Sampler::new(SamplingParams { seed: i / 2, ..settings.clone() }, &[], &[], &[]);
            sampler.drawn = (i % 2) as u32;
            counts[next(&mut sampler, &logits).id as usize] += 1;
        }
        let expected = reference(&settings, &logits);
        let mut chi_square = 0.0;
        for (id, p) in &expected {
            let wanted = p * DRAWS as f64;
            chi_square += (counts[*id as usize] as f64 - wanted).powi(2) / wanted;
        }
        assert_eq!(expected.iter().map(|(id, _)| counts[*id as usize]).sum::<usize>(), DRAWS);
        // The 99.99th percentile of chi-square with five degrees of freedom is 25.7.
        assert!(chi_square < 25.7, "{settings:?}: {chi_square}");
    }
}

#[test]
fn a_draw_depends_on_seed_and_index_alone() {
    let logits = vec![0.0; 50_000];
    let settings = SamplingParams { seed: 7, ..params() };
    let mut whole = Sampler::new(settings.clone(), &[], &[], &[]);
    let drawn: Vec<u32> = (0..10).map(|_| next(&mut whole, &logits).id).collect();
    let mut resumed = Sampler::new(settings, &[], &[], &drawn[..4]);
    let rest: Vec<u32> = (0..6).map(|_| next(&mut resumed, &logits).id).collect();
    assert_eq!(rest, drawn[4..]);
    assert_ne!(drawn[0], drawn[1]);
}

#[test]
fn penalties_bias_and_minimum_length() {
    let greedy = SamplingParams { temperature: 0.0, ..params() };
    let after = |params: SamplingParams, prompt: &[u32], output: &[u32], logits: &[f32]| {
        next(&mut Sampler::new(params, &[9], prompt, output), logits).id
    };
    // Repetition: prompt and output, positive logits divided, negative multiplied.
    let repetition = SamplingParams { repetition_penalty: 2.0, ..greedy.clone() };
    assert_eq!(after(repetition.clone(), &[0], &[], &[3.0, 2.0]), 1);
    assert_eq!(after(repetition.clone(), &[], &[0], &[3.0, 2.0]), 1);
    assert_eq!(after(repetition.clone(), &[0], &[0], &[4.5, 2.0]), 0, "once, not twice");
    assert_eq!(after(repetition, &[0], &[], &[-1.0, -1.5]), 1);
    // Presence and frequency: output only.
    let presence = SamplingParams { presence_penalty: 1.0, ..greedy.clone() };
    assert_eq!(after(presence.clone(), &[0], &[], &[3.0, 2.5]), 0);
    assert_eq!(after(presence, &[], &[0], &[3.0, 2.5]), 1);
    let frequency = SamplingParams { frequency_penalty: 0.3, ..greedy.clone() };
    assert_eq!(after(frequency.clone(), &[], &[0], &[3.0, 2.5]), 0);
    assert_eq!(after(frequency, &[], &[0, 0], &[3.0, 2.5]), 1);
    let bias = SamplingParams { logit_bias: [(1, 5.0)].into(), ..greedy.clone() };
    assert_eq!(after(bias, &[], &[], &[3.0, 0.0]), 1);
    // Bias first: 2 + 2 is halved to 2, where 2 halved and 2 would be 3.
    let both =
        SamplingParams { repetition_penalty: 2.0, logit_bias: [(0, 2.0)].into(), ..greedy.clone() };
    assert_eq!(after(both.clone(), &[0], &[], &[2.0, 2.5]), 1);
    assert_eq!(after(both, &[0], &[], &[2.0, 1.5]), 0);
    // Token 9 is EOS, 8 a stop token: neither before the minimum.
    let mut logits = [0.0; 10];
    (logits[9], logits[8], logits[3]) = (5.0, 4.0, 3.0);
    let minimum = SamplingParams { min_tokens: 2, stop_token_ids: vec![8], ..greedy };
    assert_eq!(after(minimum.clone(), &[], &[1], &logits), 3);
    assert_eq!(after(minimum, &[], &[1, 2], &logits), 9);
}

#[test]
fn extremes_leave_the_likeliest_of_what_may_come() {
    for top_p in [1.0, 0.9] {
        for seed in 0..20 {
            // Two of these overflow, one of which is not allowed.
            let repetition = SamplingParams {
                repetition_penalty: f32::MIN_POSITIVE,
                allowed_token_ids: vec![1, 2],
                top_p,
                seed,
                ..params()
            };
            let mut sampler = Sampler::new(repetition, &[], &[0, 1], &[]);
            assert_eq!(next(&mut sampler, &[9.0, 8.0, 1.0, 0.5]).id, 1);
            let cold = SamplingParams { temperature: 1e-40, top_p, seed, ..params() };
            assert!([1, 2].contains(&draw(cold, &[1.0, 2.0, 2.0, 0.0])));
        }
    }
    let sharp = SamplingParams { top_p: 0.0, ..params() };
    assert_eq!(draw(sharp, &[1.0, 3.0, 2.0]), 1);
}

#[test]
fn logits_that_are_no_numbers_or_infinite_are_told() {
    for broken in [f32::NAN, f32::INFINITY] {
        for temperature in [0.0, 1.0] {
            let params = SamplingParams { temperature, ..params() };
            let mut sampler = Sampler::new(params, &[], &[], &[]);
            let drawn = sampler.draw(&mut [1.0, broken, 2.0], &mut Scratch::default());
            assert!(matches!(drawn, Draw::NotANumber), "{broken}: {drawn:?}");
        }
    }
    // Some models rule tokens out themselves.
    assert_eq!(draw(params(), &[f32::NEG_INFINITY, 1.0]), 1);
}

fn words(words: &[&[u32]]) -> Vec<TokenSequence> {
    words.iter().map(|word| TokenSequence { token_ids: word.to_vec() }).collect()
}

#[test]
fn only_allowed_tokens_are_drawn() {
    let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32).collect();
    let allowed_token_ids = vec![3, 31, 32, 64, 95];
    for temperature in [0.0, 1.0] {
        for top_k in [0, 50] {
            let mut seen = std::collections::BTreeSet::new();
            for seed in 0..300 {
                let allowed_token_ids = allowed_token_ids.clone();
                let params =
                    SamplingParams { temperature, top_k, seed, allowed_token_ids, ..params() };
                seen.insert(draw(params, &logits));
            }
            // Of their logits, 3, 3, 4, 1 and 4, the first of the largest.
            let expected = if temperature == 0.0 { vec![32] } else { allowed_token_ids.clone() };
            assert_eq!(seen.into_iter().collect::<Vec<_>>(), expected);
        }
    }
    // The logprob is the model's own, over all tokens.
    let params = SamplingParams { allowed_token_ids, logprobs: Some(1), ..params() };
    let token = next(&mut Sampler::new(params, &[], &[], &[]), &logits);
    assert_eq!(logits[token.top[0].id as usize], 6.0);
}

#[test]
fn a_bad_word_is_forbidden_where_it_would_be_completed() {
    let greedy = SamplingParams { temperature: 0.0, ..params() };
    let logits = [1.0, 2.0, 3.0, 4.0];
    let after = |bad: &[&[u32]], output: &[u32]| {
        let params = SamplingParams { bad_words: words(bad), ..greedy.clone() };
        // The prompt does not count.
        next(&mut Sampler::new(params, &[], &[0, 1, 2], output), &logits).id
    };
    assert_eq!(after(&[&[3]], &[]), 2, "one token: always");
    assert_eq!(after(&[&[2, 3]], &[]), 3);
    assert_eq!(after(&[&[2, 3]], &[2]), 2);
    assert_eq!(after(&[&[2, 3]], &[2, 1]), 3);
    assert_eq!(after(&[&[0, 1, 2, 3]], &[0, 1, 2]), 2);
    assert_eq!(after(&[&[0, 1, 2, 3]], &[1, 2]), 3, "not the prompt's");
    assert_eq!(after(&[&[0, 1, 2, 3], &[2, 2], &[3]], &[9, 0, 1, 2]), 1);
    // As it is drawn, too.
    let params = SamplingParams { bad_words: words(&[&[3, 3], &[2, 2, 2]]), ..greedy };
    let mut sampler = Sampler::new(params, &[], &[], &[]);
    let drawn: Vec<u32> = (0..6).map(|_| next(&mut sampler, &logits).id).collect();
    assert_eq!(drawn, [3, 2, 3, 2, 3, 2]);
}

#[test]
fn where_nothing_may_come_the_sequence_ends_or_says_why_it_cannot() {
    let settings = SamplingParams { allowed_token_ids: vec![9], min_tokens: 5, ..params() };
    // Only the end is allowed, and `min_tokens` holds it off: it comes all the same.
    let mut sampler = Sampler::new(settings.clone(), &[9], &[], &[]);
    let token = next(&mut sampler, &[0.0; 10]);
    assert!(token.id == 9 && sampler.ends_with(9));
    // Tokens that are allowed but forbidden.
    for temperature in [0.0, 1.0] {
        let settings =
            SamplingParams { temperature, bad_words: words(&[&[9]]), ..settings.clone() };
        let mut sampler = Sampler::new(settings, &[9], &[], &[]);
        let drawn = sampler.draw(&mut [0.0; 10], &mut Scratch::default());
        assert!(matches!(&drawn, Draw::Stuck(why) if why.contains("bad_words")), "{drawn:?}");
    }
}

proptest! {
    #[test]
    fn a_score_is_a_log_softmax_and_a_rank(
        logits in prop::collection::vec(-20f32..20.0, 5..200), token in 0usize..5, count in 0usize..300,
    ) {
        let scored = score(&logits, token as u32, count, &mut Scratch::default());
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        prop_assert!((f64::from(scored.logprob) - f64::from(logits[token]) + sum.ln()).abs() < 1e-4);
        prop_assert_eq!(scored.top.len(), count.min(logits.len()));
        let above = logits.iter().filter(|logit| **logit > logits[token]).count();
        prop_assert!(scored.rank as usize > above);
        if count > above {
            prop_assert_eq!(scored.top[above].logprob, scored.logprob);
        }
    }
}
