//! What follows from what a model wrote for a window of sound.
//!
//! A window is at most 30 s. The model writes text between times, and the last whole segment tells
//! where the next window begins. Text that repeats itself, or that the model itself did not expect,
//! is drawn again at a higher temperature; where nobody speaks there is no text at all.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::ZlibEncoder;

/// Frames of 10 ms in which positions are counted, as in the reference implementation.
pub const FRAMES_PER_SECOND: usize = 100;
/// Frames of a whole window.
pub const WINDOW: usize = 30 * FRAMES_PER_SECOND;
/// Frames of a step between two times.
const STEP: usize = 2;

/// Text that zlib makes smaller than by this factor repeats itself.
const MAX_COMPRESSION_RATIO: f64 = 2.4;
/// Text less likely than this, by the mean log-probability of its tokens, is a guess.
const MIN_LOGPROB: f64 = -1.0;
/// From here on nobody speaks, if the text is a guess as well.
const NO_SPEECH: f32 = 0.6;
/// The same, where the model is surer that nobody speaks: rumble makes it write thanks for watching,
/// with a log-probability of -0.98.
const SURE_NO_SPEECH: (f32, f64) = (0.8, -0.8);
/// From this temperature on, text is too random to be gone on from.
const RANDOM: f32 = 0.5;

/// What a transcript is made by.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The token of 0.00 s; the next is that of 0.02 s.
    pub timestamp_begin: u32,
    /// The first token that is no text.
    pub special: u32,
    /// Temperatures to try, one after the other.
    pub temperatures: Vec<f32>,
    /// Earlier tokens, of text and times, that a prompt may have.
    pub max_previous: usize,
    /// Words to expect: before the earlier text of every window.
    pub hotwords: Vec<u32>,
}

impl Rules {
    /// The temperatures from the one that was asked for, by steps of 0.2 up to 1.
    pub fn temperatures(asked: f32) -> Vec<f32> {
        let mut temperatures = vec![asked];
        let steps = (1..=5).map(|step| step as f32 * 0.2);
        temperatures.extend(steps.filter(|step| *step > asked + 1e-3));
        temperatures
    }
}

/// What a model wrote for a window.
#[derive(Clone, Debug, PartialEq)]
pub struct Heard {
    /// Text and times, without the end.
    pub tokens: Vec<u32>,
    /// Log-probabilities of the tokens and of the end, added up.
    pub sum_logprob: f64,
    /// How likely it is that nobody speaks.
    pub no_speech: f32,
}

/// A stretch of a transcript.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Where its window begins, in frames.
    pub seek: usize,
    /// In seconds.
    pub start: f64,
    /// In seconds.
    pub end: f64,
    /// With the space before it that the model wrote.
    pub text: String,
    /// Text and times.
    pub tokens: Vec<u32>,
    /// At which its window was drawn.
    pub temperature: f32,
    /// Mean over its window.
    pub avg_logprob: f64,
    /// Of its window's text.
    pub compression_ratio: f64,
    /// Of its window.
    pub no_speech: f32,
}

/// What is to be done with a window.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Draw it again, at the next temperature.
    Again,
    /// It is done; these segments, often one or two, are its text.
    Done(Vec<Segment>),
}

/// A transcript in progress.
#[derive(Clone, Debug)]
pub struct Transcript {
    rules: Rules,
    seek: usize,
    /// What the window's earlier temperatures brought.
    tried: Vec<Try>,
    /// All tokens so far, after those of the request's own prompt.
    tokens: Vec<u32>,
    /// Tokens before this one are no context any more.
    fresh: usize,
}

#[derive(Clone, Debug)]
struct Try {
    heard: Heard,
    temperature: f32,
    avg_logprob: f64,
    compression_ratio: f64,
}

impl Transcript {
    /// An empty one; `prompt` are tokens that the first window is read after.
    pub fn new(rules: Rules, prompt: Vec<u32>) -> Self {
        Self { rules, seek: 0, tried: Vec::new(), tokens: prompt, fresh: 0 }
    }

