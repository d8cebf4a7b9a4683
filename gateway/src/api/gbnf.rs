//! Grammars in GBNF, as llama.cpp and xgrammar write them (`root ::= "a" [0-9]+`), in the Lark
//! dialect that llguidance reads.
//!
//! Source: llama.cpp, `grammars/README.md`; llguidance, `docs/syntax.md`.

use std::collections::HashMap;
use std::fmt::Write as _;

/// A grammar in Lark: a text that has no `::=` is one already.
///
/// # Errors
/// What is wrong, and where in the text.
pub fn to_lark(text: &str) -> Result<String, String> {
    if !text.contains("::=") {
        return Ok(text.to_owned());
    }
    let tokens = tokens(text)?;
    let mut names = Names::default();
    // `root` is where a text begins; Lark calls that rule `start`.
    names.0.insert("root".to_owned(), "start".to_owned());
    let mut rules = String::new();
    let mut defined = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let (Token::Name(name), Some(Token::Define)) = (&tokens[at], tokens.get(at + 1)) else {
            return Err(format!("a rule must begin with `name ::=`, not with {}", tokens[at]));
        };
        if defined.contains(name) {
            return Err(format!("rule `{name}` is defined twice"));
        }
        defined.push(name.clone());
        rules.push_str(&names.of(name));
        rules.push(':');
        at += 2;
        while at < tokens.len() && tokens.get(at + 1) != Some(&Token::Define) {
            rules.push(' ');
            match &tokens[at] {
                Token::Name(name) => rules.push_str(&names.of(name)),
                Token::Text(text) | Token::Regex(text) => rules.push_str(text),
                // Binds to what comes before it.
                Token::Repeat(text) => {
                    rules.pop();
                    rules.push_str(text);
                }
                Token::Mark(mark) => rules.push(*mark),
                Token::Define => return Err("`::=` must follow a rule's name".to_owned()),
            }
            at += 1;
        }
        rules.push('\n');
    }
    if let Some(unknown) = names.0.keys().find(|name| !defined.contains(name)) {
        return Err(format!("rule `{unknown}` is not defined"));
    }
    Ok(rules)
}

/// The names of rules here, unique and lower-case, because Lark's upper-case ones are terminals.
#[derive(Default)]
struct Names(HashMap<String, String>);

impl Names {
    fn of(&mut self, name: &str) -> String {
        let next = self.0.len();
        self.0.entry(name.to_owned()).or_insert_with(|| format!("rule_{next}")).clone()
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Name(String),
    Define,
    /// A string, in quotes.
    Text(String),
    /// A class of characters, as a regular expression between slashes.
    Regex(String),
    /// `*`, `+`, `?` or `{m,n}`.
    Repeat(String),
    /// `|`, `(` or `)`.
    Mark(char),
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(text) | Self::Text(text) | Self::Regex(text) | Self::Repeat(text) => {
                write!(f, "`{text}`")
            }
            Self::Define => write!(f, "`::=`"),
            Self::Mark(mark) => write!(f, "`{mark}`"),
        }
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let at = text.len() - rest.len();
        let unfinished = |what: &str| format!("the {what} at byte {at} does not end");
        let length = match first {
            _ if first.is_whitespace() => first.len_utf8(),
            '#' => rest.find('\n').unwrap_or(rest.len()),
            ':' if rest.starts_with("::=") => {
                tokens.push(Token::Define);
                3
            }
            '|' | '(' | ')' => {
                tokens.push(Token::Mark(first));
                1
            }
            '*' | '+' | '?' => {
                tokens.push(Token::Repeat(first.to_string()));
                1
            }
            '{' => {
                let end = rest.find('}').ok_or_else(|| unfinished("repetition"))?;
                let bounds = &rest[1..end];
                if !bounds.chars().all(|c| c.is_ascii_digit() || c == ',' || c == ' ') {
                    return Err(format!("the repetition at byte {at} must hold numbers"));
                }
                tokens.push(Token::Repeat(rest[..=end].replace(' ', "")));
                end + 1
            }
            '.' => {
                tokens.push(Token::Regex("/(.|\\n)/".to_owned()));
                1
            }
            '"' => {
                let end = closing(rest, '"').ok_or_else(|| unfinished("string"))?;
                tokens.push(Token::Text(
                    serde_json::Value::from(unescape(&rest[1..end])?).to_string(),
                ));
                end + 1
            }
            '[' => {
                let end = closing(rest, ']').ok_or_else(|| unfinished("character class"))?;
                tokens.push(Token::Regex(class(&rest[1..end])?));
                end + 1
            }
            _ if first.is_ascii_alphabetic() || first == '_' => {
                let in_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                let end = rest.find(|c| !in_name(c)).unwrap_or(rest.len());
                tokens.push(Token::Name(rest[..end].to_owned()));
                end
            }
            _ => return Err(format!("`{first}` at byte {at} is not expected")),
        };
        rest = &rest[length..];
    }
    Ok(tokens)
}

