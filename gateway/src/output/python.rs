//! Python literals that come letter by letter, written again as JSON.

use super::json::Scan;

/// Turns one Python literal into JSON: numbers, strings, `True`, `False`, `None`, lists, tuples
/// and dicts. A tuple becomes a list, also if it is one value in parentheses.
#[derive(Debug, Default)]
pub(super) struct Literal {
    open: Vec<Bracket>,
    state: State,
    /// A number or word so far, or the digits of an escape.
    text: String,
    /// The first half of a character that takes two `\u` escapes.
    half: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bracket {
    List,
    Tuple,
    Dict,
}

impl Bracket {
    fn close(self) -> char {
        match self {
            Self::List => ']',
            Self::Tuple => ')',
            Self::Dict => '}',
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// A value comes.
    #[default]
    Value,
    /// A value or key, or the bracket's end; `comma`: there was a value before.
    Item {
        comma: bool,
    },
    Scalar {
        key: bool,
    },
    /// A quote was read, which may be the first of three.
    Quote {
        quote: char,
        key: bool,
    },
    /// Two quotes were read: an empty string, or the beginning of a long one.
    Quotes {
        quote: char,
        key: bool,
    },
    Text {
        quote: char,
        long: bool,
        key: bool,
        quotes: u8,
    },
    Escape {
        quote: char,
        long: bool,
        key: bool,
    },
    /// Hexadecimal digits to come.
    Digits {
        quote: char,
        long: bool,
        key: bool,
        left: u8,
    },
    Colon,
    Behind,
}

impl Literal {
    /// Adds a letter; the JSON goes to `out`.
    pub(super) fn step(&mut self, c: char, out: &mut String) -> Scan {
        let white = c.is_whitespace();
        match self.state {
            State::Value => {
                if white {
                    return Scan::More;
                }
                self.begin(c, false, out)
            }
            State::Item { comma } => {
                let Some(&bracket) = self.open.last() else { return Scan::Fault };
                if white {
                    return Scan::More;
                }
                if c == bracket.close() {
                    return self.close(out);
                }
                if comma {
                    out.push_str(", ");
                }
                self.begin(c, bracket == Bracket::Dict, out)
            }
            State::Scalar { key } => {
                if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '+' | '-') {
                    self.text.push(c);
                    return Scan::More;
                }
                let text = std::mem::take(&mut self.text);
                let Some(json) = scalar(&text) else {
                    out.push_str(&text);
                    return Scan::Fault;
                };
                match key && !json.starts_with('"') {
                    true => out.extend(["\"", &json, "\""]),
                    false => out.push_str(&json),
                }
                self.ended(key, c, out)
            }
            State::Quote { quote, key } => {
                out.push('"');
                if c == quote {
                    self.state = State::Quotes { quote, key };
                    return Scan::More;
                }
                self.state = State::Text { quote, long: false, key, quotes: 0 };
                self.step(c, out)
            }
            State::Quotes { quote, key } => {
                if c == quote {
                    self.state = State::Text { quote, long: true, key, quotes: 0 };
                    return Scan::More;
                }
                out.push('"');
                self.ended(key, c, out)
            }
            State::Text { quote, long, key, quotes } => {
                if c == quote {
                    if long && quotes < 2 {
                        self.state = State::Text { quote, long, key, quotes: quotes + 1 };
                        return Scan::More;
                    }
                    self.no_half(out);
                    out.push('"');
                    return self.last(key);
                }
                self.no_half_before(c, out);
                (0..quotes).for_each(|_| escaped(quote, out));
                self.state = if c == '\\' {
                    State::Escape { quote, long, key }
                } else {
                    escaped(c, out);
                    State::Text { quote, long, key, quotes: 0 }
                };
                Scan::More
            }
            State::Escape { quote, long, key } => {
                self.state = State::Text { quote, long, key, quotes: 0 };
                let digits = |left| State::Digits { quote, long, key, left };
                self.no_half_before(if c == 'u' { '\\' } else { c }, out);
                match c {
                    'n' => escaped('\n', out),
                    't' => escaped('\t', out),
                    'r' => escaped('\r', out),
                    'b' => escaped('\u{8}', out),
                    'f' => escaped('\u{c}', out),
                    'a' => escaped('\u{7}', out),
                    'v' => escaped('\u{b}', out),
                    '0' => escaped('\0', out),
                    '\\' | '\'' | '"' => escaped(c, out),
                    '\n' => {}
                    'x' => self.state = digits(2),
                    'u' => self.state = digits(4),
                    'U' => self.state = digits(8),
                    _ => {
                        escaped('\\', out);
                        escaped(c, out);
                    }
                }
                Scan::More
            }
            State::Digits { quote, long, key, left } => {
                if !c.is_ascii_hexdigit() {
                    out.push_str(&std::mem::take(&mut self.text));
                    return Scan::Fault;
                }
                self.text.push(c);
                self.state = State::Digits { quote, long, key, left: left - 1 };
                if left == 1 {
                    self.state = State::Text { quote, long, key, quotes: 0 };
                    let code = u32::from_str_radix(&std::mem::take(&mut self.text), 16);
                    return self.code(code.unwrap_or(u32::MAX), out);
                }
                Scan::More
            }
            State::Colon => match c {
                _ if white => Scan::More,
                ':' => {
                    out.push_str(": ");
                    self.state = State::Value;
                    Scan::More
                }
                _ => Scan::Fault,
            },
            State::Behind => match (c, self.open.last()) {
                _ if white => Scan::More,
                (',', _) => {
                    self.state = State::Item { comma: true };
                    Scan::More
                }
                (_, Some(bracket)) if c == bracket.close() => self.close(out),
                _ => Scan::Fault,
            },
        }
    }

    /// The first letter of a value or key.
    fn begin(&mut self, c: char, key: bool, out: &mut String) -> Scan {
        let bracket = match c {
            '"' | '\'' => {
                self.state = State::Quote { quote: c, key };
                return Scan::More;
            }
            _ if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+') => {
                self.text.push(c);
                self.state = State::Scalar { key };
                return Scan::More;
            }
            _ if key => return Scan::Fault,
            '[' => Bracket::List,
            '(' => Bracket::Tuple,
            '{' => Bracket::Dict,
            _ => return Scan::Fault,
        };
        self.open.push(bracket);
        out.push(if bracket == Bracket::Dict { '{' } else { '[' });
        self.state = State::Item { comma: false };
        Scan::More
    }