    /// Where the window begins, in frames.
    pub fn seek(&self) -> usize {
        self.seek
    }

    /// How often the window was drawn before.
    pub fn attempt(&self) -> usize {
        self.tried.len()
    }

    /// The temperature at which to draw.
    pub fn temperature(&self) -> f32 {
        self.rules.temperatures.get(self.tried.len()).copied().unwrap_or(1.0)
    }

    /// The tokens that the window is read after: expected words, then the end of the text so far.
    pub fn previous(&self) -> Vec<u32> {
        let room = self.rules.max_previous;
        let mut previous = self.rules.hotwords.clone();
        previous.truncate(room / 2);
        let text = &self.tokens[self.fresh..];
        previous.extend(&text[text.len().saturating_sub(room - previous.len())..]);
        previous
    }

    /// Passes a window over in which nothing is to be heard.
    pub fn skip(&mut self, frames: usize) {
        self.tried.clear();
        self.seek += frames;
    }

    /// Takes what a model wrote for the window, which has this many frames. `decode` makes text of
    /// tokens.
    pub fn heard(
        &mut self,
        frames: usize,
        heard: Heard,
        decode: impl Fn(&[u32]) -> String,
    ) -> Step {
        let temperature = self.temperature();
        let text = decode(&self.text_tokens(&heard.tokens));
        let avg_logprob = heard.sum_logprob / (heard.tokens.len() + 1) as f64;
        let compression_ratio = compression_ratio(text.trim());
        let last = Try { heard, temperature, avg_logprob, compression_ratio };
        if last.is_silence() {
            self.skip(frames);
            return Step::Done(Vec::new());
        }
        let poor = last.repeats() || last.avg_logprob < MIN_LOGPROB;
        self.tried.push(last);
        if poor && self.tried.len() < self.rules.temperatures.len() {
            return Step::Again;
        }
        let best = self.best();
        // Nobody may be speaking, and all that comes is a stammer.
        if best.repeats() && best.heard.no_speech > NO_SPEECH {
            self.skip(frames);
            return Step::Done(Vec::new());
        }
        let (mut segments, advance) = self.cut(frames, &best, &decode);
        segments.retain(|segment| segment.end > segment.start && !segment.text.trim().is_empty());
        self.tokens.extend(segments.iter().flat_map(|segment| &segment.tokens));
        if best.temperature >= RANDOM {
            self.fresh = self.tokens.len();
        }
        self.skip(advance);
        Step::Done(segments)
    }

    /// The last try if it is good, else the most likely of those that do not repeat themselves.
    fn best(&mut self) -> Try {
        let good = |it: &Try| !it.repeats() && it.avg_logprob >= MIN_LOGPROB;
        let at = match self.tried.last() {
            Some(last) if !good(last) => {
                let all = self.tried.iter().enumerate().rev();
                let best = all.max_by(|(_, a), (_, b)| {
                    let key = |it: &Try| (!it.repeats(), it.avg_logprob);
                    let ((a, a_logprob), (b, b_logprob)) = (key(a), key(b));
                    a.cmp(&b).then(a_logprob.total_cmp(&b_logprob))
                });
                best.map_or(0, |(at, _)| at)
            }
            _ => self.tried.len().saturating_sub(1),
        };
        self.tried.swap_remove(at)
    }

    fn is_time(&self, token: u32) -> bool {
        token >= self.rules.timestamp_begin
    }

    fn text_tokens(&self, tokens: &[u32]) -> Vec<u32> {
        tokens.iter().copied().filter(|token| *token < self.rules.special).collect()
    }

