//! What comes after the hidden states: pooling, and the matrices and norms behind it.

use std::sync::Arc;

use baton_proto::v1::Task;

use super::{Output, Pooling, Wanted};
use crate::kernels::activations::{Activations, Precision};
use crate::kernels::affine::{Affine, LayerNorm};
use crate::kernels::cpu::Isa;
use crate::kernels::elementwise::gelu;
use crate::kernels::linear::multiply;
use crate::kernels::pool::ThreadPool;

/// Applied to each element, or to a row as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Identity,
    Tanh,
    Sigmoid,
    Relu,
    Gelu,
    Softmax,
}

impl Function {
    /// By the name of PyTorch's module, with or without its path, or of `transformers`.
    pub(super) fn by_name(name: &str) -> Option<Self> {
        Some(match name.rsplit('.').next().unwrap_or_default() {
            "Identity" | "linear" => Self::Identity,
            "Tanh" | "tanh" => Self::Tanh,
            "Sigmoid" | "sigmoid" => Self::Sigmoid,
            "ReLU" | "relu" => Self::Relu,
            "GELU" | "gelu" => Self::Gelu,
            "Softmax" | "softmax" => Self::Softmax,
            _ => return None,
        })
    }

    fn apply(self, row: &mut [f32]) {
        match self {
            Self::Identity => {}
            Self::Tanh => row.iter_mut().for_each(|x| *x = x.tanh()),
            Self::Sigmoid => row.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
            Self::Relu => row.iter_mut().for_each(|x| *x = x.max(0.0)),
            Self::Gelu => gelu(Isa::best(), row),
            Self::Softmax => {
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                row.iter_mut().for_each(|x| *x = (*x - largest).exp());
                let sum: f32 = row.iter().sum();
                row.iter_mut().for_each(|x| *x /= sum);
            }
        }
    }
}

/// A step on rows.
pub(super) enum Step {
    Dense(Affine, Function),
    Norm(LayerNorm),
    Normalize,
}

/// What a model gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Embedding,
    /// What makes probabilities of classes and of scores.
    Classes {
        classify: Function,
        score: Function,
    },
    TokenClasses(Function),
}

/// From hidden states to what a task asks for.
pub struct Head {
    pub(super) hidden: usize,
    /// Put together in this order.
    pub(super) pooling: Vec<Pooling>,
    pub(super) steps: Vec<Arc<Step>>,
    pub(super) kind: Kind,
    /// Of a text's row.
    pub(super) width: usize,
    scratch: Activations,
}

impl Head {
    pub(super) fn new(hidden: usize, pooling: Vec<Pooling>, kind: Kind) -> Self {
        let width = hidden * pooling.len().max(1);
        let scratch = Activations::new(Precision::Float);
        Self { hidden, pooling, steps: Vec::new(), kind, width, scratch }
    }

    /// The same steps, with buffers of its own.
    pub(super) fn share(&self) -> Self {
        let scratch = Activations::new(Precision::Float);
        let (pooling, steps, kind) = (self.pooling.clone(), self.steps.clone(), self.kind.clone());
        Self { hidden: self.hidden, pooling, steps, kind, width: self.width, scratch }
    }

    /// Adds a step. What does not fit is an error.
    pub(super) fn push(&mut self, step: Step) -> Result<(), String> {
        if let Step::Dense(projection, _) = &step {
            let (inputs, outputs) = (projection.weight.inputs(), projection.weight.outputs());
            if inputs != self.width {
                return Err(format!("a Dense module takes {inputs} of {} dimensions", self.width));
            }
            self.width = outputs;
        }
        self.steps.push(Arc::new(step));
        Ok(())
    }

    /// What the model can be asked for.
    pub fn tasks(&self) -> Vec<Task> {
        match self.kind {
            Kind::Embedding => vec![Task::Embed, Task::TokenEmbed],
            Kind::Classes { .. } if self.width == 1 => vec![Task::Classify, Task::Score],
            Kind::Classes { .. } => vec![Task::Classify],
            Kind::TokenClasses(_) => vec![Task::TokenClassify],
        }
    }

