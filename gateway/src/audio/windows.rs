//! Reads a file as it is needed: who transcribes asks for one window after another.
//!
//! Decoding is computing, so it happens on threads of its own, at most as many at once as there are
//! cores, and ends when it takes too long, or when nobody waits for it. No thread is held between two
//! windows.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use actix_web::web::Bytes;
use tokio::sync::Semaphore;
use tokio::time::timeout_at;

use super::decode::Decoder;
use super::resample::Resampler;
use super::{Fault, RATE};
use crate::error::ApiError;

/// How long decoding may take, beside a share of the sound that it makes: what needs longer was made
/// to.
const DECODE_WITHIN: Duration = Duration::from_secs(60);
const DECODE_SHARE: f64 = 0.2;
/// A file that ends this much before its own end was cut off: a share of it, and seconds.
const CUT: (f64, f64) = (0.01, 0.5);

/// The threads that decode.
pub struct Decoders {
    threads: Arc<Semaphore>,
    max_seconds: f64,
}

/// A file that is being heard.
pub struct Windows {
    decoders: Arc<Decoders>,
    until: Instant,
    /// Taken while a thread works with it.
    sound: Option<Sound>,
    /// Samples from `start` on.
    samples: Vec<i16>,
    start: usize,
    /// Samples of the whole file.
    length: usize,
}

/// A file on its way to samples.
struct Sound {
    decoder: Decoder,
    resampler: Resampler,
    mono: Vec<f32>,
    ended: bool,
}

impl Decoders {
    /// Decodes on this many threads at once, files of at most this many seconds.
    pub fn new(threads: usize, max_seconds: u64) -> Arc<Self> {
        let threads = Arc::new(Semaphore::new(threads.max(1)));
        Arc::new(Self { threads, max_seconds: max_seconds as f64 })
    }

    /// Decodes a file once, to its end, so that what is wrong with it is known before anything is
    /// answered; and opens it.
    pub async fn open(self: &Arc<Self>, file: Bytes, until: Instant) -> Result<Windows, ApiError> {
        let (max_seconds, whole) = (self.max_seconds, file.clone());
        let seconds =
            self.run(until, move |patience| measure(whole, max_seconds, &patience)).await?;
        let seconds = seconds.map_err(Fault::refused)?;
        let sound = self.run(until, move |_| Sound::open(file)).await?.map_err(Fault::refused)?;
        Ok(Windows {
            decoders: self.clone(),
            until,
            sound: Some(sound),
            samples: Vec::new(),
            start: 0,
            length: (seconds * RATE as f64).round() as usize,
        })
    }

    /// Runs `work` on one of the threads. It is told how long it may take, and stops when nobody
    /// waits for it any more.
    async fn run<T: Send + 'static>(
        &self,
        until: Instant,
        work: impl FnOnce(Patience) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let free = timeout_at(until.into(), self.threads.clone().acquire_owned()).await;
        let thread = free.map_err(|_| ApiError::timed_out())?;
        let waiting = Arc::new(());
        let waits = Arc::downgrade(&waiting);
        let work = tokio::task::spawn_blocking(move || {
            let _thread = thread;
            work(Patience { began: Instant::now(), until, waits })
        });
        match work.await {
            // Given up for it.
            Ok(_) if Instant::now() >= until => Err(ApiError::timed_out()),
            Ok(done) => Ok(done),
            // A decoder that panics met what its author did not think of.
            Err(error) if error.is_panic() => {
                let what = "is damaged (its decoder gave up); convert it to WAV.";
                Err(Fault::new(what).refused())
            }
            Err(error) => Err(ApiError::internal(format!("Decoding failed: {error}."))),
        }
    }
}

impl Windows {
    /// Samples of the whole file.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Seconds of the whole file.
    pub fn seconds(&self) -> f64 {
        self.length as f64 / RATE as f64
    }

