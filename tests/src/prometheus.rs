//! A strict reader of the Prometheus text format, version 0.0.4.
//!
//! Prometheus itself forgives much; a scraper of another make may not. This reader refuses
//! whatever the format's description does not allow.

use std::collections::{BTreeMap, BTreeSet};

/// The labels of a sample, sorted.
pub type Labels = BTreeMap<String, String>;

/// All samples of a scrape, by family.
#[derive(Clone, Debug, Default)]
pub struct Scrape {
    families: BTreeMap<String, Family>,
}

/// One metric family.
#[derive(Clone, Debug, Default)]
pub struct Family {
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// Its description.
    pub help: String,
    /// Its samples: full name, labels, value.
    pub samples: Vec<(String, Labels, f64)>,
}

impl Scrape {
    /// Reads a scrape, or says in which line it breaks the format.
    pub fn parse(text: &str) -> Result<Self, String> {
        if !text.ends_with('\n') {
            return Err("the last line does not end with a line feed".into());
        }
        let mut reader = Reader::default();
        for (number, line) in text.lines().enumerate() {
            reader.line(line).map_err(|e| format!("line {}: {e}: {line:?}", number + 1))?;
        }
        for (name, family) in &reader.scrape.families {
            family.check(name).map_err(|e| format!("{name}: {e}"))?;
        }
        Ok(reader.scrape)
    }

    /// The family of this name.
    pub fn family(&self, name: &str) -> Option<&Family> {
        self.families.get(name)
    }

    /// Names of all families.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.families.keys().map(String::as_str)
    }

    /// The sum over the samples of this name whose labels include `labels`; absent when none do.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let samples = self.families.values().flat_map(|family| &family.samples);
        let matching: Vec<f64> = samples
            .filter(|(sample, of, _)| {
                let has = |(key, value): &(&str, &str)| of.get(*key).is_some_and(|v| v == value);
                sample == name && labels.iter().all(has)
            })
            .map(|(_, _, value)| *value)
            .collect();
        if matching.is_empty() { None } else { Some(matching.iter().sum()) }
    }
}

impl Family {
    fn check(&self, name: &str) -> Result<(), String> {
        if self.help.is_empty() {
            return Err("no HELP".into());
        }
        let mut seen = BTreeSet::new();
        for (sample, labels, _) in &self.samples {
            if !seen.insert((sample, labels)) {
                return Err(format!("{sample} {labels:?} twice"));
            }
        }
        match self.kind.as_str() {
            "counter" => self.check_counter(name),
            "histogram" => self.check_histogram(name),
            "gauge" => Ok(()),
            other => Err(format!("type {other:?}")),
        }
    }

    fn check_counter(&self, name: &str) -> Result<(), String> {
        if !name.ends_with("_total") {
            return Err("a counter's name ends with _total".into());
        }
        let bad = self.samples.iter().find(|(_, _, value)| !(*value >= 0.0 && value.is_finite()));
        bad.map_or(Ok(()), |bad| Err(format!("a counter below zero: {bad:?}")))
    }

    fn check_histogram(&self, name: &str) -> Result<(), String> {
        let mut series: BTreeMap<Labels, Series> = BTreeMap::new();
        for (sample, labels, value) in &self.samples {
            let mut labels = labels.clone();
            let le = labels.remove("le");
            let one = series.entry(labels).or_default();
            match (sample.strip_prefix(name), le) {
                (Some("_bucket"), Some(le)) => one.buckets.push((number(&le)?, *value)),
                (Some("_sum"), None) => one.sum = Some(*value),
                (Some("_count"), None) => one.count = Some(*value),
                _ => return Err(format!("an odd sample {sample}")),
            }
        }
        for (labels, one) in series {
            one.check().map_err(|e| format!("{labels:?}: {e}"))?;
        }
        Ok(())
    }
}

/// One histogram: a family and a set of labels.
#[derive(Default)]
struct Series {
    buckets: Vec<(f64, f64)>,
    sum: Option<f64>,
    count: Option<f64>,
}

impl Series {
    fn check(&self) -> Result<(), String> {
        let (Some(sum), Some(count)) = (self.sum, self.count) else {
            return Err("no _sum or no _count".into());
        };
        if !self.buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1) {
            return Err(format!("buckets not in order or not cumulative: {:?}", self.buckets));
        }
        match self.buckets.last() {
            Some((le, last)) if *le == f64::INFINITY && *last == count => {}
            other => return Err(format!("+Inf is {other:?}, _count is {count}")),
        }
        let empty = count == 0.0;
        if empty && sum != 0.0 { Err(format!("_count 0 but _sum {sum}")) } else { Ok(()) }
    }
}

#[derive(Default)]
struct Reader {
    scrape: Scrape,
    /// The family whose lines are being read: a family's lines are one group.
    current: String,
    closed: BTreeSet<String>,
}

impl Reader {
    fn line(&mut self, line: &str) -> Result<(), String> {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').ok_or("no text")?;
            self.enter(name)?;
            let family = self.scrape.families.entry(name.to_owned()).or_default();
            return once(&mut family.help, help);
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').ok_or("no type")?;
            self.enter(name)?;
            let family = self.scrape.families.entry(name.to_owned()).or_default();
            if !family.samples.is_empty() {
                return Err("TYPE after samples".into());
            }
            return once(&mut family.kind, kind);
        }
        if line.is_empty() || line.starts_with('#') {
            return Ok(());
        }
        let (name, labels, value) = sample(line)?;
        let family = self.scrape.families.get_mut(&self.current).ok_or("a sample of no family")?;
        let suffix = name.strip_prefix(&self.current).ok_or("a sample of another family")?;
        let allowed: &[&str] = match family.kind.as_str() {
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        if !allowed.contains(&suffix) {
            return Err(format!("not a sample of the {} {}", family.kind, self.current));
        }
        family.samples.push((name, labels, value));
        Ok(())
    }