    /// Elements of a row of a task's output.
    pub fn width(&self, task: Task) -> usize {
        match task {
            Task::TokenEmbed if !self.steps_fit_tokens() => self.hidden,
            _ => self.width,
        }
    }

    /// Steps after several poolings have no meaning for a token alone.
    fn steps_fit_tokens(&self) -> bool {
        self.pooling.len() <= 1
    }

    /// Of each text, its hidden states and what is wanted.
    pub(super) fn apply(
        &mut self,
        threads: &mut ThreadPool,
        texts: &[(&[f32], Wanted)],
    ) -> Vec<Output> {
        let by_token =
            |wanted: &Wanted| matches!(wanted.task, Task::TokenEmbed | Task::TokenClassify);
        let mut outputs: Vec<Output> = vec![Output::default(); texts.len()];
        for tokens in [false, true] {
            let chosen: Vec<usize> =
                (0..texts.len()).filter(|&i| by_token(&texts[i].1) == tokens).collect();
            if chosen.is_empty() {
                continue;
            }
            let mut rows = Vec::new();
            for &i in &chosen {
                let states = texts[i].0;
                if tokens {
                    rows.extend_from_slice(states);
                    continue;
                }
                for pooling in &self.pooling {
                    let start = rows.len();
                    rows.resize(start + self.hidden, 0.0);
                    pooling.apply(states, &mut rows[start..]);
                }
            }
            let width = match tokens {
                true => self.hidden,
                false => self.hidden * self.pooling.len(),
            };
            let (rows, width) = match tokens && !self.steps_fit_tokens() {
                true => (rows, width),
                false => self.run_steps(threads, rows, width),
            };
            let mut rest = &rows[..];
            for i in chosen {
                let (states, wanted) = texts[i];
                let count = if tokens { states.len() / self.hidden } else { 1 };
                let (own, after) = rest.split_at(count * width);
                rest = after;
                outputs[i] = self.finish(own, width, wanted);
            }
        }
        outputs
    }

    fn run_steps(
        &mut self,
        threads: &mut ThreadPool,
        mut rows: Vec<f32>,
        mut width: usize,
    ) -> (Vec<f32>, usize) {
        let isa = Isa::best();
        let count = rows.len() / width;
        for step in &self.steps {
            match &**step {
                Step::Dense(projection, function) => {
                    self.scratch.fill(isa, threads, count, width, |row, out| {
                        out.copy_from_slice(&rows[row * width..][..width]);
                    });
                    width = projection.weight.outputs();
                    let mut product = vec![0.0; count * width];
                    multiply(isa, threads, self.scratch.view(), [projection.set(&mut product)]);
                    product.chunks_exact_mut(width).for_each(|row| function.apply(row));
                    rows = product;
                }
                Step::Norm(norm) => {
                    rows.chunks_exact_mut(width).for_each(|row| norm.in_place(isa, row));
                }
                Step::Normalize => rows.chunks_exact_mut(width).for_each(normalize),
            }
        }
        (rows, width)
    }

    /// The last step, which depends on the request.
    fn finish(&self, rows: &[f32], width: usize, wanted: Wanted) -> Output {
        let kept = if wanted.dimensions == 0 { width } else { wanted.dimensions.min(width) };
        let mut values = Vec::with_capacity(rows.len() / width * kept);
        rows.chunks_exact(width).for_each(|row| values.extend_from_slice(&row[..kept]));
        if wanted.activate {
            for row in values.chunks_exact_mut(kept) {
                match (&self.kind, wanted.task) {
                    (Kind::Embedding, _) => normalize(row),
                    (Kind::Classes { score, .. }, Task::Score) => score.apply(row),
                    (Kind::Classes { classify, .. }, _) => classify.apply(row),
                    (Kind::TokenClasses(function), _) => function.apply(row),
                }
            }
        }
        Output { values, width: kept }
    }
}

/// To length one, as `torch.nn.functional.normalize` does it.
fn normalize(row: &mut [f32]) {
    let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let length = (squares.sqrt() as f32).max(1e-12);
    row.iter_mut().for_each(|x| *x /= length);
}
