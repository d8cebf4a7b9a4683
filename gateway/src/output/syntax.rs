//! The syntaxes in which models write calls and reasoning, under vLLM's names.

use std::str::FromStr;

use rand::RngExt;

/// How a model writes tool calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolSyntax {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, repeated; text elsewhere is content.
    Hermes,
    /// The answer is `{"name": …, "parameters": {…}}`, or several with `;` between them, perhaps
    /// behind `<|python_tag|>`.
    Llama3Json,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or from version 11 of the tokenizer on
    /// `[TOOL_CALLS]name{…}` and `[TOOL_CALLS]name[ARGS]{…}`, repeated.
    Mistral,
    /// `<tool_call><function=name><parameter=p>value</parameter></function></tool_call>`; values
    /// have the types that the tool's schema says.
    Qwen3Coder,
    /// The answer is `[f(a=1, b="x"), g()]`, calls with Python literals.
    Pythonic,
    /// What `tool_choice` required constrains the answer to: `[{"name": …, "parameters": {…}}, …]`.
    JsonList,
    /// What a named `tool_choice` constrains the answer to: the arguments of this function.
    Named(String),
}

/// The names of `--tool-call-parser`.
const TOOL_SYNTAXES: &[(&str, ToolSyntax)] = &[
    ("hermes", ToolSyntax::Hermes),
    ("llama3_json", ToolSyntax::Llama3Json),
    ("llama4_json", ToolSyntax::Llama3Json),
    ("mistral", ToolSyntax::Mistral),
    ("qwen3_coder", ToolSyntax::Qwen3Coder),
    ("qwen3_xml", ToolSyntax::Qwen3Coder),
    ("pythonic", ToolSyntax::Pythonic),
    ("llama4_pythonic", ToolSyntax::Pythonic),
];

impl ToolSyntax {
    /// Guesses from a chat template how its model writes calls.
    pub fn detect(chat_template: &str) -> Option<Self> {
        let has = |text: &str| chat_template.contains(text);
        if has("<function=") && has("<parameter=") {
            Some(Self::Qwen3Coder)
        } else if has("<tool_call>") {
            Some(Self::Hermes)
        } else if has("[TOOL_CALLS]") {
            Some(Self::Mistral)
        } else if has("<|python_start|>") || has("[func_name1(") {
            Some(Self::Pythonic)
        } else if has("<|python_tag|>") || (has("<|start_header_id|>") && has("\"parameters\"")) {
            Some(Self::Llama3Json)
        } else {
            None
        }
    }

    /// A fresh id for a call: Mistral's templates take nine letters and digits alone.
    pub fn random_id(&self) -> String {
        if *self == Self::Mistral {
            let mut random = rand::rng();
            (0..9).map(|_| char::from(random.sample(rand::distr::Alphanumeric))).collect()
        } else {
            format!("chatcmpl-tool-{}", uuid::Uuid::new_v4().simple())
        }
    }
}

impl FromStr for ToolSyntax {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        find(TOOL_SYNTAXES, name, "tool call parser")
    }
}

/// How a model writes its reasoning, which comes before anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningSyntax {
    /// The answer begins inside the reasoning, which `</think>` ends; `<think>` may be there.
    DeepseekR1,
    /// `<think>` … `</think>`; without the first, and if the prompt did not end with it, there is
    /// no reasoning.
    Qwen3,
}

/// The names of `--reasoning-parser`.
const REASONING_SYNTAXES: &[(&str, ReasoningSyntax)] =
    &[("deepseek_r1", ReasoningSyntax::DeepseekR1), ("qwen3", ReasoningSyntax::Qwen3)];

impl ReasoningSyntax {
    /// Guesses from a chat template how its model writes reasoning.
    ///
    /// `<think>` in a template may be there to drop reasoning from earlier turns. So the guess is
    /// [`ReasoningSyntax::Qwen3`], which finds reasoning only where a tag opens it.
    pub fn detect(chat_template: &str) -> Option<Self> {
        let has = |text: &str| chat_template.contains(text);
        (has("<think>") || has("</think>")).then_some(Self::Qwen3)
    }

    /// What a prompt's end says: `Some(true)` if it has opened the reasoning, `Some(false)` if it
    /// has closed it, as a template does that is told not to think.
    pub fn state_after(self, prompt: &str) -> Option<bool> {
        let end = prompt.trim_end();
        if end.ends_with("<think>") {
            Some(true)
        } else {
            end.ends_with("</think>").then_some(false)
        }
    }
}

impl FromStr for ReasoningSyntax {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        find(REASONING_SYNTAXES, name, "reasoning parser")
    }
}

fn find<T: Clone>(known: &[(&str, T)], name: &str, what: &str) -> Result<T, String> {
    let found = known.iter().find(|(known, _)| *known == name);
    found.map(|(_, syntax)| syntax.clone()).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        format!("unknown {what} `{name}`: known are {}", names.join(", "))
    })
}
