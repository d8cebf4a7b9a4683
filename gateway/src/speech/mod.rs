//! Speech: from sound to a transcript, window by window.
//!
//! * [`transcript`]: what follows from what a model wrote for a window: segments, where the next
//!   window begins, what to try again. Pure.
//! * [`words`]: words, and when each was said. Pure.
//! * [`languages`]: names of languages.
//! * [`listen`]: asks workers, one window after the other.
//!
//! The algorithm is that of Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak
//! Supervision", section 4.5 and appendix, as OpenAI's reference implementation and faster-whisper
//! do it.

pub mod languages;
pub mod listen;

pub mod transcript;
pub mod words;
