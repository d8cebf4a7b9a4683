//! Any sample rate to 16 kHz, as a stream, with rubato's FFT resampler.

use audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Indexing, Resampler as _, WindowFunction};

use super::{Fault, RATE};

/// Rates that are taken: what is below holds no speech, what is above is no recording.
const RATES: std::ops::RangeInclusive<u32> = 2_000..=768_000;
/// About how many samples go through at once.
const CHUNK: usize = 2048;

/// One stream of sound on its way to 16 kHz.
#[derive(Default)]
pub struct Resampler {
    at: Option<Stage>,
}

/// As long as the rate does not change.
struct Stage {
    rate: u32,
    /// Nothing is to be done at the right rate.
    fft: Option<Fft<f32>>,
    /// Samples that do not fill a chunk yet.
    pending: Vec<f32>,
    made: Vec<f32>,
    /// Samples at the beginning that are the resampler's own delay.
    delay: usize,
    taken: u64,
    given: u64,
}

impl Resampler {
    /// Takes samples of this rate and adds to `out` what they make.
    pub fn push(&mut self, rate: u32, samples: &[f32], out: &mut Vec<i16>) -> Result<(), Fault> {
        if self.at.as_ref().is_some_and(|stage| stage.rate != rate) {
            self.finish(out)?;
        }
        let stage = match &mut self.at {
            Some(stage) => stage,
            none => none.insert(Stage::new(rate)?),
        };
        stage.push(samples, out)
    }

    /// Adds what is still on its way.
    pub fn finish(&mut self, out: &mut Vec<i16>) -> Result<(), Fault> {
        self.at.take().map_or(Ok(()), |stage| stage.finish(out))
    }
}

impl Stage {
    fn new(rate: u32) -> Result<Self, Fault> {
        if !RATES.contains(&rate) {
            let (least, most) = RATES.into_inner();
            let message = format!(
                "has {rate} samples a second; send a recording with {least} to {most} of them."
            );
            return Err(Fault::new(message));
        }
        let same = rate as usize == RATE;
        let fft = (!same)
            .then(|| {
                let window = WindowFunction::BlackmanHarris2;
                Fft::new_custom(rate as usize, RATE, CHUNK, 1, 1, window, FixedSync::Input)
            })
            .transpose()
            .map_err(|error| Fault::new(format!("cannot be resampled: {error}.")))?;
        let delay = fft.as_ref().map_or(0, |fft| fft.output_delay());
        let made = vec![0.0; fft.as_ref().map_or(0, |fft| fft.output_frames_max())];
        Ok(Self { rate, fft, pending: Vec::new(), made, delay, taken: 0, given: 0 })
    }

    fn push(&mut self, samples: &[f32], out: &mut Vec<i16>) -> Result<(), Fault> {
        self.taken += samples.len() as u64;
        let Some(fft) = &mut self.fft else {
            self.given += samples.len() as u64;
            out.extend(samples.iter().copied().map(sixteen_bits));
            return Ok(());
        };
        self.pending.extend_from_slice(samples);
        let mut from = 0;
        loop {
            let needed = fft.input_frames_next();
            let Some(chunk) = self.pending.get(from..from + needed) else { break };
            let made = process(fft, chunk, &mut self.made, None)?;
            from += needed;
            let skipped = self.delay.min(made);
            self.delay -= skipped;
            self.given += (made - skipped) as u64;
            out.extend(self.made[skipped..made].iter().copied().map(sixteen_bits));
        }
        self.pending.drain(..from);
        Ok(())
    }

    fn finish(mut self, out: &mut Vec<i16>) -> Result<(), Fault> {
        let Some(fft) = &mut self.fft else { return Ok(()) };
        let whole = (self.taken * RATE as u64).div_ceil(self.rate.into());
        let mut rest = std::mem::take(&mut self.pending);
        while self.given < whole {
            // Silence pushes out what is inside.
            let partial = rest.len();
            rest.resize(fft.input_frames_next(), 0.0);
            let made = process(fft, &rest, &mut self.made, Some(partial))?;
            rest.clear();
            let skipped = self.delay.min(made);
            self.delay -= skipped;
            let wanted = (made - skipped).min((whole - self.given) as usize);
            self.given += wanted as u64;
            out.extend(self.made[skipped..skipped + wanted].iter().copied().map(sixteen_bits));
        }
        Ok(())
    }
}

