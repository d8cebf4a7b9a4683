//! The syntaxes in which models write calls and reasoning, under vLLM's names.

use std::str::FromStr;

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
        let llama = ["<|python_tag|>", "<|start_header_id|>", "<|header_start|>"];
        if has("<function=") && has("<parameter=") {
            Some(Self::Qwen3Coder)
        } else if has("<tool_call>") {
            // GLM has the tag too, but other things in it.
            (!has("<arg_key>")).then_some(Self::Hermes)
        } else if has("[TOOL_CALLS]") {
            Some(Self::Mistral)
        } else if has("[func_name1(") {
            // What the templates of Llama 3.2 and 4 tell the model to write.
            Some(Self::Pythonic)
        } else {
            (llama.into_iter().any(has) && has("\"parameters\"")).then_some(Self::Llama3Json)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_vllm() {
        assert_eq!("hermes".parse(), Ok(ToolSyntax::Hermes));
        assert_eq!("qwen3_xml".parse(), Ok(ToolSyntax::Qwen3Coder));
        assert_eq!("qwen3".parse(), Ok(ReasoningSyntax::Qwen3));
        let error = "r1".parse::<ReasoningSyntax>().unwrap_err();
        assert_eq!(error, "unknown reasoning parser `r1`: known are deepseek_r1, qwen3");
        assert!("x".parse::<ToolSyntax>().unwrap_err().contains("llama3_json, "));
    }

    #[test]
    fn templates_tell_their_syntax() {
        use ToolSyntax::{Hermes, Llama3Json, Mistral, Pythonic, Qwen3Coder};
        for (template, syntax) in [
            ("{{- '\\n<tool_call>\\n{\"name\": \"' }}…</tool_call>", Some(Hermes)),
            ("<tool_call>\n<function=example>\n<parameter=a>", Some(Qwen3Coder)),
            ("{{- '[TOOL_CALLS][' }}", Some(Mistral)),
            ("'<|start_header_id|>' … {{- '\"parameters\": ' }}", Some(Llama3Json)),
            ("<|python_tag|> … {\"name\": name, \"parameters\": dictionary}", Some(Llama3Json)),
            ("<|header_start|> … \"[func_name1(params_name1=value)]\"", Some(Pythonic)),
            ("<tool_call>{function-name}\\n<arg_key>", None),
            ("<|start_header_id|>{{ message['role'] }}", None),
            ("<|im_start|>{{ message['role'] }}", None),
        ] {
            assert_eq!(ToolSyntax::detect(template), syntax, "{template}");
        }
        let thinks = "{% set content = content.split('</think>')[-1] %}";
        assert_eq!(ReasoningSyntax::detect(thinks), Some(ReasoningSyntax::Qwen3));
        assert_eq!(ReasoningSyntax::detect("<|im_start|>"), None);
    }

    #[test]
    fn a_prompt_may_open_or_close_the_reasoning() {
        let state = |prompt| ReasoningSyntax::Qwen3.state_after(prompt);
        assert_eq!(state("<|im_start|>assistant\n<think>\n"), Some(true));
        assert_eq!(state("<|im_start|>assistant\n<think>\n\n</think>\n\n"), Some(false));
        assert_eq!(state("Say <think>!<|im_end|>\n<|im_start|>assistant\n"), None);
    }
}
