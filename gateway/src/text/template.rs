//! Chat templates: the model's own Jinja, run by minijinja in the manner of `transformers`.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Value as Json;

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// What a request says about rendering.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Open the assistant's turn at the end.
    pub add_generation_prompt: bool,
    /// Leave the last message open, to be continued.
    pub continue_final_message: bool,
    /// Functions that the model may call, in OpenAI's form.
    pub tools: Option<&'a [Json]>,
    /// Texts that the answer is to draw on.
    pub documents: Option<&'a [Json]>,
    /// More variables for the template.
    pub variables: Option<&'a serde_json::Map<String, Json>>,
}

impl ChatTemplate {
    /// Compiles a template. `transformers` trims blocks, and so do we.
    pub fn new(
        source: &str,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(10_000_000));
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned("chat", source.to_owned())?;
        Ok(Self { environment, bos_token, eos_token })
    }

    /// A template of the request's own, in this one's place.
    pub fn replaced(&self, source: &str) -> Result<Self, Error> {
        Self::new(source, self.bos_token.clone(), self.eos_token.clone())
    }

    /// Renders a conversation.
    pub fn render(&self, messages: &[Json], options: &Options<'_>) -> Result<String, Error> {
        let extra = options.variables.map_or(Value::UNDEFINED, |all| Value::from(Serde(all)));
        // Templates ask whether they are none, as transformers has it; undefined is not.
        let list =
            |items: Option<&[Json]>| items.map_or(Value::from(()), |it| Value::from(Serde(it)));
        let variables = context! {
            messages => Value::from(Serde(messages)),
            tools => list(options.tools),
            documents => list(options.documents),
            add_generation_prompt => options.add_generation_prompt,
            bos_token => self.bos_token.clone(),
            eos_token => self.eos_token.clone(),
            ..extra
        };
        let mut text = self.environment.get_template("chat")?.render(variables)?;
        if options.continue_final_message {
            // As transformers does it: cut the turn's end off behind the last message.
            let last =
                messages.last().and_then(|message| message["content"].as_str()).unwrap_or("");
            // Many templates trim messages; what is left of the blanks after it stays.
            let (core, tail) = (last.trim(), last.trim_start());
            match text.rfind(core) {
                Some(at) => {
                    let kept = if text[at..].starts_with(tail) { tail } else { core };
                    text.truncate(at + kept.len());
                }
                None => {
                    let reason =
                        "the template changes the final message, so it cannot be continued";
                    return Err(Error::new(ErrorKind::InvalidOperation, reason));
                }
            }
        }
        Ok(text)
    }
}

/// `json.dumps` with its separators: minijinja's own filter escapes for HTML and packs.
fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let failed =
        |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let json = serde_json::to_value(&value).map_err(failed)?;
    Ok(match indent {
        Some(indent) => {
            use serde::Serialize as _;
            let indent = " ".repeat(indent);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut out = Vec::new();
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
                .map_err(failed)?;
            String::from_utf8_lossy(&out).into_owned()
        }
        None => python_json(&json),
    })
}

fn python_json(value: &Json) -> String {
    match value {
        Json::Array(items) => {
            let items: Vec<String> = items.iter().map(python_json).collect();
            format!("[{}]", items.join(", "))
        }
        Json::Object(fields) => {
            let fields: Vec<String> = fields
                .iter()
                .map(|(key, value)| format!("{}: {}", Json::from(key.as_str()), python_json(value)))
                .collect();
            format!("{{{}}}", fields.join(", "))
        }
        other => other.to_string(),
    }
}

/// The date in UTC, for the few directives that templates use.
fn strftime_now(format: &str) -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let name = MONTHS[month as usize - 1];
    [
        ("%Y", year.to_string()),
        ("%m", format!("{month:02}")),
        ("%d", format!("{day:02}")),
        ("%B", name.to_owned()),
        ("%b", name[..3].to_owned()),
        ("%H", format!("{:02}", seconds / 3600 % 24)),
        ("%M", format!("{:02}", seconds / 60 % 60)),
        ("%S", format!("{:02}", seconds % 60)),
    ]
    .into_iter()
    .fold(format.to_owned(), |text, (directive, value)| text.replace(directive, &value))
}

/// Year, month and day of a day since 1970 (Hinnant, "chrono-compatible date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: Json, add_generation_prompt: bool) -> Result<String, Error> {
        let template = ChatTemplate::new(source, Some("<s>".into()), None).unwrap();
        let options = Options { add_generation_prompt, ..Options::default() };
        template.render(messages.as_array().unwrap(), &options)
    }

    #[test]
    fn the_default_models_template_renders_as_in_transformers() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
            {{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}\
            {% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
            {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/reference/chat_template.json");
        let fixture: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let cases = fixture["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 12);
        for case in cases {
            let generation = case["add_generation_prompt"].as_bool().unwrap();
            let got = render(source, case["messages"].clone(), generation).unwrap();
            assert_eq!(got, case["rendered"].as_str().unwrap());
        }
    }

    #[test]
    fn python_methods_exceptions_and_json_work() {
        let message = json!([{"role": "user", "content": " Hi <b> "}]);
        let got = render(
            "{{ bos_token }}{{ messages[0].content.strip().upper() }}",
            message.clone(),
            false,
        );
        assert_eq!(got.unwrap(), "<s>HI <B>");
        let got = render("{{ messages[0] | tojson }}", message.clone(), false);
        assert_eq!(got.unwrap(), r#"{"role": "user", "content": " Hi <b> "}"#);
        let failed =
            render("{{ raise_exception('roles must alternate') }}", message.clone(), false);
        assert!(failed.unwrap_err().to_string().contains("roles must alternate"));
        assert!(
            render(
                "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
                message,
                false
            )
            .is_err()
        );
    }

    #[test]
    fn a_final_message_can_be_left_open() {
        let source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}";
        let template = ChatTemplate::new(source, None, None).unwrap();
        let messages =
            json!([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "So far"}]);
        let options = Options { continue_final_message: true, ..Options::default() };
        assert_eq!(
            template.render(messages.as_array().unwrap(), &options).unwrap(),
            "[user]Q[end][assistant]So far"
        );
        // Blanks stay where the template leaves them, and are none where it does not.
        let messages = json!([{"role": "assistant", "content": " x =\n"}]);
        let render = |source| {
            let template = ChatTemplate::new(source, None, None).unwrap();
            template.render(messages.as_array().unwrap(), &options).unwrap()
        };
        assert_eq!(render(source), "[assistant] x =\n");
        let trimmed =
            "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}";
        assert_eq!(render(trimmed), "[assistant]x =");
    }

    #[test]
    fn days_are_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_781), (2026, 11, 24));
    }
}
