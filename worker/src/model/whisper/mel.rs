//! What Whisper hears: the logarithm of a mel spectrogram (Radford et al. 2022, section 2.2).
//!
//! As the reference implementation (`whisper/audio.py`): windows of 400 samples every 160, Hann,
//! reflected at the ends; mel bands of Slaney's Auditory Toolbox, scaled to equal areas, as librosa
//! makes them; the logarithm to base ten, at most 8 below its largest value, plus 4, over 4.
//!
//! Frames after the end of the sound are zero, as faster-whisper has them, not the spectrogram of
//! silence: of short recordings the models get a tenth more words right so, though they were trained
//! on silence (`tests/bench/wer.py`). A sound with its silence up to half a minute is heard as the
//! reference implementation hears it.

use std::f64::consts::{LN_10, TAU};
use std::sync::Arc;

use realfft::{RealFftPlanner, RealToComplex};

use crate::kernels::pool::ThreadPool;

/// Samples of a second.
pub(super) const RATE: usize = 16_000;
/// Samples of half a minute.
const SAMPLES: usize = 30 * RATE;
/// Samples of a window.
const WINDOW: usize = 400;
/// Samples from a frame to the next.
pub(super) const HOP: usize = 160;
/// Frames of half a minute.
pub(super) const FRAMES: usize = SAMPLES / HOP;

/// Makes spectrograms.
pub(super) struct Mel {
    fft: Arc<dyn RealToComplex<f64>>,
    window: Vec<f64>,
    bands: Vec<Band>,
}

/// The weights of some neighbouring frequencies.
struct Band {
    first: usize,
    weights: Vec<f64>,
}

impl Mel {
    pub(super) fn new(bands: usize) -> Self {
        let hann = |i: usize| 0.5 - 0.5 * (TAU * i as f64 / WINDOW as f64).cos();
        Self {
            fft: RealFftPlanner::new().plan_fft_forward(WINDOW),
            window: (0..WINDOW).map(hann).collect(),
            bands: filters(bands),
        }
    }

    /// The frames of a window of sound, one after the other, [`FRAMES`] × bands; zero where `samples`
    /// have ended.
    ///
    /// # Panics
    /// When `out` has another size, or there are more samples.
    pub(super) fn frames(&self, threads: &mut ThreadPool, samples: &[u8], out: &mut [f32]) {
        let (bands, samples) = (self.bands.len(), samples.as_chunks::<2>().0);
        assert!(out.len() == FRAMES * bands && samples.len() <= SAMPLES);
        let heard_frames = (samples.len() / HOP).max(1);
        let sample = |at: isize| {
            // Reflected at both ends.
            let at = at.unsigned_abs();
            let at = if at < SAMPLES { at } else { 2 * (SAMPLES - 1) - at };
            samples.get(at).map_or(0.0, |bytes| f64::from(i16::from_le_bytes(*bytes)) / 32_768.0)
        };
        let mut largest = vec![0f32; FRAMES];
        threads.for_rows((out, bands), (&mut largest, 1), |frame, out, largest| {
            if frame >= heard_frames {
                largest[0] = f32::NEG_INFINITY;
                return;
            }
            let first = (frame * HOP) as isize - (WINDOW / 2) as isize;
            let mut heard = false;
            let mut wave = self.fft.make_input_vec();
            for (i, (x, weight)) in wave.iter_mut().zip(&self.window).enumerate() {
                let sample = sample(first + i as isize);
                heard |= sample != 0.0;
                *x = sample * weight;
            }
            let mut spectrum = self.fft.make_output_vec();
            if heard {
                // The lengths are right by construction.
                let done = self.fft.process(&mut wave, &mut spectrum);
                debug_assert!(done.is_ok());
            }
            for (out, band) in out.iter_mut().zip(&self.bands) {
                let power = spectrum[band.first..].iter().zip(&band.weights);
                let power: f64 = power.map(|(x, weight)| x.norm_sqr() * weight).sum();
                *out = (power.max(1e-10).ln() / LN_10) as f32;
            }
            largest[0] = out.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        });
        let floor = largest.iter().copied().fold(f32::NEG_INFINITY, f32::max) - 8.0;
        let (heard, after) = out.split_at_mut(heard_frames * bands);
        heard.iter_mut().for_each(|x| *x = (x.max(floor) + 4.0) / 4.0);
        after.fill(0.0);
    }
}

/// Triangles on the mel scale of Slaney (1998): linear to 1 kHz, logarithmic above.
fn filters(count: usize) -> Vec<Band> {
    const LINEAR: f64 = 200.0 / 3.0;
    const KNEE: f64 = 1000.0;
    let step = 6.4f64.ln() / 27.0;
    let nyquist = RATE as f64 / 2.0;
    let highest = KNEE / LINEAR + (nyquist / KNEE).ln() / step;
    let hertz = |mel: f64| match mel * LINEAR {
        linear if linear < KNEE => linear,
        _ => KNEE * ((mel - KNEE / LINEAR) * step).exp(),
    };
    let edges: Vec<f64> =
        (0..count + 2).map(|i| hertz(highest * i as f64 / (count + 1) as f64)).collect();
    edges
        .windows(3)
        .map(|edges| {
            let &[low, middle, high] = edges else { unreachable!("windows of three") };
            let weight = |bin: usize| {
                let f = (bin * RATE) as f64 / WINDOW as f64;
                let rising = (f - low) / (middle - low);
                let falling = (high - f) / (high - middle);
                rising.min(falling).max(0.0) * 2.0 / (high - low)
            };
            let bins = WINDOW / 2 + 1;
            let first = (0..bins).find(|bin| weight(*bin) > 0.0).unwrap_or(0);
            let weights = (first..bins).map(weight).take_while(|weight| *weight > 0.0).collect();
            Band { first, weights }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_those_of_transformers() {
        let reference = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/reference");
        let fixture = std::fs::read_to_string(format!("{reference}/whisper.json")).unwrap();
        let fixture: serde_json::Value = serde_json::from_str(&fixture).unwrap();
        let mel = Mel::new(80);
        let mut threads = ThreadPool::new(2).unwrap();
        for case in fixture["cases"].as_array().unwrap() {
            let sound = case["sound"].as_str().unwrap();
            let mut samples = std::fs::read(format!("{reference}/whisper/{sound}.s16")).unwrap();
            let ends = samples.len() / 2 / HOP * 80;
            let mut alone = vec![f32::NAN; FRAMES * 80];
            mel.frames(&mut threads, &samples, &mut alone);
            samples.resize(2 * SAMPLES, 0);
            let mut frames = vec![0.0; FRAMES * 80];
            mel.frames(&mut threads, &samples, &mut frames);
            assert_eq!(alone[..ends], frames[..ends], "what follows the sound changes it");
            assert!(alone[ends..].iter().all(|x| *x == 0.0));
            let expected = case["mel"].as_array().unwrap();
            assert!(expected.len() > 200);
            for place in expected {
                let at = |i: usize| place[i].as_u64().unwrap() as usize;
                let found = f64::from(frames[at(0) * 80 + at(1)]);
                let expected = place[2].as_f64().unwrap();
                assert!((found - expected).abs() < 1e-4, "{place} {found}");
            }
        }
    }
}
