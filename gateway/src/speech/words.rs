//! Words of a transcript, and when each was said.

/// Languages that put no spaces between words: there each character counts as one.
const WITHOUT_SPACES: [&str; 6] = ["zh", "ja", "th", "lo", "my", "yue"];
/// Seconds of a step between two times.
const STEP: f64 = 0.02;
/// A word that is this much longer than others has swallowed the pause beside it.
const LONG: f64 = 2.0;
/// The most that a word usually takes, in seconds.
const USUAL: f64 = 0.7;
/// Punctuation outside of ASCII. Other signs are parts of words, as are the marks of many scripts.
const PUNCTUATION: &str = "“”¿¡。，、．！？：；…「」『』《》（）।؟،";
/// What ends a sentence.
const ENDS: [&str; 6] = [".", "。", "!", "！", "?", "？"];

/// A word.
#[derive(Clone, Debug, PartialEq)]
pub struct Word {
    /// Without spaces around it.
    pub text: String,
    /// In seconds.
    pub start: f64,
    /// In seconds.
    pub end: f64,
}

/// The words of a window that begins at `offset` seconds and has `length` of them.
///
/// `starts` says when each of `tokens` begins, and when the last one ends, in steps of 0.02 s.
pub fn words(
    tokens: &[u32],
    starts: &[u32],
    (offset, length): (f64, f64),
    language: &str,
    decode: impl Fn(&[u32]) -> String,
) -> Vec<Word> {
    if starts.len() <= tokens.len() {
        return Vec::new();
    }
    let mut pieces: Vec<(String, usize)> = Vec::new();
    let spaced = !WITHOUT_SPACES.contains(&language);
    let mut from = 0;
    for to in 1..=tokens.len() {
        // A character may take several tokens.
        let text = decode(&tokens[from..to]);
        if text.contains('\u{fffd}') && to < tokens.len() {
            continue;
        }
        let begins = !spaced || text.starts_with(' ') || is_punctuation(&text);
        match pieces.last_mut() {
            Some((word, end)) if !begins => {
                word.push_str(&text);
                *end = to;
            }
            _ => pieces.push((text, to)),
        }
        from = to;
    }
    let time = |at: usize| (f64::from(starts[at]) * STEP).min(length);
    let mut timed = Vec::with_capacity(pieces.len());
    let mut from = 0;
    for (text, to) in pieces {
        timed.push(Word { text, start: time(from), end: time(to).max(time(from)) });
        from = to;
    }
    shorten(&mut timed);
    timed
        .into_iter()
        .filter(|word| !is_punctuation(&word.text))
        .map(|word| Word {
            text: word.text.trim().to_owned(),
            start: hundredths(offset + word.start),
            end: hundredths(offset + word.end),
        })
        .filter(|word| !word.text.is_empty())
        .collect()
}

/// Takes pauses out of the words beside the end of a sentence.
fn shorten(words: &mut [Word]) {
    let mut lengths: Vec<f64> =
        words.iter().map(|word| word.end - word.start).filter(|length| *length > 0.0).collect();
    lengths.sort_unstable_by(f64::total_cmp);
    let Some(median) = lengths.get(lengths.len() / 2) else { return };
    let longest = median.min(USUAL) * LONG;
    for i in 1..words.len() {
        if words[i].end - words[i].start <= longest {
            continue;
        }
        if ENDS.contains(&words[i].text.trim()) {
            words[i].end = words[i].start + longest;
        } else if ENDS.contains(&words[i - 1].text.trim()) {
            words[i].start = words[i].end - longest;
        }
    }
}

fn is_punctuation(text: &str) -> bool {
    let text = text.trim();
    let known = |it: char| it.is_ascii_punctuation() || PUNCTUATION.contains(it);
    !text.is_empty() && text.chars().all(known)
}

fn hundredths(seconds: f64) -> f64 {
    (seconds * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Token `i` has the text `PIECES[i]`; two of them make one character.
    const PIECES: [&str; 9] =
        [" Hel", "lo", ",", " wor", "ld", ".", "\u{fffd}", "\u{fffd}", " it's"];

    fn decode(tokens: &[u32]) -> String {
        match tokens {
            [6, 7] => "日".to_owned(),
            _ => tokens.iter().map(|&token| PIECES[token as usize]).collect(),
        }
    }

    fn shown(words: &[Word]) -> Vec<(&str, f64, f64)> {
        words.iter().map(|word| (&*word.text, word.start, word.end)).collect()
    }

    #[test]
    fn tokens_make_words_and_punctuation_is_none() {
        let tokens = [0, 1, 2, 3, 4, 5, 8];
        let starts = [10, 20, 30, 35, 45, 60, 65, 90];
        let made = words(&tokens, &starts, (100.0, 30.0), "en", decode);
        let expected = [("Hello", 100.2, 100.6), ("world", 100.7, 101.2), ("it's", 101.3, 101.8)];
        assert_eq!(shown(&made), expected);
    }

    #[test]
    fn marks_and_signs_belong_to_their_words() {
        // The fourth is a mark that joins two letters.
        let pieces = [" न", "म", "स", "्", "त", "े", "।", " $", "5", "!"];
        let decode = |tokens: &[u32]| -> String {
            tokens.iter().map(|&token| pieces[token as usize]).collect()
        };
        let tokens: Vec<u32> = (0..10).collect();
        let starts: Vec<u32> = (0..=10).map(|i| i * 5).collect();
        let made = words(&tokens, &starts, (0.0, 30.0), "hi", decode);
        assert_eq!(shown(&made), [("नमस्ते", 0.0, 0.6), ("$5", 0.7, 0.9)]);
    }

    #[test]
    fn a_pause_belongs_to_no_word() {
        let tokens = [0, 1, 5, 8];
        // The full stop lasts five seconds, and so does the word after it.
        let starts = [10, 20, 30, 280, 530];
        let made = words(&tokens, &starts, (0.0, 30.0), "en", decode);
        let last = made.last().unwrap();
        assert!(last.end - last.start < 1.41 && last.end == 10.6, "{made:?}");
    }

    #[test]
    fn without_spaces_each_character_is_a_word() {
        let made = words(&[6, 7, 6, 7], &[0, 5, 10, 15, 20], (0.0, 30.0), "ja", decode);
        assert_eq!(shown(&made), [("日", 0.0, 0.2), ("日", 0.2, 0.4)]);
    }

    #[test]
    fn times_end_with_the_sound_and_never_go_back() {
        let made = words(&[0, 1, 3, 4], &[0, 60, 50, 500, 1500], (0.0, 1.1), "en", decode);
        for word in &made {
            assert!(word.start <= word.end && word.end <= 1.1, "{word:?}");
        }
        assert_eq!(words(&[0, 1], &[0, 1], (0.0, 30.0), "en", decode), []);
    }
}
