//! Looks for markers in text that comes letter by letter.

/// Watches for one of several markers, none of which begins another.
#[derive(Debug, Default)]
pub(super) struct Markers {
    markers: Vec<&'static str>,
    /// The beginning of a marker.
    held: String,
}

impl Markers {
    pub(super) fn new(markers: &[&'static str]) -> Self {
        Self { markers: markers.to_vec(), held: String::new() }
    }

    /// Adds a letter: the marker that it completes, if it does. What belongs to none goes to
    /// `other`.
    pub(super) fn step(&mut self, c: char, mut other: impl FnMut(char)) -> Option<&'static str> {
        self.held.push(c);
        while let Some(first) = self.held.chars().next() {
            if let Some(marker) = self.markers.iter().find(|marker| **marker == self.held) {
                self.held.clear();
                return Some(marker);
            }
            if self.markers.iter().any(|marker| marker.starts_with(&self.held)) {
                break;
            }
            self.held.remove(0);
            other(first);
        }
        None
    }

    /// What was held back, when no more text follows.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
