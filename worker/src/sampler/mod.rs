//! Draws the next token from a row of logits.
//!
//! The order is vLLM's: bias, penalties, temperature, min-p, top-k, top-p, draw. vLLM forbids
//! tokens before the penalties, and here it is done after them, which comes to the same. The draw
//! for output token *i* depends on `(seed, i)` alone, so a request that is resumed, preempted or
//! handed over draws what it would have drawn. The vocabulary is never sorted: top-k and top-p work
//! on the candidates that a selection or a threshold leaves.

mod speech;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::v1::{
    PromptTokenLogprob, SamplingParams, SpeechCard, SpeechRules, Token, TokenLogprob,
};

use self::speech::Speech;
use crate::constraint::{Session, State};

/// Lower temperatures are raised to this: with it the likeliest token is the only one unless others
/// are all but as likely, and no weight is infinite.
const MIN_TEMPERATURE: f32 = 1e-5;

/// Memory that draws work in; any sampler may use it. Grown to the vocabulary and kept.
#[derive(Default)]
pub struct Scratch {
    /// Tokens and their weights.
    candidates: Vec<(u32, f32)>,
    /// Logits before any adjustment.
    raw: Vec<f32>,
    /// Tokens, to be put in order.
    order: Vec<u32>,
    /// Draws under a constraint.
    pub constrained: u64,
    /// Time that they stood still until what may follow was known.
    pub waited: Duration,
}

/// What comes of a draw.
#[derive(Debug)]
pub enum Draw {
    /// The next token.
    Token(Token),
    /// The constraint is fulfilled, nothing can follow, and the model has no token that says so.
    Over,
    /// There is no token that may come, for this reason.
    Stuck(String),
    /// The logits are none: something overflowed, or the weights are broken.
    NotANumber,
}

/// How one sequence is sampled: its parameters and what the penalties must remember.
pub struct Sampler {
    params: SamplingParams,
    /// Tokens that end the sequence; kept off until `min_tokens`.
    ends: Vec<u32>,
    /// The model's own among them, those of `ignore_eos` included.
    eos: Vec<u32>,
    /// The tokens of `allowed_token_ids`, a bit for each. Empty when all are allowed.
    allowed: Vec<u32>,
    /// The last output tokens, as many as the longest of `bad_words` looks back.
    tail: Vec<u32>,
    look_back: usize,
    constraint: Option<Session>,
    /// Present under rules of transcripts.
    speech: Option<Speech>,
    /// Prompt tokens, once each: for the repetition penalty. Empty when that is off.
    prompt: Vec<u32>,
    /// Output tokens and how often. Empty when no penalty is on.
    output: HashMap<u32, u32>,
    drawn: u32,
}

impl Sampler {
    /// A sampler that goes on after `output`.
    pub fn new(params: SamplingParams, eos: &[u32], prompt: &[u32], output: &[u32]) -> Self {
        let mut ends = params.stop_token_ids.clone();
        ends.extend(eos.iter().filter(|_| !params.ignore_eos));
        let look_back = params.bad_words.iter().map(|word| word.token_ids.len()).max();
        let look_back = look_back.unwrap_or(0).saturating_sub(1);
        let mut sampler = Self {
            ends,
            eos: eos.to_vec(),
            allowed: bits(&params.allowed_token_ids),
            tail: Vec::with_capacity(look_back),
            look_back,
            constraint: None,
            speech: None,
            prompt: Vec::new(),
            output: HashMap::new(),
            drawn: 0,
            params,
        };
        if sampler.repetition() {
            sampler.prompt = prompt.to_vec();
            sampler.prompt.sort_unstable();
            sampler.prompt.dedup();
        }
        output.iter().for_each(|&token| sampler.record(token));
        sampler
    }

    /// Draws under a constraint, which has seen the output so far. Its end is the sequence's,
    /// whatever `min_tokens` and `ignore_eos` say.
    pub fn constrain(&mut self, constraint: Session) {
        self.constraint = Some(constraint);
    }

    /// Draws under the rules of transcripts, after `output`.
    pub fn follow(&mut self, rules: &SpeechRules, card: Arc<SpeechCard>, output: &[u32]) {
        let mut speech = Speech::new(rules, card, self.eos.first().copied());
        output.iter().for_each(|&token| speech.record(token));
        self.speech = Some(speech);
    }

