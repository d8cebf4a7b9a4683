//! What tokens may follow each other in a transcript.
//!
//! The rules of the reference implementation of Whisper (Radford et al. 2022, section 4.5;
//! `SuppressBlank`, `SuppressTokens` and `ApplyTimestampRules` of `whisper/decoding.py`), in its order.

use std::sync::Arc;

use baton_proto::v1::{SpeechCard, SpeechRules};

use super::{largest, log_sum};

/// The rules of one transcript, and what of it they must remember.
pub(super) struct Speech {
    card: Arc<SpeechCard>,
    timestamps: bool,
    max_initial: Option<u32>,
    /// In place of the model's own.
    suppressed: Vec<u32>,
    own_suppressed: bool,
    suppress_blank: bool,
    /// Text has lower ids than this, the end of the text.
    end: u32,
    drawn: usize,
    /// Whether the last token was a time, and the one before it; where there is none, the start
    /// counts as one for the latter.
    last: bool,
    before: bool,
    /// The last time drawn.
    time: Option<u32>,
}

impl Speech {
    pub(super) fn new(rules: &SpeechRules, card: Arc<SpeechCard>, end: Option<u32>) -> Self {
        let mut suppressed = rules.suppress_token_ids.clone();
        // What prompts are made of is no text.
        suppressed.extend([
            card.start_of_transcript,
            card.transcribe,
            card.translate,
            card.start_of_previous,
            card.no_speech,
            card.no_timestamps,
        ]);
        Self {
            timestamps: rules.timestamps,
            max_initial: rules.max_initial_timestamp,
            suppressed,
            own_suppressed: !rules.override_suppressed,
            suppress_blank: rules.suppress_blank,
            end: end.unwrap_or(card.start_of_transcript),
            drawn: 0,
            last: false,
            before: true,
            time: None,
            card,
        }
    }

    /// Counts a token that was drawn.
    pub(super) fn record(&mut self, token: u32) {
        self.before = self.last || self.drawn == 0;
        self.last = token >= self.card.timestamp_begin;
        if self.last {
            self.time = Some(token);
        }
        self.drawn += 1;
    }

    /// Forbids what may not come next.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        let Self { card, .. } = self;
        let mut forbid = |token: u32| {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        };
        if self.drawn == 0 && self.suppress_blank {
            card.begin_suppress_token_ids.iter().for_each(|&token| forbid(token));
        }
        if self.own_suppressed {
            card.suppress_token_ids.iter().for_each(|&token| forbid(token));
        }
        self.suppressed.iter().for_each(|&token| forbid(token));
        let first_time = (card.timestamp_begin as usize).min(logits.len());
        let (text, times) = logits.split_at_mut(first_time);
        if !self.timestamps {
            times.fill(f32::NEG_INFINITY);
            return;
        }
        match (self.last, self.before) {
            // A pair ends here: text begins.
            (true, true) => times.fill(f32::NEG_INFINITY),
            // The second of a pair, or the end.
            (true, false) => {
                let end = (self.end as usize).min(text.len());
                text[..end].fill(f32::NEG_INFINITY);
            }
            (false, _) => {}
        }
        if let Some(time) = self.time {
            // A segment has some length, so that there is an end of them.
            let closes = self.last && !self.before;
            let least = (time - card.timestamp_begin) as usize + usize::from(!closes);
            let least = least.min(times.len());
            times[..least].fill(f32::NEG_INFINITY);
        }
        if self.drawn == 0 {
            text.fill(f32::NEG_INFINITY);
            if let Some(latest) = self.max_initial {
                let from = (latest as usize).saturating_add(1).min(times.len());
                times[from..].fill(f32::NEG_INFINITY);
            }
        }
        if largest(times) > f32::NEG_INFINITY && log_sum(times) > largest(text) {
            text.fill(f32::NEG_INFINITY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text 0 to 9, the end 10, special tokens 11 to 16, times from 17 on.
    fn speech(timestamps: bool, output: &[u32]) -> Speech {
        let card = SpeechCard {
            start_of_transcript: 11,
            translate: 12,
            transcribe: 13,
            start_of_previous: 14,
            no_speech: 15,
            no_timestamps: 16,
            timestamp_begin: 17,
            suppress_token_ids: vec![3],
            begin_suppress_token_ids: vec![0, 10],
            ..SpeechCard::default()
        };
        let rules = SpeechRules {
            timestamps,
            max_initial_timestamp: Some(2),
            suppress_token_ids: vec![4],
            suppress_blank: true,
            ..SpeechRules::default()
        };
        let mut speech = Speech::new(&rules, Arc::new(card), Some(10));
        output.iter().for_each(|token| speech.record(*token));
        speech
    }

    /// What may come after `output`, all being as likely as the others but `liked`.
    fn allowed(timestamps: bool, output: &[u32], liked: u32) -> Vec<u32> {
        let mut logits = vec![0.0; 24];
        logits[liked as usize] = 20.0;
        speech(timestamps, output).apply(&mut logits);
        (0..24).filter(|i| logits[*i as usize] > f32::NEG_INFINITY).collect()
    }

    #[test]
    fn times_come_first_in_pairs_and_do_not_decrease() {
        assert_eq!(allowed(true, &[], 5), [17, 18, 19]);
        // After the first time, text.
        assert_eq!(allowed(true, &[18], 5), [0, 1, 2, 5, 6, 7, 8, 9, 10]);
        // Within text, later times too; alone where they are likelier together than any text.
        let text = [0, 1, 2, 5, 6, 7, 8, 9, 10, 19, 20, 21, 22, 23];
        assert_eq!(allowed(true, &[18, 5], 5), text);
        assert_eq!(allowed(true, &[18, 5], 20), [19, 20, 21, 22, 23]);
        assert_eq!(allowed(true, &[18, 5], 17), [19, 20, 21, 22, 23]);
        // After one that closes a text, the next opens at once, or all ends.
        assert_eq!(allowed(true, &[18, 5, 20], 10), [10, 20, 21, 22, 23]);
        assert_eq!(allowed(true, &[18, 5, 20, 20], 5), [0, 1, 2, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn without_times_there_are_none_and_the_beginning_is_not_blank() {
        assert_eq!(allowed(false, &[], 20), [1, 2, 5, 6, 7, 8, 9]);
        assert_eq!(allowed(false, &[5], 20), [0, 1, 2, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn a_request_may_name_what_is_suppressed_in_place_of_the_model() {
        let mut speech = speech(false, &[5]);
        speech.own_suppressed = false;
        let mut logits = vec![0.0; 24];
        speech.apply(&mut logits);
        assert_eq!((logits[3], logits[4]), (0.0, f32::NEG_INFINITY));
    }
}
