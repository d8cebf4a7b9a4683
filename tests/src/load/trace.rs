//! Published traces, as files.
//!
//! Two forms are read, told apart by their first line:
//!
//! * CSV as in Azure's public data set: `TIMESTAMP,ContextTokens,GeneratedTokens`;
//! * JSON lines as in Mooncake's: `{"timestamp": …, "input_length": …, "output_length": …, …}`.
//!
//! Only the lengths are taken: the rate is what a load test varies.

use std::path::Path;

use serde::Deserialize;

use super::lengths::Lengths;

/// A line of Mooncake's form; its other fields are not needed.
#[derive(Deserialize)]
struct Line {
    input_length: usize,
    output_length: usize,
}

/// The requests of a trace.
///
/// # Errors
/// Which file, which line, and what is wrong with it.
pub fn read(path: &Path) -> Result<Vec<Lengths>, String> {
    let named = |error: String| format!("{}: {error}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| named(error.to_string()))?;
    parse(&text).map_err(named)
}

fn parse(text: &str) -> Result<Vec<Lengths>, String> {
    let mut lines = text.trim_start_matches('\u{feff}').lines().enumerate().peekable();
    let first = lines.peek().map_or("", |(_, line)| line.trim());
    let requests: Vec<Lengths> = if first.starts_with('{') {
        lines.filter(|(_, line)| !line.trim().is_empty()).map(json).collect::<Result<_, _>>()?
    } else {
        let names: Vec<&str> = first.split(',').map(str::trim).collect();
        let column = |name: &str| {
            let at = names.iter().position(|given| *given == name);
            at.ok_or_else(|| format!("line 1 names no column {name}, and is no JSON object"))
        };
        let (prompt, answer) = (column("ContextTokens")?, column("GeneratedTokens")?);
        let rows = lines.skip(1).filter(|(_, line)| !line.trim().is_empty());
        rows.map(|row| csv(row, prompt, answer)).collect::<Result<_, _>>()?
    };
    if requests.is_empty() { Err("no request".into()) } else { Ok(requests) }
}

fn json((at, line): (usize, &str)) -> Result<Lengths, String> {
    let line: Line =
        serde_json::from_str(line).map_err(|error| format!("line {}: {error}", at + 1))?;
    Ok(Lengths { prompt: line.input_length, answer: line.output_length })
}

fn csv((at, line): (usize, &str), prompt: usize, answer: usize) -> Result<Lengths, String> {
    let fields: Vec<&str> = line.split(',').collect();
    let number = |column: usize| {
        let field = fields.get(column).map_or("", |field| field.trim());
        field.parse().map_err(|_| format!("line {}: {field:?} is no length", at + 1))
    };
    Ok(Lengths { prompt: number(prompt)?, answer: number(answer)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        let expected = vec![Lengths { prompt: 30, answer: 4 }, Lengths { prompt: 500, answer: 60 }];
        let csv = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2020-01-01 00:00:00.1,30,4\r\n\
                   2020-01-01 00:00:00.2,500,60\r\n\r\n";
        assert_eq!(parse(csv).unwrap(), expected);
        let json = "{\"timestamp\": 0, \"input_length\": 30, \"output_length\": 4, \"hash_ids\": [1]}\n\
                    {\"timestamp\": 5, \"input_length\": 500, \"output_length\": 60}\n";
        assert_eq!(parse(json).unwrap(), expected);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (bad, part) in [
            ("", "line 1"),
            ("a,b\n1,2\n", "ContextTokens"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2\nx,1\n", "line 3"),
            ("{\"input_length\": 1, \"output_length\": 1}\n{\"input_length\": 1}\n", "line 2"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(part), "{bad:?}: {error}");
        }
    }
}
