//! Results against their targets, as JSON and Markdown.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use crate::load::stats::median;

/// What a value must be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

impl Target {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

/// One measured value.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Names the program's part that measured it.
    pub part: &'static str,
    /// What was measured.
    pub what: String,
    /// Its unit.
    pub unit: &'static str,
    /// The median, or what the part says.
    pub value: f64,
    /// What it must be.
    pub target: Target,
    /// Whether it is.
    pub met: bool,
    /// What stands behind the value, in words.
    pub note: String,
    /// All rounds, by name.
    pub samples: Value,
}

impl Row {
    /// A row.
    pub fn new(
        part: &'static str,
        what: impl Into<String>,
        (value, unit): (f64, &'static str),
        target: Target,
    ) -> Self {
        let (note, samples) = (String::new(), json!({}));
        let met = target.met(value);
        Self { part, what: what.into(), unit, value, target, met, note, samples }
    }

    /// What stands behind the value.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    /// All rounds of one quantity.
    pub fn samples(mut self, name: &str, samples: &[f64]) -> Self {
        self.samples[name] = json!(samples);
        self
    }
}

/// The median of `part / whole`, pair by pair: neighbours in time share the machine's mood.
pub fn median_ratio(part: &[f64], whole: &[f64]) -> f64 {
    let ratios: Vec<f64> = part.iter().zip(whole).map(|(part, whole)| part / whole).collect();
    median(&ratios)
}

/// The machine and the build, for the record.
pub fn machine() -> Value {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("?", |line| line.trim_start_matches([' ', '\t', ':']));
    // Counted here: the benchmark may be confined to some of them.
    let cores = info.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({"cpu": model, "cores": cores, "kernel": kernel.trim()})
}

/// Writes `value` to `NAME.json` and `text` to `NAME.md` in `dir`.
pub fn write(dir: &Path, name: &str, value: &Value, text: &str) {
    fs::create_dir_all(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let json = serde_json::to_string_pretty(value).expect("JSON") + "\n";
    for (ending, content) in [("json", json.as_str()), ("md", text)] {
        let path = dir.join(format!("{name}.{ending}"));
        fs::write(&path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let mut text =
        "| measure | value | target | met | behind it |\n| --- | --- | --- | --- | --- |\n"
            .to_owned();
    for row in rows {
        let (sign, limit) = match row.target {
            Target::AtMost(limit) => ('≤', limit),
            Target::AtLeast(limit) => ('≥', limit),
        };
        let (value, limit) = (number(row.value), number(limit));
        let met = if row.met { "yes" } else { "**no**" };
        let Row { what, unit, note, .. } = row;
        // Writing to a string does not fail.
        let _ =
            writeln!(text, "| {what} | {value} {unit} | {sign} {limit} {unit} | {met} | {note} |");
    }
    text
}

/// Three significant digits, without an exponent.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        x if x >= 100.0 => 0,
        x if x >= 10.0 => 1,
        x if x >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_whether_its_target_is_met() {
        let row = |value, target| Row::new("part", "what", (value, "ms"), target).met;
        assert!(row(1.0, Target::AtMost(1.0)) && !row(1.1, Target::AtMost(1.0)));
        assert!(row(1.0, Target::AtLeast(1.0)) && !row(0.9, Target::AtLeast(1.0)));
        let table = table(&[Row::new("part", "what", (0.25, "ms"), Target::AtMost(0.3))]);
        assert!(table.ends_with("| what | 0.25 ms | ≤ 0.3 ms | yes |  |\n"), "{table}");
    }

    #[test]
    fn ratios_are_of_neighbours() {
        assert_eq!(median_ratio(&[1.0, 20.0, 3.0], &[10.0, 100.0, 10.0]), 0.2);
    }

    #[test]
    fn numbers_are_short() {
        let cases = [(15_000.4, "15000"), (12.34, "12.3"), (0.1234, "0.123"), (8.0, "8")];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }
}
