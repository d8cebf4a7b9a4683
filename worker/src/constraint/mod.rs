//! Constrained decoding: which tokens may come next, so that the output is in a language.
//!
//! llguidance does the parsing (Moskal et al., an Earley parser over a lexer of regular
//! derivatives): it compiles a [`v1::Constraint`] and answers with a set of tokens.
//!
//! * [`Compiler`]: compiles constraints, off the engine's thread, bounded in size and time, and
//!   keeps those used last.
//! * [`Compiled`]: a constraint, ready to start sequences.
//! * [`Session`]: one sequence's way through it.

mod session;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use baton_proto::TokenizerBundle;
use baton_proto::v1;
use baton_proto::v1::constraint::Kind;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::{Parser, SlicedBiasComputer};
use llguidance::{Matcher, ParserFactory};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::Semaphore;
use toktrie::InferenceCapabilities;

use session::Helpers;
pub use session::{Session, State};

/// The longest text of a constraint.
const MAX_BYTES: usize = 256 * 1024;
/// The deepest nesting of brackets in it: compilers descend into them.
const MAX_DEPTH: usize = 200;
/// Stack of a thread that compiles; touched only as far as it is used.
const STACK_BYTES: usize = 64 * 1024 * 1024;
/// Constraints compiled at once.
const MAX_COMPILING: usize = 2;
/// How long a request may wait for its turn to compile, and how long that may take. Together they
/// are below what a gateway waits for a worker to accept a request.
const TURN_WITHIN: Duration = Duration::from_secs(1);
const COMPILE_WITHIN: Duration = Duration::from_secs(3);
/// The longest reason why one does not compile, in bytes.
const MAX_REASON: usize = 600;
/// Compiled constraints that are kept.
const MAX_KEPT: usize = 32;
/// States of a constraint's lexer, of one or two kilobytes each.
const MAX_LEXER_STATES: usize = 50_000;

/// Why a constraint cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// No kind of constraint is given.
    #[error("constraint: it is empty; give a JSON schema, a regular expression or a grammar")]
    Empty,
    /// The text is too long.
    #[error("constraint: its text has {0} bytes; send at most {MAX_BYTES}")]
    TooLong(usize),
    /// Brackets are nested too deeply.
    #[error("constraint: its brackets are nested {0} deep; nest at most {MAX_DEPTH}")]
    TooDeep(usize),
    /// It does not compile.
    #[error("constraint: {0}")]
    Invalid(String),
    /// It does not compile in time.
    #[error("constraint: it takes more than {} s to compile; send a simpler one", COMPILE_WITHIN.as_secs())]
    TooSlow,
    /// Others are being compiled, or the first is.
    #[error("constraint: too many are being compiled; try again soon")]
    Busy,
}

/// Compiles constraints for one tokenizer.
pub struct Compiler {
    shared: Arc<Shared>,
}

struct Shared {
    tokenizer_json: String,
    vocab: usize,
    eos: Vec<u32>,
    /// Made at the first use: most workers never see a constraint.
    tools: OnceLock<Result<Tools, String>>,
    turns: Arc<Semaphore>,
    /// The one used last is first.
    kept: Mutex<Vec<(Kind, Arc<Compiled>)>>,
}

struct Tools {
    factory: ParserFactory,
    helpers: Arc<Helpers>,
}

/// A constraint, ready to start sequences.
pub struct Compiled {
    /// Sequences begin with copies of it, which share its lexer's states.
    fresh: Mutex<Matcher>,
    /// A look at these states, and with how many of them it is retired.
    lexer: Mutex<Parser>,
    half: usize,
    /// As it was compiled, and used by nobody: the copies of this one share nothing.
    untouched: Mutex<Matcher>,
    helpers: Arc<Helpers>,
    /// The shared lexer is half full, or failed: the next request compiles anew.
    retired: AtomicBool,
}