    /// The window's segments, and the frames to go on by.
    fn cut(
        &self,
        frames: usize,
        of: &Try,
        decode: &impl Fn(&[u32]) -> String,
    ) -> (Vec<Segment>, usize) {
        let tokens = &of.heard.tokens[..];
        let steps = |token: u32| (token - self.rules.timestamp_begin) as usize;
        let offset = self.seek as f64 / FRAMES_PER_SECOND as f64;
        let seconds = |steps: usize| (steps * STEP) as f64 / FRAMES_PER_SECOND as f64;
        let length = frames as f64 / FRAMES_PER_SECOND as f64;
        let segment = |start: f64, end: f64, tokens: &[u32]| Segment {
            seek: self.seek,
            start: rounded(offset + start.min(length)),
            end: rounded(offset + end.min(length)),
            text: decode(&self.text_tokens(tokens)),
            tokens: tokens.to_vec(),
            temperature: of.temperature,
            avg_logprob: of.avg_logprob,
            compression_ratio: of.compression_ratio,
            no_speech: of.heard.no_speech,
        };
        // A segment ends where two times meet.
        let mut ends: Vec<usize> = (1..tokens.len())
            .filter(|&i| self.is_time(tokens[i - 1]) && self.is_time(tokens[i]))
            .collect();
        // One time at the end: what follows it until the window's end is silence.
        let closed = match *tokens {
            [.., before, last] => self.is_time(last) && !self.is_time(before),
            _ => false,
        };
        if ends.is_empty() {
            let last = tokens.iter().rev().find(|token| self.is_time(**token));
            let end = match last {
                Some(&last) if steps(last) > 0 => seconds(steps(last)),
                _ => length,
            };
            return (vec![segment(0.0, end, tokens)], frames);
        }
        if closed {
            ends.push(tokens.len());
        }
        let mut segments = Vec::with_capacity(ends.len());
        let mut from = 0;
        for end in ends {
            let part = &tokens[from..end];
            let time = |token: Option<&u32>| {
                token.filter(|token| self.is_time(**token)).map_or(0, |token| steps(*token))
            };
            segments.push(segment(seconds(time(part.first())), seconds(time(part.last())), part));
            from = end;
        }
        let advance = match closed {
            true => frames,
            false => steps(tokens[from - 1]) * STEP,
        };
        // A window that leads nowhere would be read for ever.
        let advance = if advance == 0 { frames } else { advance.min(frames) };
        (segments, advance)
    }
}

impl Try {
    fn repeats(&self) -> bool {
        self.compression_ratio > MAX_COMPRESSION_RATIO
    }

    fn is_silence(&self) -> bool {
        let unlikely = |(no_speech, logprob): (f32, f64)| {
            self.heard.no_speech > no_speech && self.avg_logprob < logprob
        };
        unlikely((NO_SPEECH, MIN_LOGPROB)) || unlikely(SURE_NO_SPEECH)
    }
}

/// How much smaller zlib makes a text.
pub fn compression_ratio(text: &str) -> f64 {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    // Writing to memory does not fail.
    let _ = encoder.write_all(text.as_bytes());
    let compressed = encoder.finish().unwrap_or_default();
    text.len() as f64 / compressed.len().max(1) as f64
}

