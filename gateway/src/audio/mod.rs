//! Sound: from the bytes of a file to what a speech model hears, 16 kHz mono in 16 bits.
//!
//! * [`decode`]: containers and codecs; what is wrong with a file that cannot be heard.
//! * [`opus`]: the one codec that comes from elsewhere.
//! * [`resample`]: to 16 kHz, as a stream.
//! * `wav`: lengths for files that came through a pipe.
//! * [`windows`]: reads a file as it is needed, on a bounded number of threads.
//!
//! A file is kept as it came and decoded as it is needed, so an hour of sound takes no more memory
//! than half a minute.

pub mod decode;
pub mod opus;
pub mod resample;
#[cfg(test)]
mod tests;
mod vorbis;
mod wav;
pub mod windows;

use crate::error::ApiError;

/// Samples in a second of what models hear.
pub const RATE: usize = 16_000;

/// What is quieter is silence: the root mean square of samples, of 32,768; -70 dB of full scale.
const QUIET: f64 = 10.0;

/// Whether nothing at all is to be heard: models make up words for silence.
pub fn is_silent(samples: &[i16]) -> bool {
    // By pieces of 20 ms, so that a short word in a long silence counts.
    samples.chunks(RATE / 50).all(|piece| {
        let power: f64 = piece.iter().map(|&sample| f64::from(sample).powi(2)).sum();
        power <= QUIET * QUIET * piece.len() as f64
    })
}

/// Why a file cannot be heard; goes on after the words "`file` ".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault(pub String);

impl Fault {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }

    /// What a client is told.
    pub fn refused(self) -> ApiError {
        ApiError::bad_value("file", format!("`file` {}", self.0))
    }
}