    /// At most `count` samples from `start` on: fewer at the file's end. `start` never goes back.
    pub async fn read(&mut self, start: usize, count: usize) -> Result<&[i16], ApiError> {
        let end = start + count;
        if self.start + self.samples.len() < end
            && let Some(mut sound) = self.sound.take_if(|sound| !sound.ended)
        {
            let mut samples = std::mem::take(&mut self.samples);
            let mut from = self.start;
            let read = move |patience: Patience| {
                // What lies before `start` is let go on the way.
                let read = loop {
                    let gone = start.saturating_sub(from).min(samples.len());
                    samples.drain(..gone);
                    from += gone;
                    if sound.ended || from + samples.len() >= end {
                        break Ok(());
                    }
                    if let Err(fault) = sound.more(&mut samples, &patience) {
                        break Err(fault);
                    }
                };
                read.map(|()| (sound, samples, from))
            };
            let read = self.decoders.run(self.until, read).await?;
            let (sound, samples, from) = read.map_err(Fault::refused)?;
            (self.sound, self.samples, self.start) = (Some(sound), samples, from);
        }
        let gone = start.saturating_sub(self.start).min(self.samples.len());
        self.samples.drain(..gone);
        self.start += gone;
        // Rounding may make one sample more, or less, than was measured.
        let left = self.length.saturating_sub(start);
        Ok(&self.samples[..count.min(left).min(self.samples.len())])
    }
}

impl Sound {
    fn open(file: Bytes) -> Result<Self, Fault> {
        let decoder = Decoder::open(file)?;
        Ok(Self { decoder, resampler: Resampler::default(), mono: Vec::new(), ended: false })
    }

    /// Adds a little more, or notes the end.
    fn more(&mut self, samples: &mut Vec<i16>, patience: &Patience) -> Result<(), Fault> {
        patience.lasts(samples.len() as f64 / RATE as f64)?;
        match self.decoder.next(&mut self.mono)? {
            Some(rate) => self.resampler.push(rate, &self.mono, samples),
            None => {
                self.ended = true;
                self.resampler.finish(samples)
            }
        }
    }
}

/// How long decoding may take.
struct Patience {
    began: Instant,
    /// The request's end.
    until: Instant,
    /// Gone when the request is.
    waits: Weak<()>,
}

impl Patience {
    /// `seconds` of sound were made so far.
    fn lasts(&self, seconds: f64) -> Result<(), Fault> {
        if self.waits.strong_count() == 0 || Instant::now() >= self.until {
            return Err(Fault::new("is not waited for any more."));
        }
        if self.began.elapsed() < DECODE_WITHIN + Duration::from_secs_f64(seconds * DECODE_SHARE) {
            return Ok(());
        }
        Err(Fault::new("takes too long to decode; convert it to WAV."))
    }
}

/// Decodes a file to its end and returns its length in seconds.
fn measure(file: Bytes, max_seconds: f64, patience: &Patience) -> Result<f64, Fault> {
    let mut decoder = Decoder::open(file)?;
    let (mut seconds, mut mono) = (0.0, Vec::new());
    while let Some(rate) = decoder.next(&mut mono)? {
        patience.lasts(seconds)?;
        seconds += mono.len() as f64 / f64::from(rate.max(1));
        if seconds > max_seconds {
            return Err(Fault::new(format!(
                "lasts longer than {max_seconds} s, the most that is heard in one request \
                 (--max-audio-seconds); send it in parts."
            )));
        }
    }
    if seconds == 0.0 {
        return Err(Fault::new("holds no sound at all; send a recording."));
    }
    if let Some(declared) = decoder.declared()
        && declared - seconds > CUT.1.max(declared * CUT.0)
        // Whoever writes to a pipe does not know the length, and says the longest there is.
        && declared <= max_seconds
    {
        return Err(Fault::new(format!(
            "is cut off: it should last {declared:.1} s and ends after {seconds:.1} s; send it again."
        )));
    }
    Ok(seconds)
}
