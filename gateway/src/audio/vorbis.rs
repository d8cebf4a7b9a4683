//! How much a Vorbis decoder would set up.
//!
//! A header of some kilobytes can ask for tables of gigabytes, which are built before the first packet
//! is looked at. They are counted here first: the codebooks at the head of the setup header, as in
//! sections 3.2.1 and 4.2.4 of the Vorbis I specification.

/// Numbers in all tables of a sound header; those of libvorbis have less than half as many.
pub(super) const MAX_TABLES: u64 = 1 << 22;

/// What begins the setup header.
const SETUP: &[u8] = b"\x05vorbis";
/// What begins a codebook.
const CODEBOOK: u64 = 0x56_4342;

/// Numbers in the tables that codebooks ask for; `None` where the header does not say. Not counted
/// to its end when it is too large.
pub(super) fn table_size(headers: &[u8]) -> Option<u64> {
    let at = headers.windows(SETUP.len()).position(|bytes| bytes == SETUP)?;
    let mut bits = Bits { bytes: &headers[at + SETUP.len()..], at: 0 };
    let mut size = 0;
    for _ in 0..=bits.take(8)? {
        if bits.take(24)? != CODEBOOK {
            return None;
        }
        let (dimensions, entries) = (bits.take(16)?, bits.take(24)?);
        size += (dimensions * entries).max(entries);
        if size > MAX_TABLES {
            return Some(size);
        }
        skip_lengths(&mut bits, entries)?;
        let lookup = bits.take(4)?;
        if lookup > 0 {
            // The least value and the step, as floats.
            bits.skip(64)?;
            let width = bits.take(4)? + 1;
            bits.skip(1)?;
            let values = match lookup {
                1 => root(entries, dimensions),
                2 => dimensions * entries,
                _ => return None,
            };
            bits.skip(values * width)?;
        }
    }
    Some(size)
}

/// Passes the lengths of a codebook's words.
fn skip_lengths(bits: &mut Bits<'_>, entries: u64) -> Option<()> {
    if bits.take(1)? == 1 {
        bits.skip(5)?;
        let mut known = 0;
        while known < entries {
            known += bits.take((entries - known).ilog2() + 1)?;
        }
        return Some(());
    }
    let sparse = bits.take(1)? == 1;
    for _ in 0..entries {
        if !sparse || bits.take(1)? == 1 {
            bits.skip(5)?;
        }
    }
    Some(())
}

/// The largest number whose power of `dimensions` is at most `entries`.
fn root(entries: u64, dimensions: u64) -> u64 {
    let Ok(dimensions) = u32::try_from(dimensions) else { return 0 };
    let fits = |r: u64| r.checked_pow(dimensions).is_some_and(|power| power <= entries);
    if dimensions == 0 { 0 } else { (1..=entries).take_while(|&r| fits(r)).last().unwrap_or(0) }
}

/// Bits, the least of a byte first.
struct Bits<'a> {
    bytes: &'a [u8],
    at: u64,
}

impl Bits<'_> {
    fn take(&mut self, count: u32) -> Option<u64> {
        let mut value = 0;
        for i in 0..count {
            let byte = *self.bytes.get(usize::try_from(self.at / 8).ok()?)?;
            value |= u64::from(byte >> (self.at % 8) & 1) << i;
            self.at += 1;
        }
        Some(value)
    }

    fn skip(&mut self, count: u64) -> Option<()> {
        self.at = self.at.checked_add(count)?;
        (self.at <= self.bytes.len() as u64 * 8).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes bits, the least first.
    #[derive(Default)]
    struct Out {
        bytes: Vec<u8>,
        at: usize,
    }

    impl Out {
        fn put(&mut self, value: u64, count: u32) {
            for i in 0..count {
                if self.at.is_multiple_of(8) {
                    self.bytes.push(0);
                }
                *self.bytes.last_mut().unwrap() |= ((value >> i & 1) as u8) << (self.at % 8);
                self.at += 1;
            }
        }

        /// Of ordered words, all of one length, and with a table of one number for each dimension.
        fn codebook(&mut self, dimensions: u64, entries: u64) {
            self.put(CODEBOOK, 24);
            self.put(dimensions, 16);
            self.put(entries, 24);
            self.put(1, 1);
            self.put(16, 5);
            self.put(entries, entries.ilog2() + 1);
            self.put(1, 4);
            self.put(0, 64);
            self.put(3, 4);
            self.put(0, 1);
            self.put(0, 4 * root(entries, dimensions) as u32);
        }
    }

    #[test]
    fn tables_are_counted_over_all_codebooks() {
        let mut out = Out::default();
        SETUP.iter().for_each(|&byte| out.put(byte.into(), 8));
        out.put(2, 8);
        out.codebook(2, 81);
        out.codebook(4, 625);
        out.codebook(1, 7);
        assert_eq!(table_size(&out.bytes), Some(162 + 2500 + 7));
        assert_eq!(table_size(&out.bytes[..20]), None);
    }

    #[test]
    fn a_header_of_some_kilobytes_that_asks_for_gigabytes_is_seen() {
        let mut out = Out::default();
        SETUP.iter().for_each(|&byte| out.put(byte.into(), 8));
        out.put(255, 8);
        (0..256).for_each(|_| out.codebook(32, 131_072));
        assert!(out.bytes.len() < 10_000);
        assert!(table_size(&out.bytes).unwrap() > MAX_TABLES);
    }
}
