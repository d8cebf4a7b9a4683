//! Guesses how a sequence goes on from what it already holds: prompt lookup decoding (Saxena
//! 2023). A text that repeats its prompt, as summaries, edits and quotations do, is guessed right
//! without a second model.
//!
//! The sequence's last tokens are looked up among the tokens before them: the longest match wins,
//! of equally long ones the latest. What followed there is the draft. Occurrences of the shortest
//! match are chained by their hash, as in LZ77 compressors, so a lookup costs the same however
//! long the sequence is.

/// Where no occurrence is.
const NONE: u32 = u32::MAX;

/// Occurrences that a lookup compares, latest first. Frequent pairs of tokens have long chains, and
/// what was found a hundred occurrences ago is no better a guess.
const CANDIDATES: usize = 64;

/// Buckets of the smallest table.
const BUCKETS: usize = 256;

/// The index over one sequence's tokens, which only grow.
#[derive(Debug)]
pub struct Drafter {
    shortest: usize,
    longest: usize,
    /// By hash: where the latest n-gram of `shortest` tokens with that hash ends.
    latest: Vec<u32>,
    /// By position: where the n-gram before it with the same hash ends.
    before: Vec<u32>,
}

impl Drafter {
    /// Looks for matches of `shortest` to `longest` tokens.
    pub fn new(shortest: usize, longest: usize) -> Self {
        let shortest = shortest.max(1);
        let longest = longest.max(shortest);
        Self { shortest, longest, latest: Vec::new(), before: Vec::new() }
    }

    /// Appends a guess of the next `most` tokens to `draft`, or nothing. `tokens` must begin with
    /// those of the call before.
    pub fn draft(&mut self, tokens: &[u32], most: usize, draft: &mut Vec<u32>) {
        let Some(end) = tokens.len().checked_sub(1) else { return };
        self.index(tokens, end);
        if end < self.shortest || most == 0 {
            return;
        }
        let mut best = (self.shortest - 1, None);
        let mut at = self.latest[self.bucket(tokens, end)];
        for _ in 0..CANDIDATES {
            if at == NONE || best.0 == self.longest {
                break;
            }
            let earlier = &tokens[..=at as usize];
            let alike = earlier.iter().rev().zip(tokens.iter().rev()).take_while(|(a, b)| a == b);
            let length = alike.take(self.longest).count();
            if length > best.0 {
                best = (length, Some(at as usize + 1));
            }
            at = self.before[at as usize];
        }
        if let Some(from) = best.1 {
            // Past its end the text goes on as the draft itself: a loop is guessed as a loop.
            let period = tokens.len() - from;
            draft.extend((0..most).map(|i| tokens[from + i % period]));
        }
    }

    /// Makes the n-grams that end before `end` known.
    fn index(&mut self, tokens: &[u32], end: usize) {
        if end > self.latest.len() {
            self.latest.clear();
            self.latest.resize((2 * end).next_power_of_two().max(BUCKETS), NONE);
            self.before.clear();
        }
        for at in self.before.len()..end {
            // The first tokens end no n-gram, but have their places.
            let earlier = if at + 1 < self.shortest {
                NONE
            } else {
                let bucket = self.bucket(tokens, at);
                std::mem::replace(&mut self.latest[bucket], at as u32)
            };
            self.before.push(earlier);
        }
    }

    /// The bucket of the n-gram that ends at `at`.
    fn bucket(&self, tokens: &[u32], at: usize) -> usize {
        let ngram = &tokens[at + 1 - self.shortest..=at];
        // Fibonacci hashing (Knuth 6.4): the upper bits of a product are well mixed.
        let hash = ngram.iter().fold(0u64, |hash, &token| {
            (hash.rotate_left(20) ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        (hash >> 32) as usize & (self.latest.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// By its definition: every length, longest first; every place, latest first.
    fn reference(tokens: &[u32], shortest: usize, longest: usize, most: usize) -> Vec<u32> {
        for n in (shortest..=longest.min(tokens.len().saturating_sub(1))).rev() {
            let suffix = &tokens[tokens.len() - n..];
            for from in (n..tokens.len()).rev() {
                if &tokens[from - n..from] == suffix {
                    let mut text = tokens.to_vec();
                    (0..most).for_each(|i| text.push(text[from + i]));
                    return text.split_off(tokens.len());
                }
            }
        }
        Vec::new()
    }

    proptest! {
        #[test]
        fn it_finds_what_a_search_finds(
            tokens in prop::collection::vec(0u32..6, 0..CANDIDATES),
            shortest in 1usize..4, more in 0usize..4, most in 0usize..8,
            steps in prop::collection::vec(1usize..9, 0..40),
        ) {
            let mut drafter = Drafter::new(shortest, shortest + more);
            // Asked now and then while the sequence grows.
            let mut len = 0;
            for step in steps {
                len = (len + step).min(tokens.len());
                let mut draft = vec![77];
                drafter.draft(&tokens[..len], most, &mut draft);
                let expected = reference(&tokens[..len], shortest, shortest + more, most);
                prop_assert_eq!(&draft[1..], expected, "{:?}", &tokens[..len]);
            }
        }
    }

    #[test]
    fn long_sequences_are_found_in_after_the_table_has_grown() {
        let text: Vec<u32> = (0..5000).map(|i| i * i % 4999).collect();
        let mut drafter = Drafter::new(2, 4);
        let mut draft = Vec::new();
        for len in 1..text.len() {
            draft.clear();
            drafter.draft(&text[..len], 3, &mut draft);
        }
        let again = [&text[..], &text[1200..1210]].concat();
        draft.clear();
        drafter.draft(&again, 5, &mut draft);
        assert_eq!(draft, text[1210..1215]);
    }
}