/// Where the text that begins with an opening character ends.
fn closing(text: &str, close: char) -> Option<usize> {
    let mut escaped = false;
    text.char_indices().skip(1).find_map(|(at, c)| {
        let ends = c == close && !escaped;
        escaped = c == '\\' && !escaped;
        ends.then_some(at)
    })
}

fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let digits = match chars.next() {
            Some('n') => {
                out.push('\n');
                continue;
            }
            Some('t') => {
                out.push('\t');
                continue;
            }
            Some('r') => {
                out.push('\r');
                continue;
            }
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(other) => {
                out.push(other);
                continue;
            }
            None => return Err("a string ends with a backslash".to_owned()),
        };
        let code: String = chars.by_ref().take(digits).collect();
        let decoded = u32::from_str_radix(&code, 16).ok().and_then(char::from_u32);
        out.push(decoded.ok_or_else(|| format!("`{code}` is no character's code"))?);
    }
    Ok(out)
}

/// A class of characters as a regular expression.
fn class(text: &str) -> Result<String, String> {
    let (negated, members) = match text.strip_prefix('^') {
        Some(rest) => ("^", rest),
        None => ("", text),
    };
    // An escaped hyphen is one of the members, a bare one makes a range.
    const HYPHEN: char = '\u{f8ff}';
    let members = unescape(&members.replace("\\-", &HYPHEN.to_string()))?;
    let mut out = format!("/[{negated}");
    for c in members.chars() {
        match c {
            '-' => out.push('-'),
            HYPHEN => out.push_str("\\-"),
            _ if c.is_ascii_alphanumeric() => out.push(c),
            // Writing to a string cannot fail.
            _ => drop(write!(out, "\\u{{{:X}}}", u32::from(c))),
        }
    }
    out.push_str("]/");
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grammar_is_put_in_larks_words() {
        let gbnf = "# comment\nroot ::= item (\",\" item)* # more\nitem-x ::= [^a-z\\]/\\-]{1, 3}\n\
                    item ::= item-x | \"\\\"q\\n\"\n  | .?\n";
        let lark = to_lark(gbnf).unwrap();
        assert_eq!(
            lark,
            "start: rule_1 ( \",\" rule_1 )*\nrule_2: /[^a-z\\u{5D}\\u{2F}\\-]/{1,3}\n\
             rule_1: rule_2 | \"\\\"q\\n\" | /(.|\\n)/?\n"
        );
        assert_eq!(to_lark("start: \"a\"").unwrap(), "start: \"a\"");
    }

    #[test]
    fn what_does_not_parse_says_where() {
        for (bad, part) in [
            ("root ::= x", "`x` is not defined"),
            ("x ::= \"a\"", "`root` is not defined"),
            ("root ::= \"a", "byte 9"),
            ("\"a\" ::= \"b\"", "must begin"),
            ("root ::= $", "`$`"),
            ("root ::= \"a\" root ::= \"b\"", "twice"),
            ("root ::= \"\\xzz\"", "zz"),
        ] {
            let error = to_lark(bad).unwrap_err();
            assert!(error.contains(part), "{bad}: {error}");
        }
    }
}
