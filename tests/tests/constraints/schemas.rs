//! Random JSON schemas, every value of which is of bounded size.

use serde_json::{Map, Value, json};

/// A generator of numbers by its seed (SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len() as u64) as usize]
    }
}

const NAMES: [&str; 8] = ["id", "name", "tags", "größe", "a b", "x-y", "\"quoted\"", "z"];

/// The schema of a seed: an object or an array, with definitions that it may refer to.
pub(crate) fn schema(seed: u64) -> Value {
    let mut random = Random(seed);
    let leaf = scalar(&mut random);
    let pair = object(&mut random, 0);
    let mut schema = match random.below(4) {
        0 => array(&mut random, 2),
        _ => object(&mut random, 2),
    };
    // A list of at most three links, each by reference.
    let link = |next: Value| {
        json!({
            "type": "object",
            "properties": {"value": {"$ref": "#/$defs/leaf"}, "next": next},
            "required": ["value", "next"],
            "additionalProperties": false,
        })
    };
    // As a gateway would: a small model may never end unbounded white space.
    schema["x-guidance"] = json!({"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"});
    schema["$defs"] = json!({
        "leaf": leaf,
        "pair": pair,
        "third": link(json!({"type": "null"})),
        "second": link(json!({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/third"}]})),
        "list": link(json!({"anyOf": [{"$ref": "#/$defs/second"}, {"type": "null"}]})),
    });
    schema
}

fn any(random: &mut Random, depth: u64) -> Value {
    if depth == 0 {
        return scalar(random);
    }
    match random.below(8) {
        0 => object(random, depth - 1),
        1 => array(random, depth - 1),
        2 => json!({"anyOf": [any(random, depth - 1), scalar(random), object(random, 0)]}),
        3 => json!({"$ref": format!("#/$defs/{}", random.pick(&["leaf", "pair", "list"]))}),
        _ => scalar(random),
    }
}

fn object(random: &mut Random, depth: u64) -> Value {
    let mut properties = Map::new();
    for _ in 0..1 + random.below(4) {
        let name = random.pick(&NAMES);
        properties.insert(name.to_owned(), any(random, depth));
    }
    let names: Vec<String> = properties.keys().cloned().collect();
    let required: Vec<&String> = names.iter().filter(|_| random.below(3) > 0).collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn array(random: &mut Random, depth: u64) -> Value {
    let least = random.below(3);
    let most = least + random.below(3);
    let items = any(random, depth);
    json!({"type": "array", "items": items, "minItems": least, "maxItems": most})
}

fn scalar(random: &mut Random) -> Value {
    let low = random.below(2000) as i64 - 1000;
    let high = low + random.below(5000) as i64;
    match random.below(10) {
        0 => json!({"type": "null"}),
        1 => json!({"type": "boolean"}),
        2 => json!({"type": "integer", "minimum": low, "maximum": high}),
        3 => json!({"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2}),
        4 => json!({"type": "number", "minimum": low, "maximum": high, "multipleOf": 0.25}),
        5 => json!({"enum": ["red", "grün", 7, null, true, "a\nb", {"k": [1, 2]}]}),
        6 => json!({"const": random.pick(&NAMES)}),
        7 => {
            let patterns =
                ["^[a-z]{2,8}$", "^(\\d{3}-){2}\\d{4}$", "^[A-Z][a-z]{0,9}$", "^(ab|cd)*e$"];
            json!({"type": "string", "pattern": random.pick(&patterns), "maxLength": 30})
        }
        8 => json!({"type": "string", "format": random.pick(&["date", "ipv4", "uuid"])}),
        _ => {
            let least = random.below(5);
            json!({"type": "string", "minLength": least, "maxLength": least + random.below(20)})
        }
    }
}
