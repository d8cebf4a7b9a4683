//! Opus (RFC 6716, RFC 8251), which browsers record and symphonia does not decode.

use opus_decoder::OpusDecoder;

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
}

/// A decoder of one track.
pub struct Decoder {
    decoder: Box<OpusDecoder>,
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
        let head = Head::read(head).unwrap_or(Head { channels, pre_skip: 0, gain: 1.0 });
        // More of them are several streams (RFC 7845, section 5.1.1).
        if head.channels > 2 {
            return Err(Fault::new(format!(
                "has an Opus track of {} channels; send one of one or two.",
                head.channels
            )));
        }
        // Any decoder makes one channel of two, or two of one.
        let channels = head.channels.max(1);
        let decoder = OpusDecoder::new(RATE, channels).map_err(|error| {
            Fault::new(format!("has an Opus track that cannot be decoded: {error}."))
        })?;
        let pcm = vec![0.0; MAX_FRAMES * channels];
        Ok(Self { decoder: Box::new(decoder), channels, skip: head.pre_skip, gain: head.gain, pcm })
    }

    /// Decodes a packet: the interleaved samples, or `None` when it is damaged.
    pub fn decode(&mut self, packet: &[u8]) -> Option<&[f32]> {
        let frames = self.decoder.decode_float(packet, &mut self.pcm, false).ok()?;
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
        let [_version, channels, skip_low, skip_high, _, _, _, _, gain_low, gain_high, ..] = *rest
        else {
            return None;
        };
        let gain = f32::from(i16::from_le_bytes([gain_low, gain_high])) / 256.0;
        Some(Self {
            channels: usize::from(channels).max(1),
            pre_skip: u16::from_le_bytes([skip_low, skip_high]).into(),
            gain: 10_f32.powf(gain / 20.0),
        })
    }
}