    fn enter(&mut self, name: &str) -> Result<(), String> {
        if !is_name(name) {
            return Err("an odd name".into());
        }
        if self.current != name {
            self.closed.insert(std::mem::replace(&mut self.current, name.to_owned()));
            if self.closed.contains(name) {
                return Err("a family in two groups".into());
            }
        }
        Ok(())
    }
}

fn once(slot: &mut String, value: &str) -> Result<(), String> {
    if !slot.is_empty() {
        return Err("given twice".into());
    }
    value.clone_into(slot);
    Ok(())
}

/// Reads `name{label="value",…} value`.
fn sample(line: &str) -> Result<(String, Labels, f64), String> {
    let end = line.find(['{', ' ']).ok_or("no value")?;
    let (name, mut rest) = line.split_at(end);
    if !is_name(name) {
        return Err("an odd name".into());
    }
    let mut labels = Labels::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (key, tail) = rest.split_once("=\"").ok_or("an odd label")?;
            if !is_name(key) || key.contains(':') {
                return Err(format!("an odd label name {key:?}"));
            }
            let (value, tail) = quoted(tail)?;
            if labels.insert(key.to_owned(), value).is_some() {
                return Err(format!("label {key} twice"));
            }
            rest = match tail.strip_prefix(',') {
                Some(tail) => tail,
                None if tail.starts_with('}') => tail,
                None => return Err("labels without a comma".into()),
            };
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ').ok_or("no space before the value")?;
    Ok((name.to_owned(), labels, number(value)?))
}

/// Reads a label's value up to its closing quote; also what follows.
fn quoted(text: &str) -> Result<(String, &str), String> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped @ ('"' | '\\'))) => value.push(escaped),
                _ => return Err("an odd escape".into()),
            },
            _ => value.push(char),
        }
    }
    Err("a label without its closing quote".into())
}

fn number(text: &str) -> Result<f64, String> {
    match text {
        "+Inf" => Ok(f64::INFINITY),
        "-Inf" => Ok(f64::NEG_INFINITY),
        "NaN" => Ok(f64::NAN),
        // Rust also reads `inf`, `infinity` and `nan`, which the format does not have.
        _ if text.contains(['n', 'N', 'i', 'I']) => Err(format!("an odd number {text:?}")),
        _ => text.parse().map_err(|e| format!("{e}: {text:?}")),
    }
}

/// Whether this is a metric's name, by the format's description.
fn is_name(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_' || c == ':')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
# HELP a_total Some things.
# TYPE a_total counter
a_total{k=\"x\\\"y\",l=\"\"} 1
a_total{k=\"z\"} 2.5
# HELP h Seconds.
# TYPE h histogram
h_bucket{le=\"0.5\"} 1
h_bucket{le=\"+Inf\"} 3
h_sum 4
h_count 3
";

    #[test]
    fn a_good_scrape_is_read() {
        let scrape = Scrape::parse(GOOD).unwrap();
        assert_eq!(scrape.sum("a_total", &[]), Some(3.5));
        assert_eq!(scrape.sum("a_total", &[("k", "x\"y")]), Some(1.0));
        assert_eq!(scrape.sum("h_count", &[]), Some(3.0));
        assert_eq!(scrape.sum("b", &[]), None);
        assert_eq!(scrape.names().collect::<Vec<_>>(), ["a_total", "h"]);
    }

    #[test]
    fn each_break_of_the_format_is_refused() {
        let breaks = [
            ("# TYPE a_total counter\n", ""),
            ("# HELP a_total Some things.\n", ""),
            ("a_total{k=\"z\"} 2.5", "a_total{k=\"x\\\"y\",l=\"\"} 2.5"),
            ("a_total{k=\"z\"} 2.5", "a_total{k=\"z\"} -2.5"),
            ("a_total{k=\"z\"} 2.5", "a_total{k=\"z\"} inf"),
            ("a_total{k=\"z\"} 2.5", "a_total{k=\"z} 2.5"),
            ("a_total{k=\"z\"} 2.5", "a_total{k=\"z\" j=\"z\"} 2.5"),
            ("a_total{k=\"z\"} 2.5", "b_total{k=\"z\"} 2.5"),
            ("h_bucket{le=\"+Inf\"} 3", "h_bucket{le=\"+Inf\"} 0"),
            ("h_bucket{le=\"+Inf\"} 3", "h_bucket{le=\"0.1\"} 3"),
            ("h_bucket{le=\"+Inf\"} 3\n", ""),
            ("h_count 3", "h_count 4"),
            ("h_sum 4\n", ""),
            ("h_count 3\n", "h_count 3\n# EOF"),
        ];
        for (good, bad) in breaks {
            let text = GOOD.replacen(good, bad, 1);
            assert_ne!(text, GOOD, "{good:?} is not in the example");
            Scrape::parse(&text).expect_err(&text);
        }
    }
}
