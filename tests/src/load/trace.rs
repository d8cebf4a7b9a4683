//! Published traces, as files.
//!
//! Two forms are read, told apart by their first line:
//!
//! * CSV as in Azure's public data set: `TIMESTAMP,ContextTokens,GeneratedTokens`;
//! * JSON lines as in Mooncake's: `{"timestamp": …, "input_length": …, "output_length": …, …}`.
//!
//! Load tests take only the lengths: the rate is what they vary. The simulator takes the times, and
//! what of a prompt was sent before, too.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;

use super::lengths::Lengths;

/// Tokens of a block of Mooncake's form.
const BLOCK: usize = 512;

/// A line of Mooncake's form.
#[derive(Deserialize)]
struct Line {
    input_length: usize,
    output_length: usize,
    /// In milliseconds.
    #[serde(default)]
    timestamp: f64,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// A request of a trace, and when it came.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timed {
    /// Seconds after the first.
    pub at: f64,
    /// Its lengths.
    pub lengths: Lengths,
    /// Leading tokens of the prompt that were sent before; 0 where the trace does not tell.
    pub cached: usize,
}

/// The requests of a trace.
///
/// # Errors
/// Which file, which line, and what is wrong with it.
pub fn read(path: &Path) -> Result<Vec<Lengths>, String> {
    Ok(read_timed(path)?.into_iter().map(|it| it.lengths).collect())
}

/// The requests of a trace with their times, in their order.
///
/// # Errors
/// Which file, which line, and what is wrong with it.
pub fn read_timed(path: &Path) -> Result<Vec<Timed>, String> {
    let named = |error: String| format!("{}: {error}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| named(error.to_string()))?;
    parse(&text).map_err(named)
}

fn parse(text: &str) -> Result<Vec<Timed>, String> {
    let mut lines = text.trim_start_matches('\u{feff}').lines().enumerate().peekable();
    let first = lines.peek().map_or("", |(_, line)| line.trim());
    let mut requests: Vec<Timed> = if first.starts_with('{') {
        let mut sent = HashSet::new();
        let rows = lines.filter(|(_, line)| !line.trim().is_empty());
        rows.map(|row| json(row, &mut sent)).collect::<Result<_, _>>()?
    } else {
        let names: Vec<&str> = first.split(',').map(str::trim).collect();
        let column = |name: &str| {
            let at = names.iter().position(|given| *given == name);
            at.ok_or_else(|| format!("line 1 names no column {name}, and is no JSON object"))
        };
        let columns = [column("TIMESTAMP")?, column("ContextTokens")?, column("GeneratedTokens")?];
        let rows = lines.skip(1).filter(|(_, line)| !line.trim().is_empty());
        rows.map(|row| csv(row, columns)).collect::<Result<_, _>>()?
    };
    requests.sort_by(|a, b| a.at.total_cmp(&b.at));
    let Some(first) = requests.first().map(|it| it.at) else { return Err("no request".into()) };
    requests.iter_mut().for_each(|it| it.at -= first);
    Ok(requests)
}

fn json((at, line): (usize, &str), sent: &mut HashSet<u64>) -> Result<Timed, String> {
    let line: Line =
        serde_json::from_str(line).map_err(|error| format!("line {}: {error}", at + 1))?;
    let known = line.hash_ids.iter().take_while(|id| sent.contains(*id)).count();
    sent.extend(&line.hash_ids);
    let lengths = Lengths { prompt: line.input_length, answer: line.output_length };
    // The last token is always computed.
    let cached = (known * BLOCK).min(line.input_length.saturating_sub(1));
    Ok(Timed { at: line.timestamp / 1e3, lengths, cached })
}

fn csv((at, line): (usize, &str), columns: [usize; 3]) -> Result<Timed, String> {
    let [time, prompt, answer] = columns;
    let fields: Vec<&str> = line.split(',').collect();
    let number = |column: usize| {
        let field = fields.get(column).map_or("", |field| field.trim());
        field.parse().map_err(|_| format!("line {}: {field:?} is no length", at + 1))
    };
    let field = fields.get(time).map_or("", |field| field.trim());
    let since = seconds(field).ok_or_else(|| format!("line {}: {field:?} is no time", at + 1))?;
    let lengths = Lengths { prompt: number(prompt)?, answer: number(answer)? };
    Ok(Timed { at: since, lengths, cached: 0 })
}

/// Seconds of `YYYY-MM-DD hh:mm:ss.f`, from some beginning.
fn seconds(text: &str) -> Option<f64> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let [year, month, day] = numbers(date, '-')?;
    // A zone, where there is one, is the same in all lines.
    let [hour, minute, second] = numbers(time.split(['+', 'Z']).next()?, ':')?;
    // Days of the proleptic Gregorian calendar, the year beginning in March.
    let (year, month) = if month > 2.0 { (year, month - 3.0) } else { (year - 1.0, month + 9.0) };
    let leaps = (year / 4.0).floor() - (year / 100.0).floor() + (year / 400.0).floor();
    let days = 365.0 * year + leaps + ((153.0 * month + 2.0) / 5.0).floor() + day;
    Some(days * 86_400.0 + hour * 3600.0 + minute * 60.0 + second)
}

fn numbers(text: &str, between: char) -> Option<[f64; 3]> {
    let parsed: Option<Vec<f64>> = text.split(between).map(|part| part.parse().ok()).collect();
    parsed?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        let request =
            |at, prompt, answer, cached| Timed { at, lengths: Lengths { prompt, answer }, cached };
        let csv = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2020-02-28 23:59:59.5,30,4\r\n\
                   2020-03-01 00:00:01,500,60\r\n\r\n";
        let (one, two) = (request(0.0, 30, 4, 0), request(86_401.5, 500, 60, 0));
        assert_eq!(parse(csv).unwrap(), [one, two]);
        let json = "{\"timestamp\": 500, \"input_length\": 30, \"output_length\": 4, \"hash_ids\": [1]}\n\
                    {\"timestamp\": 1000, \"input_length\": 1500, \"output_length\": 60, \"hash_ids\": [1, 2, 3]}\n\
                    {\"timestamp\": 1750, \"input_length\": 1400, \"output_length\": 6, \"hash_ids\": [1, 2, 4]}\n";
        let lines =
            [request(0.0, 30, 4, 0), request(0.5, 1500, 60, 512), request(1.25, 1400, 6, 1024)];
        assert_eq!(parse(json).unwrap(), lines);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (bad, part) in [
            ("", "line 1"),
            ("a,b\n1,2\n", "TIMESTAMP"),
            ("TIMESTAMP,b\n1,2\n", "ContextTokens"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
            (
                "TIMESTAMP,ContextTokens,GeneratedTokens\n2020-01-01 00:00:00,1,2\n\
              2020-01-01 00:00:00,1\n",
                "line 3",
            ),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2\n", "no time"),
            ("{\"input_length\": 1, \"output_length\": 1}\n{\"input_length\": 1}\n", "line 2"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(part), "{bad:?}: {error}");
        }
    }
}
