//! Opus (RFC 6716, RFC 8251), which browsers record and symphonia does not decode.

use opus_decoder::{OpusDecoder, OpusMultistreamDecoder};

use super::Fault;

/// Opus has one clock, whatever was recorded.
pub const RATE: u32 = 48_000;

/// A packet's most samples of a channel: 120 ms.
const MAX_FRAMES: usize = RATE as usize * 120 / 1000;

/// The identification header of RFC 7845, section 5.1.
struct Head {
    channels: usize,
    pre_skip: usize,
    gain: f32,
    streams: Option<Streams>,
}

/// How several streams make the channels: section 5.1.1.
struct Streams {
    count: usize,
    coupled: usize,
    mapping: Vec<u8>,
}

enum Kind {
    One(Box<OpusDecoder>),
    Several(Box<OpusMultistreamDecoder>),
}

/// A decoder of one track.
pub struct Decoder {
    kind: Kind,
    /// Channels.
    pub channels: usize,
    /// Samples at the beginning that are none of the recording.
    skip: usize,
    gain: f32,
    pcm: Vec<f32>,
}

impl Decoder {
    /// A decoder by the track's header, which is `OpusHead` in Ogg, Matroska and WebM.
    pub fn new(head: &[u8], channels: usize) -> Result<Self, Fault> {
        let head =
            Head::read(head).unwrap_or(Head { channels, pre_skip: 0, gain: 1.0, streams: None });
        let odd = |error| Fault::new(format!("has an Opus track that cannot be decoded: {error}."));
        let kind = match &head.streams {
            None => {
                // Any decoder makes one channel of two, or two of one.
                let decoder = OpusDecoder::new(RATE, head.channels.clamp(1, 2)).map_err(odd)?;
                Kind::One(Box::new(decoder))
            }
            Some(Streams { count, coupled, mapping }) => {
                let decoder =
                    OpusMultistreamDecoder::new(RATE, head.channels, *count, *coupled, mapping);
                Kind::Several(Box::new(decoder.map_err(odd)?))
            }
        };
        let channels = match &kind {
            Kind::One(_) => head.channels.clamp(1, 2),
            Kind::Several(_) => head.channels,
        };
        let pcm = vec![0.0; MAX_FRAMES * channels];
        Ok(Self { kind, channels, skip: head.pre_skip, gain: head.gain, pcm })
    }

    /// Decodes a packet: the interleaved samples, or `None` when it is damaged.
    pub fn decode(&mut self, packet: &[u8]) -> Option<&[f32]> {
        let decoded = match &mut self.kind {
            Kind::One(decoder) => decoder.decode_float(packet, &mut self.pcm, false),
            Kind::Several(decoder) => decoder.decode_float(packet, &mut self.pcm, false),
        };
        let frames = decoded.ok()?;
        let skipped = self.skip.min(frames);
        self.skip -= skipped;
        let samples = &mut self.pcm[skipped * self.channels..frames * self.channels];
        if self.gain != 1.0 {
            samples.iter_mut().for_each(|sample| *sample *= self.gain);
        }
        Some(samples)
    }
}

impl Head {
    fn read(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(b"OpusHead")?;
        let [_version, channels, skip_low, skip_high, _, _, _, _, gain_low, gain_high, family, ..] =
            *rest
        else {
            return None;
        };
        let gain = f32::from(i16::from_le_bytes([gain_low, gain_high])) / 256.0;
        let channels = usize::from(channels);
        let streams = match family {
            0 => None,
            _ => {
                let table = rest.get(11..)?;
                let mapping = table.get(2..2 + channels)?.to_vec();
                Some(Streams { count: table[0].into(), coupled: table[1].into(), mapping })
            }
        };
        Some(Self {
            channels: channels.max(1),
            pre_skip: u16::from_le_bytes([skip_low, skip_high]).into(),
            gain: 10_f32.powf(gain / 20.0),
            streams,
        })
    }
}