impl Compiler {
    /// For a model of `vocab` logits that ends sequences with `eos`.
    pub fn new(tokenizer: &TokenizerBundle, vocab: usize, eos: &[u32]) -> Self {
        let shared = Shared {
            tokenizer_json: tokenizer.tokenizer_json.clone(),
            vocab,
            eos: eos.to_vec(),
            tools: OnceLock::new(),
            turns: Arc::new(Semaphore::new(MAX_COMPILING)),
            kept: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Compiles a constraint, or finds it compiled.
    pub async fn compile(
        &self,
        constraint: &v1::Constraint,
    ) -> Result<Arc<Compiled>, ConstraintError> {
        let kind = constraint.kind.clone().ok_or(ConstraintError::Empty)?;
        check_text(&kind)?;
        if let Some(found) = self.shared.find(&kind) {
            return Ok(found);
        }
        let turn = tokio::time::timeout(TURN_WITHIN, self.shared.turns.clone().acquire_owned());
        let Ok(Ok(turn)) = turn.await else { return Err(ConstraintError::Busy) };
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let shared = self.shared.clone();
        // Compiling cannot be stopped. One that takes too long keeps its turn until it ends.
        let compile = move || {
            // Somebody else may have compiled it meanwhile.
            let compiled = match shared.find(&kind) {
                Some(found) => Ok(found),
                None => shared.compile(kind),
            };
            drop(turn);
            let _ = sender.send(compiled);
        };
        std::thread::Builder::new()
            .name("compile".into())
            .stack_size(STACK_BYTES)
            .spawn(compile)
            .map_err(|_| ConstraintError::Busy)?;
        match tokio::time::timeout(COMPILE_WITHIN, receiver).await {
            Ok(Ok(compiled)) => compiled,
            Ok(Err(_)) => Err(ConstraintError::Invalid("its compilation failed".to_owned())),
            // The first one may have to wait for the vocabulary: large ones take a second or two.
            Err(_) if self.shared.tools.get().is_none() => Err(ConstraintError::Busy),
            Err(_) => Err(ConstraintError::TooSlow),
        }
    }
}

impl Shared {
    fn find(&self, kind: &Kind) -> Option<Arc<Compiled>> {
        let mut kept = self.kept.lock();
        kept.retain(|(_, compiled)| !compiled.retired.load(Ordering::Relaxed));
        let at = kept.iter().position(|(other, _)| other == kind)?;
        kept[..=at].rotate_right(1);
        Some(kept[0].1.clone())
    }

    fn compile(&self, kind: Kind) -> Result<Arc<Compiled>, ConstraintError> {
        let tools = self.tools.get_or_init(|| Tools::new(self)).as_ref();
        let tools = tools.map_err(|error| ConstraintError::Invalid(error.clone()))?;
        let grammar = grammar(&kind).map_err(ConstraintError::Invalid)?;
        let parser = tools
            .factory
            .create_parser(grammar)
            .map_err(|error| ConstraintError::Invalid(brief(&error)))?;
        let lexer = parser.parser.clone();
        let mut matcher = Matcher::new(Ok(parser));
        let untouched = matcher.deep_clone();
        // The first mask tells whether anything can match, and fills the lexer for all sequences.
        matcher.compute_mask_or_eos().map_err(|error| ConstraintError::Invalid(brief(&error)))?;
        let half = usize::midpoint(lexer.lexer_stats().num_states, MAX_LEXER_STATES);
        let compiled = Arc::new(Compiled {
            fresh: Mutex::new(matcher),
            lexer: Mutex::new(lexer),
            half,
            untouched: Mutex::new(untouched),
            helpers: tools.helpers.clone(),
            retired: AtomicBool::new(false),
        });
        let mut kept = self.kept.lock();
        kept.insert(0, (kind, compiled.clone()));
        kept.truncate(MAX_KEPT);
        Ok(compiled)
    }
}

impl Tools {
    fn new(shared: &Shared) -> Result<Self, String> {
        let env = vocabulary::read(&shared.tokenizer_json, shared.vocab, &shared.eos)
            .map_err(|error| format!("this model's tokenizer is not supported: {error}"))?;
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| brief(&error))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: MAX_LEXER_STATES,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        // Half the cores, as the engine needs the others at the same time.
        let threads = std::thread::available_parallelism().map_or(1, usize::from) / 2;
        let helpers = Helpers::start(threads.clamp(1, 4)).map_err(|error| error.to_string())?;
        Ok(Self { factory, helpers: Arc::new(helpers) })
    }
}

impl Compiled {
    /// Starts a sequence that goes on after `output`.
    pub fn session(self: &Arc<Self>, output: &[u32]) -> Session {
        Session::start(self.clone(), self.helpers.queue(), output)
    }

    /// At the beginning, over the lexer that sequences share.
    fn matcher(&self) -> Matcher {
        let copy = self.fresh.lock().clone();
        copy.into_cancellable()
    }

    /// At the beginning, over a lexer of its own.
    fn own_matcher(&self) -> Matcher {
        let copy = self.untouched.lock().deep_clone();
        copy.into_cancellable()
    }

    fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// Leaves the other half of the shared lexer to those that are on it.
    fn retire_in_time(&self) {
        let retired = self.retired.load(Ordering::Relaxed);
        if !retired && self.lexer.lock().lexer_stats().num_states > self.half {
            self.retire();
        }
    }
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

fn check_text(kind: &Kind) -> Result<(), ConstraintError> {
    let (Kind::JsonSchema(text) | Kind::Regex(text) | Kind::Lark(text)) = kind;
    if text.trim().is_empty() && !matches!(kind, Kind::Regex(_)) {
        return Err(ConstraintError::Empty);
    }
    if text.len() > MAX_BYTES {
        return Err(ConstraintError::TooLong(text.len()));
    }
    let mut depth = 0usize;
    let mut deepest = 0;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    match deepest > MAX_DEPTH {
        true => Err(ConstraintError::TooDeep(deepest)),
        false => Ok(()),
    }
}

fn grammar(kind: &Kind) -> Result<TopLevelGrammar, String> {
    match kind {
        Kind::Regex(regex) => Ok(TopLevelGrammar::from_regex(regex)),
        Kind::Lark(grammar) => Ok(TopLevelGrammar::from_lark(grammar.clone())),
        Kind::JsonSchema(schema) => {
            let schema: Value = serde_json::from_str(schema)
                .map_err(|error| format!("the JSON schema is not JSON: {error}"))?;
            Ok(TopLevelGrammar::from_json_schema(schema))
        }
    }
}

/// An error of llguidance without the state that it appends.
fn brief(error: &dyn std::fmt::Display) -> String {
    let mut text = format!("{error:#}");
    let appended = ["\n<non-verbose/>", "\n<state>", "\n<backtrace>"];
    let end = appended.iter().filter_map(|it| text.find(it));
    // It may quote the whole text.
    text.truncate(text.floor_char_boundary(end.min().unwrap_or(text.len()).min(MAX_REASON)));
    text.trim().to_owned()
}