    /// Whether a token that was drawn ends the sequence.
    pub fn ends_with(&self, token: u32) -> bool {
        self.ends.contains(&token) || (self.constraint.is_some() && self.eos.contains(&token))
    }

    /// Output tokens so far.
    pub fn drawn(&self) -> u32 {
        self.drawn
    }

    /// The request's parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Counts a token that was drawn elsewhere.
    pub fn record(&mut self, token: u32) {
        self.drawn += 1;
        if self.penalized() {
            *self.output.entry(token).or_default() += 1;
        }
        if let Some(speech) = &mut self.speech {
            speech.record(token);
        }
        if self.look_back > 0 {
            if self.tail.len() == self.look_back {
                self.tail.remove(0);
            }
            self.tail.push(token);
        }
        if let Some(constraint) = &self.constraint
            && self.drawn < self.params.max_tokens
            && !self.ends_with(token)
        {
            constraint.advance(token);
        }
    }

    /// Draws the next token. `logits` is scratch afterwards.
    ///
    /// Where the parameters leave no token, the sequence ends: under a constraint if the output is
    /// complete, else if `min_tokens` alone kept its end off. If it cannot, the draw is stuck.
    pub fn draw(&mut self, logits: &mut [f32], scratch: &mut Scratch) -> Draw {
        // Comparisons would take them for what is forbidden, or for all there is.
        if logits.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY) {
            return Draw::NotANumber;
        }
        let Scratch { candidates, raw, order, constrained, waited } = scratch;
        // Log-probabilities before any adjustment, as vLLM reports them by default; of speech, among
        // what may follow: by their mean the reference implementation tells a guess.
        let rules = self.speech.is_some();
        if rules {
            self.adjust(logits);
        }
        let reported = self.params.logprobs.map(|count| {
            raw.clear();
            raw.extend_from_slice(logits);
            (count as usize, log_sum(logits))
        });
        if !rules {
            self.adjust(logits);
        }
        let mut state = None;
        if let Some(session) = &self.constraint {
            let (next, time) = session.next();
            *constrained += 1;
            *waited += time;
            match next {
                Ok(next) => keep_only(logits, state.insert(next).allowed()),
                Err(reason) => return Draw::Stuck(reason),
            }
        }
        let largest = largest(logits);
        let id = if largest == f32::NEG_INFINITY {
            match self.end(state.as_deref()) {
                Ok(id) => id,
                Err(end) => return end,
            }
        } else if self.params.temperature <= 0.0 {
            argmax(logits, largest)
        } else {
            self.choose(logits, largest, candidates)
        };
        drop(state);
        self.record(id);
        let mut token = Token { id, ..Token::default() };
        if let Some((count, log_sum)) = reported {
            let logprob = |id: u32| raw[id as usize] - log_sum;
            token.logprob = Some(logprob(id));
            let top = most_likely(raw, count, order).iter();
            token.top = top.map(|&id| TokenLogprob { id, logprob: logprob(id) }).collect();
        }
        Draw::Token(token)
    }

    /// The token that ends a sequence for which there is no other.
    fn end(&self, state: Option<&State>) -> Result<u32, Draw> {
        let reason = match state {
            Some(state) => {
                if let Some(&id) = self.eos.iter().find(|id| state.allows(**id)) {
                    return Ok(id);
                }
                if state.over() {
                    return Err(Draw::Over);
                }
                "`allowed_token_ids`, `bad_words` and `min_tokens` forbid all that the constraint \
                 allows"
            }
            None => {
                let may = |id: &&u32| {
                    is_in(&self.allowed, **id) && !self.forbidden().any(|it| it == **id)
                };
                if let Some(&id) = self.ends.iter().find(may) {
                    return Ok(id);
                }
                "`allowed_token_ids` and `bad_words` forbid every token"
            }
        };
        Err(Draw::Stuck(reason.to_owned()))
    }

    /// The tokens that would end one of `bad_words`.
    fn forbidden(&self) -> impl Iterator<Item = u32> {
        self.params.bad_words.iter().filter_map(|word| {
            let (&last, before) = word.token_ids.split_last()?;
            self.tail.ends_with(before).then_some(last)
        })
    }

    fn repetition(&self) -> bool {
        self.params.repetition_penalty > 0.0 && self.params.repetition_penalty != 1.0
    }

    fn penalized(&self) -> bool {
        self.repetition()
            || self.params.presence_penalty != 0.0
            || self.params.frequency_penalty != 0.0
    }

    /// Bias, penalties, and what may not come.
    fn adjust(&self, logits: &mut [f32]) {
        for (&token, &bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = finite(*logit, *logit + bias);
            }
        }
        if self.repetition() {
            // Keskar et al. 2019: once for each token seen, in the prompt or the output.
            let penalty = self.params.repetition_penalty;
            let new = self.output.keys().filter(|token| self.prompt.binary_search(token).is_err());
            for &token in self.prompt.iter().chain(new) {
                if let Some(logit) = logits.get_mut(token as usize) {
                    let penalized = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                    *logit = finite(*logit, penalized);
                }
            }
        }
        for (&token, &count) in &self.output {
            if let Some(logit) = logits.get_mut(token as usize) {
                let penalty =
                    self.params.frequency_penalty * count as f32 + self.params.presence_penalty;
                *logit = finite(*logit, *logit - penalty);
            }
        }
        let mut forbid = |token: u32| {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        };
        if self.drawn < self.params.min_tokens {
            self.ends.iter().for_each(|&token| forbid(token));
        }
        // Without a constraint it is a token like others.
        if self.constraint.is_some()
            && (self.params.ignore_eos || self.drawn < self.params.min_tokens)
        {
            self.eos.iter().for_each(|&token| forbid(token));
        }
        self.forbidden().for_each(forbid);
        if let Some(speech) = &self.speech {
            speech.apply(logits);
        }
        if !self.allowed.is_empty() {
            keep_only(logits, &self.allowed);
        }
    }

    fn choose(&self, logits: &[f32], largest: f32, candidates: &mut Vec<(u32, f32)>) -> u32 {
        let scale = 1.0 / self.params.temperature.max(MIN_TEMPERATURE);
        // Unnormalized probabilities: the most likely token has exactly one.
        let weight = |logit: f32| ((logit - largest) * scale).exp();
        let min_p = self.params.min_p.min(1.0);
        let top_k = match self.params.top_k as usize {
            0 => logits.len(),
            k => k.min(logits.len()),
        };
        let draw = uniform(self.params.seed, self.drawn);
        if min_p <= 0.0 && top_k == logits.len() && self.params.top_p >= 1.0 {
            // Nothing to leave out: two passes, no list.
            let total: f64 = logits.iter().map(|&logit| f64::from(weight(logit))).sum();
            return pick(logits.iter().map(|&logit| weight(logit)).enumerate(), draw * total);
        }
        let weighed = logits.iter().enumerate();
        let weighed = weighed.map(|(token, &logit)| (token as u32, weight(logit)));
        candidates.clear();
        // At once, or it would grow whenever a flatter distribution comes.
        candidates.reserve(logits.len());
        candidates.extend(weighed.filter(|&(_, weight)| weight > 0.0 && weight >= min_p));
        // Likeliest first; equal ones by id, so that the choice is the same everywhere.
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, order);
            candidates.truncate(top_k);
        }
        let total = |candidates: &[(u32, f32)]| -> f64 {
            candidates.iter().map(|&(_, weight)| f64::from(weight)).sum()
        };
        if self.params.top_p < 1.0 {
            let wanted = f64::from(self.params.top_p) * total(candidates);
            let mut kept = 0.0;
            let mut count = 0;
            // Sort ever larger heads until they hold enough: a sharp distribution needs one.
            let mut sorted = 0;
            while count < candidates.len() && (count == 0 || kept < wanted) {
                if count == sorted {
                    let head = (sorted * 4).max(64).min(candidates.len() - sorted);
                    let rest = &mut candidates[sorted..];
                    if head < rest.len() {
                        rest.select_nth_unstable_by(head - 1, order);
                    }
                    rest[..head].sort_unstable_by(order);
                    sorted += head;
                }
                kept += f64::from(candidates[count].1);
                count += 1;
            }
            candidates.truncate(count);
        }
        candidates.sort_unstable_by_key(|&(token, _)| token);
        let total = total(candidates);
        pick(candidates.iter().map(|&(token, weight)| (token as usize, weight)), draw * total)
    }
}

