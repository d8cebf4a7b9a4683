//! Containers and codecs, with symphonia.

use std::io::{Cursor, ErrorKind};

use actix_web::web::Bytes;
use symphonia::core::codecs::CodecParameters;
use symphonia::core::codecs::audio::well_known::{CODEC_ID_OPUS, CODEC_ID_VORBIS};
use symphonia::core::codecs::audio::{AudioCodecParameters, AudioDecoder, AudioDecoderOptions};
use symphonia::core::errors::Error;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::well_known::{
    FORMAT_ID_ADTS, FORMAT_ID_MP1, FORMAT_ID_MP2, FORMAT_ID_MP3,
};
use symphonia::core::formats::{FormatReader, Track, TrackType};
use symphonia::core::io::{MediaSourceStream, MediaSourceStreamOptions};

use super::{Fault, opus, vorbis, wav};

/// What may be sent, for messages.
const KNOWN: &str =
    "WAV, MP3, FLAC, Ogg (Vorbis, Opus), WebM, MP4 or M4A (AAC, ALAC), AIFF and CAF";
/// Samples of a packet in one channel: FLAC's longest are 65,535.
const MAX_FRAMES: u64 = 1 << 16;
/// Recordings that may follow each other in one file. Each has a decoder of its own.
const MAX_LINKS: usize = 100;
/// Of this many packets, one may be damaged: recordings of streams begin in the middle of a frame.
const DAMAGED: usize = 50;
/// Damaged packets that a short file may have.
const FEW: usize = 2;

/// A file that is being decoded.
pub struct Decoder {
    format: Box<dyn FormatReader>,
    track: u32,
    codec: Codec,
    interleaved: Vec<f32>,
    packets: usize,
    damaged: usize,
    /// Recordings that were put behind the first.
    links: usize,
}

enum Codec {
    Symphonia(Box<dyn AudioDecoder>),
    Opus(Box<opus::Decoder>),
}

impl Decoder {
    /// Looks what a file is.
    pub fn open(file: Bytes) -> Result<Self, Fault> {
        if file.is_empty() {
            return Err(Fault::new("is empty; send a sound file."));
        }
        let options = MediaSourceStreamOptions::default();
        let stream = MediaSourceStream::new(Box::new(Cursor::new(wav::measured(file))), options);
        let probe = symphonia::default::get_probe();
        let format = probe
            .probe(&Hint::new(), stream, Default::default(), Default::default())
            .map_err(|error| {
                let what = explain(&error);
                Fault::new(format!("is not a sound file that can be read ({what}); send {KNOWN}."))
            })?;
        let (track, codec) = choose(&*format)?;
        Ok(Self { format, track, codec, interleaved: Vec::new(), packets: 0, damaged: 0, links: 0 })
    }

    /// Seconds of sound, as far as the file says.
    pub fn declared(&self) -> Option<f64> {
        let track = self.format.tracks().iter().find(|track| track.id == self.track)?;
        // Nothing but frames: their number is guessed from some of them, unless the encoder left a
        // tag, which tells the delay too.
        let adts = self.format.format_info().format == FORMAT_ID_ADTS;
        if adts || (is_mpeg(&*self.format) && track.delay.is_none()) {
            return None;
        }
        let rate = parameters(track)?.sample_rate.filter(|rate| *rate > 0);
        let by_frames = track.num_frames.zip(rate).map(|(n, rate)| n as f64 / f64::from(rate));
        by_frames.or_else(|| {
            let time = track.time_base?.calc_duration(track.duration?)?;
            Some(time.as_secs_f64())
        })
    }

