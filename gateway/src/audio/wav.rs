//! WAV files whose header does not know how long they are.
//!
//! A program that writes into a pipe says the longest there is: ffmpeg 0xffffffff bytes, espeak-ng
//! 0x7ffff000. A reader that holds chunks to the lengths of those around them takes that for damage.

use actix_web::web::Bytes;

/// From here on a length is none: some programs leave room for other chunks below 2³¹.
const UNKNOWN: usize = 0x7fff_0000;
/// Name and length of a chunk.
const HEAD: usize = 8;

/// The file, with the lengths that it has where its header tells none.
pub(super) fn measured(file: Bytes) -> Bytes {
    match sound(&file) {
        Some(at) => {
            let mut whole = file.to_vec();
            set(&mut whole, 0);
            set(&mut whole, at);
            whole.into()
        }
        None => file,
    }
}

/// Where the chunk of samples is, if its length is unknown.
fn sound(file: &[u8]) -> Option<usize> {
    if !file.starts_with(b"RIFF") || file.get(8..12)? != b"WAVE" {
        return None;
    }
    let mut at = 12;
    loop {
        let head = file.get(at..at + HEAD)?;
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if head.starts_with(b"data") {
            return (length >= UNKNOWN).then_some(at);
        }
        // Chunks begin at even places.
        at = at.checked_add(HEAD + length.next_multiple_of(2))?;
    }
}

/// Gives the chunk at `at` all that follows it.
fn set(file: &mut [u8], at: usize) {
    let length = u32::try_from(file.len() - at - HEAD).unwrap_or(u32::MAX);
    file[at + 4..at + HEAD].copy_from_slice(&length.to_le_bytes());
}
