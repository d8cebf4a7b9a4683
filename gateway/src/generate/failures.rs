//! How often workers may fail a request before it is given up: it may be what brings them down.

use crate::error::ApiError;

/// Failures in a row after which a request is given up.
const MAX_IN_A_ROW: usize = 3;
/// Failures in all.
const MAX_IN_ALL: usize = 16;
/// Tokens between two failures that are not in a row. Fewer tell nothing: a request that brings
/// workers down may have a few of each of them first.
const APART: usize = 32;

/// The failures of a request.
#[derive(Debug, Default)]
pub(super) struct Failures {
    in_a_row: usize,
    in_all: usize,
    /// Tokens since the last one.
    tokens: usize,
}

impl Failures {
    /// Counts one; `cause` comes back when there were too many.
    pub(super) fn add(&mut self, cause: ApiError) -> Result<(), ApiError> {
        self.in_a_row += 1;
        self.in_all += 1;
        self.tokens = 0;
        match self.in_a_row >= MAX_IN_A_ROW || self.in_all > MAX_IN_ALL {
            true => Err(cause),
            false => Ok(()),
        }
    }

    /// So many tokens came.
    pub(super) fn passed(&mut self, tokens: usize) {
        self.tokens += tokens;
        if self.tokens >= APART {
            self.in_a_row = 0;
        }
    }

    /// Whether there were any.
    pub(super) fn any(&self) -> bool {
        self.in_all > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many failures a request lives through that brings so many tokens between them.
    fn survived(tokens: usize) -> usize {
        let mut failures = Failures::default();
        let mut survived = 0;
        while failures.add(ApiError::given_up("too many")).is_ok() {
            survived += 1;
            (0..tokens).for_each(|_| failures.passed(1));
        }
        survived
    }

    #[test]
    fn a_request_that_brings_workers_down_is_given_up_after_the_third() {
        assert_eq!([0, 1, APART - 1].map(survived), [MAX_IN_A_ROW - 1; 3]);
    }

    #[test]
    fn a_long_answer_outlives_many_workers() {
        assert_eq!(survived(APART), MAX_IN_ALL);
        let mut failures = Failures::default();
        assert!(!failures.any());
        // A message may hold several tokens.
        for _ in 0..MAX_IN_ALL {
            assert!(failures.add(ApiError::given_up("one")).is_ok() && failures.any());
            failures.passed(APART / 2);
            failures.passed(APART);
        }
        assert!(failures.add(ApiError::given_up("too many")).is_err());
    }
}