/// Puts one chunk through; returns how many samples came out.
fn process(
    fft: &mut Fft<f32>,
    chunk: &[f32],
    made: &mut [f32],
    partial: Option<usize>,
) -> Result<usize, Fault> {
    let failed = |error: String| Fault::new(format!("cannot be resampled: {error}."));
    let room = made.len();
    let input = InterleavedSlice::new(chunk, 1, chunk.len()).map_err(|e| failed(e.to_string()))?;
    let mut output = InterleavedSlice::new_mut(made, 1, room).map_err(|e| failed(e.to_string()))?;
    let indexing = partial.map(|frames| Indexing::new().partial_len(frames));
    let done = fft.process_into_buffer(&input, &mut output, indexing.as_ref());
    done.map(|(_, frames)| frames).map_err(|error| failed(error.to_string()))
}

fn sixteen_bits(sample: f32) -> i16 {
    // `as` saturates, and makes NaN silence.
    (sample * 32768.0).round() as i16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `seconds` of a tone.
    fn tone(rate: u32, hertz: f64, seconds: f64) -> Vec<f32> {
        let sample = |i| (std::f64::consts::TAU * hertz * f64::from(i) / f64::from(rate)).sin();
        (0..(f64::from(rate) * seconds) as u32).map(|i| (sample(i) * 0.5) as f32).collect()
    }

    fn resample(rate: u32, samples: &[f32], piece: usize) -> Vec<i16> {
        let mut resampler = Resampler::default();
        let mut out = Vec::new();
        for piece in samples.chunks(piece) {
            resampler.push(rate, piece, &mut out).unwrap();
        }
        resampler.finish(&mut out).unwrap();
        out
    }

    #[test]
    fn a_tone_stays_in_pitch_level_and_time_at_every_rate() {
        let expected = resample(16_000, &tone(16_000, 440.0, 1.5), 999);
        assert_eq!(expected.len(), 24_000);
        for rate in [8_000, 11_025, 22_050, 24_000, 44_100, 44_101, 48_000, 96_000, 192_000] {
            let made = resample(rate, &tone(rate, 440.0, 1.5), 777);
            assert!(made.len().abs_diff(24_000) <= 1, "{rate}: {}", made.len());
            // A shift of less than a sample is let pass. The ends, where the tone begins and stops,
            // ring.
            let step = 16_384.0 * std::f64::consts::TAU * 440.0 / 16_000.0;
            for (i, (made, expected)) in made.iter().zip(&expected).enumerate().skip(400) {
                let off = (i32::from(*made) - i32::from(*expected)).abs();
                assert!(
                    f64::from(off) < step || i > 23_600,
                    "{rate}: {made} for {expected} at {i}"
                );
            }
        }
    }

    #[test]
    fn what_16_khz_cannot_hold_is_silenced_not_folded() {
        let made = resample(48_000, &tone(48_000, 11_000.0, 1.0), 1000);
        let loudest = made[500..15_500].iter().map(|sample| sample.unsigned_abs()).max();
        assert!(loudest < Some(20), "{loudest:?}");
    }

    #[test]
    fn pieces_make_no_difference() {
        let samples = tone(44_100, 300.0, 0.7);
        let whole = resample(44_100, &samples, samples.len());
        for piece in [1, 17, 4096] {
            assert_eq!(resample(44_100, &samples, piece), whole, "{piece}");
        }
    }

    #[test]
    fn a_rate_that_changes_on_the_way_is_followed() {
        let mut resampler = Resampler::default();
        let mut out = Vec::new();
        resampler.push(8_000, &tone(8_000, 200.0, 1.0), &mut out).unwrap();
        resampler.push(48_000, &tone(48_000, 200.0, 1.0), &mut out).unwrap();
        resampler.finish(&mut out).unwrap();
        assert_eq!(out.len(), 32_000);
    }

    #[test]
    fn rates_of_no_recording_are_refused_and_short_sounds_are_not() {
        for rate in [0, 1, 1_000_000, u32::MAX] {
            let error = Resampler::default().push(rate, &[0.0], &mut Vec::new()).unwrap_err();
            assert!(error.0.contains("samples a second"), "{error:?}");
        }
        for length in [0, 1, 5] {
            let made = resample(48_000, &vec![0.1; length], 1);
            assert_eq!(made.len(), length.div_ceil(3));
        }
        assert_eq!(sixteen_bits(f32::NAN), 0);
        assert_eq!((sixteen_bits(7.0), sixteen_bits(-7.0)), (i16::MAX, i16::MIN));
    }
}