/// A logit as it is adjusted. What is finite stays so: only what may not come is infinite.
fn finite(logit: f32, adjusted: f32) -> f32 {
    if logit.is_finite() { adjusted.clamp(f32::MIN, f32::MAX) } else { logit }
}

/// The token in whose share of the weights `target` falls.
fn pick(weights: impl Iterator<Item = (usize, f32)>, target: f64) -> u32 {
    let mut sum = 0.0;
    let mut last = 0;
    for (token, weight) in weights {
        if weight > 0.0 {
            last = token;
            sum += f64::from(weight);
            if sum > target {
                break;
            }
        }
    }
    last as u32
}

/// A bit for each token, those of `tokens` set. No list when there are none.
fn bits(tokens: &[u32]) -> Vec<u32> {
    let words = tokens.iter().max().map_or(0, |&last| last as usize / 32 + 1);
    let mut bits = vec![0; words];
    tokens.iter().for_each(|token| bits[*token as usize / 32] |= 1 << (token % 32));
    bits
}

/// Whether a token's bit is set, or there are no bits.
fn is_in(bits: &[u32], token: u32) -> bool {
    bits.is_empty() || bits.get(token as usize / 32).is_some_and(|it| it >> (token % 32) & 1 == 1)
}

/// Leaves only the tokens whose bits are set.
fn keep_only(logits: &mut [f32], bits: &[u32]) {
    let bits = bits.iter().copied().chain(std::iter::repeat(0));
    for (logits, bits) in logits.chunks_mut(32).zip(bits) {
        match bits {
            u32::MAX => {}
            0 => logits.fill(f32::NEG_INFINITY),
            _ => {
                for (i, logit) in logits.iter_mut().enumerate() {
                    if bits >> i & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// Where `token` stands in a row of the prompt's logits, and the `count` tokens most likely in its
/// place. As in vLLM its rank counts those that are as likely.
pub fn score(
    logits: &[f32],
    token: u32,
    count: usize,
    scratch: &mut Scratch,
) -> PromptTokenLogprob {
    let log_sum = log_sum(logits);
    let own = logits[token as usize];
    let top = most_likely(logits, count, &mut scratch.order).iter();
    PromptTokenLogprob {
        id: token,
        logprob: own - log_sum,
        rank: logits.iter().filter(|logit| **logit >= own).count() as u32,
        top: top.map(|&id| TokenLogprob { id, logprob: logits[id as usize] - log_sum }).collect(),
    }
}

/// How likely a token is.
pub fn probability(logits: &[f32], token: u32) -> f32 {
    logits.get(token as usize).map_or(0.0, |logit| (logit - log_sum(logits)).exp())
}

/// The lowest token with the largest logit.
fn argmax(logits: &[f32], largest: f32) -> u32 {
    logits.iter().position(|&logit| logit == largest).unwrap_or(0) as u32
}

fn largest(logits: &[f32]) -> f32 {
    // Sixteen running maxima, so that the compiler can use vectors.
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut maxima = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (max, &logit) in maxima.iter_mut().zip(chunk) {
            *max = max.max(logit);
        }
    }
    maxima.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b))
}

/// A number in `[0, 1)` that depends on its arguments alone (SplitMix64, Steele et al. 2014).
fn uniform(seed: u64, index: u32) -> f64 {
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    // Two rounds: neighbouring seeds and neighbouring indices must both give unrelated numbers.
    let state = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let bits = mix(state ^ u64::from(index).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The logarithm of the sum that a softmax divides by.
fn log_sum(logits: &[f32]) -> f32 {
    let largest = largest(logits);
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - largest).exp())).sum();
    largest + sum.ln() as f32
}

/// The `count` tokens with the largest logits, largest first, equal ones by id.
fn most_likely<'a>(logits: &[f32], count: usize, order: &'a mut Vec<u32>) -> &'a [u32] {
    order.clear();
    order.extend(0..logits.len() as u32);
    let by_logit =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let count = count.min(order.len());
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, by_logit);
    }
    order.truncate(count);
    order.sort_unstable_by(by_logit);
    order
}
