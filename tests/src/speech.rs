//! Recordings of known text: spoken by espeak-ng, converted by ffmpeg.

use std::path::Path;
use std::process::Command;

/// Sentences without numbers, which have two spellings: about half a minute of speech.
pub const SENTENCES: [&str; 11] = [
    "Good morning everyone, and welcome to the meeting.",
    "Today we will talk about the weather in London.",
    "The train to Paris leaves early in the evening.",
    "Please remember to bring your passport and your ticket.",
    "My brother works at a hospital in the city.",
    "We had coffee and bread for breakfast.",
    "The children are playing football in the park.",
    "She wrote a long letter to her grandmother.",
    "The museum is closed on Monday.",
    "I would like to buy a new computer.",
    "Thank you very much for listening.",
];

/// `text` spoken in a language, such as `en-us`; a WAV file.
pub fn say(text: &str, voice: &str) -> Vec<u8> {
    run(Command::new("espeak-ng").args(["-v", voice, "-s", "140", "--stdout", text]))
}

/// A recording in another form: what ffmpeg is told, and the end of the file's name.
pub fn convert(recording: &[u8], told: &str, end: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder");
    let (from, to) = (folder.path().join("from"), folder.path().join(format!("to.{end}")));
    std::fs::write(&from, recording).expect("write the recording");
    ffmpeg(&["-i", &shown(&from)], told, &to)
}

/// A sound that ffmpeg makes, such as `anullsrc=r=16000:d=30`, as a file that ends with `end`.
pub fn made(source: &str, told: &str, end: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder");
    ffmpeg(&["-f", "lavfi", "-i", source], told, &folder.path().join(format!("to.{end}")))
}

fn ffmpeg(from: &[&str], told: &str, to: &Path) -> Vec<u8> {
    let mut command = Command::new("ffmpeg");
    command.args(["-v", "error", "-nostdin"]).args(from).args(told.split_whitespace());
    run(command.arg(to));
    std::fs::read(to).expect("read what was made")
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    output.stdout
}

/// The share of words that would have to be changed, of those of `expected`.
pub fn word_error_rate(expected: &str, heard: &str) -> f64 {
    let (expected, heard) = (words(expected), words(heard));
    let mut row: Vec<usize> = (0..=heard.len()).collect();
    for (i, word) in expected.iter().enumerate() {
        let mut before = std::mem::replace(&mut row[0], i + 1);
        for (j, other) in heard.iter().enumerate() {
            let change = before + usize::from(word != other);
            before = row[j + 1];
            row[j + 1] = change.min(before + 1).min(row[j] + 1);
        }
    }
    row[heard.len()] as f64 / expected.len().max(1) as f64
}

fn words(text: &str) -> Vec<String> {
    let plain = |c: char| if c.is_alphanumeric() { c } else { ' ' };
    let text: String = text.to_lowercase().replace('\'', "").chars().map(plain).collect();
    text.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_wrong_are_counted() {
        assert_eq!(word_error_rate("It's a well.", "its A  well"), 0.0);
        assert_eq!(word_error_rate("one two three four", "one three for"), 0.5);
        assert_eq!(word_error_rate("one", ""), 1.0);
        assert_eq!(word_error_rate("one two", "one extra two"), 0.5);
    }
}