    /// Decodes some more: puts samples, mixed to one channel, in the place of those in `mono` and
    /// returns their rate; `None` at the end.
    pub fn next(&mut self, mono: &mut Vec<f32>) -> Result<Option<u32>, Fault> {
        loop {
            let packet = match self.format.next_packet() {
                Ok(Some(packet)) => packet,
                Ok(None) => return self.end(),
                // Recordings that were cut off, and streams without a length, end so.
                Err(Error::IoError(error)) if error.kind() == ErrorKind::UnexpectedEof => {
                    return self.end();
                }
                // A recording that was put behind another one.
                Err(Error::ResetRequired) => {
                    self.links += 1;
                    if self.links > MAX_LINKS {
                        let what = format!("it is a chain of more than {MAX_LINKS} recordings");
                        return Err(corrupt(&what));
                    }
                    (self.track, self.codec) = choose(&*self.format)?;
                    continue;
                }
                Err(error) => return Err(corrupt(&explain(&error))),
            };
            if packet.track_id != self.track {
                continue;
            }
            self.packets += 1;
            let decoded = match &mut self.codec {
                Codec::Opus(decoder) => {
                    let channels = decoder.channels;
                    decoder.decode(&packet.data).map(|samples| {
                        // The last packet may end with samples that are none of the recording.
                        let surplus = packet.trim_end.get() as usize * channels;
                        (opus::RATE, &samples[..samples.len().saturating_sub(surplus)], channels)
                    })
                }
                Codec::Symphonia(decoder) => match decoder.decode(&packet) {
                    Ok(buffer) => {
                        buffer.copy_to_vec_interleaved(&mut self.interleaved);
                        let spec = buffer.spec();
                        let channels = spec.channels().count();
                        let early = match is_mpeg(&*self.format) {
                            true => packet.trim_start.get() as usize * channels,
                            false => 0,
                        };
                        let early = early.min(self.interleaved.len());
                        Some((spec.rate(), &self.interleaved[early..], channels))
                    }
                    Err(Error::DecodeError(_) | Error::IoError(_)) => None,
                    Err(Error::ResetRequired) => {
                        decoder.reset();
                        None
                    }
                    Err(error) => return Err(corrupt(&explain(&error))),
                },
            };
            match decoded {
                Some((rate, samples, channels)) if !samples.is_empty() && channels > 0 => {
                    mix(samples, channels, mono);
                    return Ok(Some(rate));
                }
                Some(_) => {}
                None => {
                    self.damaged += 1;
                    if self.damaged > FEW + self.packets / DAMAGED {
                        return Err(corrupt("what it holds does not decode"));
                    }
                }
            }
        }
    }

    fn end(&self) -> Result<Option<u32>, Fault> {
        match self.packets {
            0 => Err(Fault::new("holds no sound at all; send a recording.")),
            packets if packets == self.damaged => Err(corrupt("what it holds does not decode")),
            _ => Ok(None),
        }
    }
}

/// The track to listen to, and its decoder.
fn choose(format: &dyn FormatReader) -> Result<(u32, Codec), Fault> {
    let track = format.default_track(TrackType::Audio);
    let parameters = track.and_then(|track| Some((track.id, parameters(track)?)));
    let Some((id, parameters)) = parameters else {
        return Err(Fault::new(format!("has no sound in it that can be read; send {KNOWN}.")));
    };
    if parameters.codec == CODEC_ID_OPUS {
        let head = parameters.extra_data.as_deref().unwrap_or_default();
        let channels = parameters.channels.as_ref().map_or(1, |channels| channels.count());
        return Ok((id, Codec::Opus(Box::new(opus::Decoder::new(head, channels)?))));
    }
    // Decoders make room for what a header says before they see a packet.
    if parameters.max_frames_per_packet.is_some_and(|frames| frames > MAX_FRAMES) {
        return Err(corrupt("its packets are longer than any can be"));
    }
    let head = parameters.extra_data.as_deref().unwrap_or_default();
    if parameters.codec == CODEC_ID_VORBIS
        && vorbis::table_size(head).is_some_and(|size| size > vorbis::MAX_TABLES)
    {
        return Err(corrupt("its tables are larger than any can be"));
    }
    let codecs = symphonia::default::get_codecs();
    // The end of a file of frames alone is a guess, or that of the first of several which were put
    // behind each other: nothing is cut there.
    let options = AudioDecoderOptions::default().gapless(!is_mpeg(format));
    let decoder = codecs.make_audio_decoder(parameters, &options);
    let decoder = decoder.map_err(|error| {
        let what = explain(&error);
        Fault::new(format!("has a codec that cannot be decoded ({what}); send {KNOWN}."))
    })?;
    Ok((id, Codec::Symphonia(decoder)))
}

fn parameters(track: &Track) -> Option<&AudioCodecParameters> {
    match &track.codec_params {
        Some(CodecParameters::Audio(parameters)) => Some(parameters),
        _ => None,
    }
}

/// Whether a file is frames of MPEG audio without a container.
fn is_mpeg(format: &dyn FormatReader) -> bool {
    [FORMAT_ID_MP1, FORMAT_ID_MP2, FORMAT_ID_MP3].contains(&format.format_info().format)
}

fn mix(interleaved: &[f32], channels: usize, mono: &mut Vec<f32>) {
    mono.clear();
    match channels {
        1 => mono.extend_from_slice(interleaved),
        _ => {
            let scale = 1.0 / channels as f32;
            let frames = interleaved.chunks_exact(channels);
            mono.extend(frames.map(|frame| frame.iter().sum::<f32>() * scale));
        }
    }
}

fn corrupt(what: &str) -> Fault {
    Fault::new(format!("is damaged ({what}); send it again, or convert it to WAV."))
}

/// A reason in symphonia's words.
fn explain(error: &Error) -> String {
    match error {
        Error::IoError(error) if error.kind() == ErrorKind::UnexpectedEof => {
            "it ends too early".to_owned()
        }
        error => error.to_string(),
    }
}
