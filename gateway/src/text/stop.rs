//! Stop strings in streamed text.

/// Watches text for stop strings and holds back what may be the beginning of one.
#[derive(Clone, Debug, Default)]
pub struct StopWatch {
    stops: Vec<String>,
    /// Whether the stop string itself is part of the output.
    include: bool,
    held: String,
    /// Bytes at the beginning of `held` that may begin a stop string, but not end one.
    exempt: usize,
}

/// What a piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// This much more is certain.
    Text(String),
    /// The last text, and the stop string that ended it.
    Stopped(String, String),
}

impl StopWatch {
    /// Watches for `stops`, none of which is empty.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, held: String::new(), exempt: 0 }
    }

    /// Adds text in which no stop string ends, though one may begin.
    pub fn pass(&mut self, text: &str) -> String {
        self.held.push_str(text);
        self.exempt = self.held.len();
        self.settle()
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Watched {
        if self.stops.is_empty() {
            return Watched::Text(text.to_owned());
        }
        self.held.push_str(text);
        // The earliest end decides, as it would if the text came letter by letter.
        let found = self
            .stops
            .iter()
            .filter_map(|stop| {
                let first = (self.exempt + 1).saturating_sub(stop.len());
                let first = self.held.ceil_char_boundary(first);
                let at = first + self.held[first..].find(stop.as_str())?;
                Some((at + stop.len(), at, stop))
            })
            .min_by_key(|&(end, at, _)| (end, at));
        if let Some((end, at, stop)) = found {
            let stop = stop.clone();
            self.held.truncate(if self.include { end } else { at });
            return Watched::Stopped(std::mem::take(&mut self.held), stop);
        }
        Watched::Text(self.settle())
    }

    /// Takes out what no stop string can begin in.
    fn settle(&mut self) -> String {
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        let settled = std::mem::replace(&mut self.held, rest);
        self.exempt = self.exempt.saturating_sub(settled.len());
        settled
    }

    /// What was held back, when no more text follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that are a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(at, _)| at).rev().find(|&at| text.ends_with(&stop[..at])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(pieces: &[&str], stops: &[&str], include: bool) -> (String, Option<String>) {
        let mut watch = StopWatch::new(stops.iter().map(|&s| s.to_owned()).collect(), include);
        let mut out = String::new();
        for piece in pieces {
            match watch.push(piece) {
                Watched::Text(text) => out.push_str(&text),
                Watched::Stopped(text, stop) => return (out + &text, Some(stop)),
            }
        }
        (out + &watch.finish(), None)
    }

    proptest! {
        #[test]
        fn any_split_gives_what_letter_by_letter_gives(
            text in "[abü]{0,24}",
            stops in prop::collection::vec("[abü]{1,4}", 0..3),
            cuts in prop::collection::vec(0usize..24, 0..6),
            include: bool,
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(letters.len())).collect();
            cuts.extend([0, letters.len()]);
            cuts.sort_unstable();
            let pieces: Vec<String> = cuts.windows(2).map(|w| letters[w[0]..w[1]].concat()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&pieces, &stops, include), run(&letters, &stops, include));
            if stops.is_empty() {
                prop_assert_eq!(run(&pieces, &stops, include), (text.clone(), None));
            }
        }
    }

    #[test]
    fn text_that_cannot_become_a_stop_is_not_held() {
        let mut watch = StopWatch::new(vec!["END".into()], false);
        assert_eq!(watch.push("a E"), Watched::Text("a ".into()));
        assert_eq!(watch.push("N"), Watched::Text(String::new()));
        assert_eq!(watch.push("x"), Watched::Text("ENx".into()));
        assert_eq!(watch.push("END more"), Watched::Stopped(String::new(), "END".into()));
    }

    #[test]
    fn a_stop_may_begin_where_none_may_end() {
        let mut watch = StopWatch::new(vec!["ab".into(), "é!".into()], false);
        assert_eq!(watch.pass("ab xa"), "ab x");
        assert_eq!(watch.pass("é"), "a");
        assert_eq!(watch.push("! more"), Watched::Stopped(String::new(), "é!".into()));
        let mut watch = StopWatch::new(vec!["aa".into()], false);
        assert_eq!(watch.pass("aaa"), "aa");
        assert_eq!(watch.push("ab"), Watched::Stopped(String::new(), "aa".into()));
    }
}