fn rounded(seconds: f64) -> f64 {
    (seconds * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times begin at 1000, special tokens at 900; below, a token's text is " " and its number.
    const T: u32 = 1000;

    fn rules(temperature: f32) -> Rules {
        Rules {
            timestamp_begin: T,
            special: 900,
            temperatures: Rules::temperatures(temperature),
            max_previous: 10,
            hotwords: Vec::new(),
        }
    }

    fn decode(tokens: &[u32]) -> String {
        tokens.iter().map(|token| format!(" {token}")).collect()
    }

    fn at(seconds: f64) -> u32 {
        T + (seconds / 0.02).round() as u32
    }

    fn good(tokens: &[u32]) -> Heard {
        Heard { tokens: tokens.to_vec(), sum_logprob: -0.2, no_speech: 0.01 }
    }

    fn done(step: Step) -> Vec<(f64, f64, String)> {
        match step {
            Step::Done(segments) => {
                segments.into_iter().map(|s| (s.start, s.end, s.text)).collect()
            }
            Step::Again => panic!("to be drawn again"),
        }
    }

    fn segment(start: f64, end: f64, text: &str) -> (f64, f64, String) {
        (start, end, text.to_owned())
    }

    #[test]
    fn the_last_pair_of_times_says_where_the_next_window_begins() {
        let mut transcript = Transcript::new(rules(0.0), Vec::new());
        let tokens = [at(0.0), 1, 2, at(4.5), at(5.0), 3, at(20.0), at(20.0), 4, 5];
        let segments = done(transcript.heard(WINDOW, good(&tokens), decode));
        // What was begun after the last pair is heard again, from its beginning.
        assert_eq!(segments, [segment(0.0, 4.5, " 1 2"), segment(5.0, 20.0, " 3")]);
        assert_eq!(transcript.seek(), 2000);
        let segments = done(transcript.heard(WINDOW, good(&[at(0.0), 4, at(3.0)]), decode));
        assert_eq!(segments, [segment(20.0, 23.0, " 4")]);
        assert_eq!(transcript.seek(), 2000 + WINDOW);
    }

    #[test]
    fn a_single_time_at_the_end_closes_the_window() {
        let mut transcript = Transcript::new(rules(0.0), Vec::new());
        let tokens = [at(0.0), 1, at(4.0), at(4.0), 2, at(9.0)];
        let segments = done(transcript.heard(WINDOW, good(&tokens), decode));
        assert_eq!(segments, [segment(0.0, 4.0, " 1"), segment(4.0, 9.0, " 2")]);
        assert_eq!(transcript.seek(), WINDOW);
    }

    #[test]
    fn text_without_times_fills_its_window_and_no_time_is_after_the_end_of_the_sound() {
        let mut transcript = Transcript::new(rules(0.0), Vec::new());
        let segments = done(transcript.heard(712, good(&[1, 2]), decode));
        assert_eq!(segments, [segment(0.0, 7.12, " 1 2")]);
        assert_eq!(transcript.seek(), 712);
        let mut transcript = Transcript::new(rules(0.0), Vec::new());
        let segments = done(transcript.heard(200, good(&[at(0.0), 1, at(28.0)]), decode));
        assert_eq!(segments, [segment(0.0, 2.0, " 1")]);
        assert_eq!(transcript.seek(), 200);
    }

    #[test]
    fn every_window_leads_on() {
        for tokens in [vec![], vec![T], vec![T, T], vec![T, T, T], vec![T, 1, T, T], vec![1, T, T]]
        {
            let mut transcript = Transcript::new(rules(0.0), Vec::new());
            let step = transcript.heard(WINDOW, good(&tokens), decode);
            assert_ne!(step, Step::Again);
            assert_eq!(transcript.seek(), WINDOW, "{tokens:?}");
        }
    }

    #[test]
    fn segments_that_take_no_time_or_say_nothing_are_left_out() {
        let mut transcript = Transcript::new(rules(0.0), Vec::new());
        let tokens = [at(0.0), 1, at(0.0), at(1.0), at(2.0), at(2.0), 2, at(3.0), at(3.0)];
        let segments = done(transcript.heard(WINDOW, good(&tokens), decode));
        assert_eq!(segments, [segment(2.0, 3.0, " 2")]);
    }

    #[test]
    fn repetition_and_guesses_are_drawn_again_ever_more_freely() {
        let stammer: Vec<u32> = std::iter::repeat_n(7, 60).collect();
        let unlikely = Heard { sum_logprob: -30.0, ..good(&[1, 2]) };
        let mut transcript = Transcript::new(rules(0.0), Vec::new());
        let mut seen = Vec::new();
        for i in 0..5 {
            seen.push(transcript.temperature());
            let heard = if i % 2 == 0 { good(&stammer) } else { unlikely.clone() };
            assert_eq!(transcript.heard(WINDOW, heard, decode), Step::Again);
        }
        seen.push(transcript.temperature());
        assert_eq!(
            seen.iter().map(|t| (t * 10.0).round() as u32).collect::<Vec<_>>(),
            [0, 2, 4, 6, 8, 10]
        );
        // Nothing was good: the likeliest that does not repeat itself it is.
        let worst = Heard { sum_logprob: -40.0, ..good(&[3, 4]) };
        let Step::Done(segments) = transcript.heard(WINDOW, worst, decode) else { panic!() };
        assert_eq!(segments[0].text, " 1 2");
        assert!((segments[0].temperature - 0.2).abs() < 1e-6);
        assert_eq!((transcript.seek(), transcript.attempt()), (WINDOW, 0));
    }

    #[test]
    fn the_first_good_try_is_taken() {
        let mut transcript = Transcript::new(rules(0.0), Vec::new());
        let unlikely = Heard { sum_logprob: -30.0, ..good(&[1, 2]) };
        assert_eq!(transcript.heard(WINDOW, unlikely, decode), Step::Again);
        let Step::Done(segments) = transcript.heard(WINDOW, good(&[8]), decode) else { panic!() };
        assert_eq!(segments[0].text, " 8");
    }

    #[test]
    fn a_temperature_that_was_asked_for_is_where_it_begins() {
        let tenths = |asked| {
            let all = Rules::temperatures(asked);
            all.iter().map(|t| (t * 10.0).round() as u32).collect::<Vec<_>>()
        };
        assert_eq!(tenths(0.0), [0, 2, 4, 6, 8, 10]);
        assert_eq!(tenths(0.4), [4, 6, 8, 10]);
        assert_eq!(tenths(0.5), [5, 6, 8, 10]);
        assert_eq!(tenths(1.0), [10]);
    }

    #[test]
    fn where_nobody_speaks_there_is_no_text() {
        let mut transcript = Transcript::new(rules(0.0), Vec::new());
        let guess = Heard { tokens: vec![T, 1, at(2.0)], sum_logprob: -8.0, no_speech: 0.7 };
        assert_eq!(done(transcript.heard(WINDOW, guess.clone(), decode)), []);
        assert_eq!(transcript.seek(), WINDOW);
        let rumble = Heard { tokens: vec![1; 4], sum_logprob: -4.5, no_speech: 0.84 };
        assert_eq!(done(transcript.heard(WINDOW, rumble, decode)), []);
        // Text that the model is sure of is text.
        let sure = Heard { sum_logprob: -0.5, ..guess };
        assert_eq!(done(transcript.heard(WINDOW, sure, decode)).len(), 1);
    }

    #[test]
    fn a_window_is_read_after_the_end_of_the_text_before_it() {
        let mut transcript = Transcript::new(rules(0.0), vec![500, 501]);
        assert_eq!(transcript.previous(), [500, 501]);
        transcript.heard(WINDOW, good(&[T, 1, 2, at(3.0)]), decode);
        assert_eq!(transcript.previous(), [500, 501, T, 1, 2, at(3.0)]);
        let more: Vec<u32> = (10..30).collect();
        transcript.heard(WINDOW, good(&more), decode);
        assert_eq!(transcript.previous(), (20..30).collect::<Vec<_>>());
        // What was drawn too freely leads astray.
        let bad = Heard { sum_logprob: -100.0, ..good(&[1, 2]) };
        for _ in 0..3 {
            assert_eq!(transcript.heard(WINDOW, bad.clone(), decode), Step::Again);
        }
        assert_eq!(done(transcript.heard(WINDOW, good(&[3]), decode)).len(), 1);
        assert_eq!(transcript.previous(), [] as [u32; 0]);
    }

    #[test]
    fn expected_words_come_before_and_leave_room() {
        let hotwords = Rules { hotwords: (100..120).collect(), ..rules(0.0) };
        let mut transcript = Transcript::new(hotwords, Vec::new());
        assert_eq!(transcript.previous(), [100, 101, 102, 103, 104]);
        transcript.heard(WINDOW, good(&(1..9).collect::<Vec<_>>()), decode);
        assert_eq!(transcript.previous(), [100, 101, 102, 103, 104, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn the_ratio_is_that_of_zlib() {
        // As `len(text) / len(zlib.compress(text))` in Python.
        let sentence = "The quick brown fox jumps over the lazy dog.";
        assert!((compression_ratio(sentence) - 44.0 / 51.0).abs() < 0.1);
        // 13 there: the encoder here is another, and finds a little less.
        assert!(compression_ratio(&"again and ".repeat(30)) > 8.0);
        assert_eq!(compression_ratio(""), 0.0);
    }
}