    fn close(&mut self, out: &mut String) -> Scan {
        let dict = self.open.pop() == Some(Bracket::Dict);
        out.push(if dict { '}' } else { ']' });
        self.last(false)
    }

    /// A value or key ends with this letter.
    fn last(&mut self, key: bool) -> Scan {
        self.state = if key { State::Colon } else { State::Behind };
        if self.open.is_empty() { Scan::Last } else { Scan::More }
    }

    /// A value or key ended before this letter.
    fn ended(&mut self, key: bool, c: char, out: &mut String) -> Scan {
        match self.last(key) {
            Scan::Last => Scan::Behind,
            _ => self.step(c, out),
        }
    }

    /// An escaped character. Python writes those beyond 16 bits with one escape, JSON's with two.
    fn code(&mut self, code: u32, out: &mut String) -> Scan {
        match (self.half.take(), code) {
            (Some(high), 0xdc00..=0xdfff) => {
                let pair = 0x10000 + ((u32::from(high) - 0xd800) << 10) + (code - 0xdc00);
                escaped(char::from_u32(pair).unwrap_or(char::REPLACEMENT_CHARACTER), out);
            }
            (before, _) => {
                if before.is_some() {
                    out.push(char::REPLACEMENT_CHARACTER);
                }
                match u16::try_from(code) {
                    Ok(high @ 0xd800..=0xdbff) => self.half = Some(high),
                    _ => escaped(char::from_u32(code).unwrap_or('\u{fffd}'), out),
                }
            }
        }
        Scan::More
    }

    /// Half a character is none, unless the other half may follow.
    fn no_half_before(&mut self, c: char, out: &mut String) {
        if c != '\\' {
            self.no_half(out);
        }
    }

    fn no_half(&mut self, out: &mut String) {
        if self.half.take().is_some() {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// A whole literal as JSON.
pub(super) fn to_json(text: &str) -> Option<String> {
    let (mut literal, mut json) = (Literal::default(), String::new());
    let text = text.trim();
    let end = text.len() - text.chars().next_back()?.len_utf8();
    for (at, c) in text.char_indices() {
        match literal.step(c, &mut json) {
            Scan::More => {}
            Scan::Last if at == end => return Some(json),
            _ => return None,
        }
    }
    // A scalar ends with the text.
    (literal.step(' ', &mut json) == Scan::Behind).then_some(json)
}

/// A character within a JSON string.
pub(super) fn escaped(c: char, out: &mut String) {
    match c {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        c if c < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
        c => out.push(c),
    }
}

/// A number or name as JSON.
fn scalar(text: &str) -> Option<String> {
    match text {
        "True" | "true" => return Some("true".into()),
        "False" | "false" => return Some("false".into()),
        "None" | "null" => return Some("null".into()),
        _ => {}
    }
    let plain = text.replace('_', "");
    let radix = |digits: &str, radix| i64::from_str_radix(digits, radix).ok();
    let integer = match plain.get(..2) {
        Some("0x" | "0X") => radix(&plain[2..], 16),
        Some("0o" | "0O") => radix(&plain[2..], 8),
        Some("0b" | "0B") => radix(&plain[2..], 2),
        _ => None,
    };
    if !plain.contains(|c: char| c.is_ascii_digit()) {
        // Not a number: `inf`, `nan` and other names have no JSON.
        return None;
    }
    // As it is where JSON has it so, which keeps digits that a float has not.
    if serde_json::from_str::<serde_json::Number>(&plain).is_ok() {
        return Some(plain);
    }
    if let Some(integer) = integer.or_else(|| radix(&plain, 10)) {
        return Some(integer.to_string());
    }
    let float: f64 = plain.parse().ok()?;
    serde_json::Number::from_f64(float).map(|number| number.to_string())
}
