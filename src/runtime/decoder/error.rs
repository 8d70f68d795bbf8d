//! Why a graph is no decoder, or a step failed.

/// Why a graph is no decoder, or a step failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The graph lacks an input every decoder has.
    #[error("the graph has no input {name}")]
    MissingInput {
        /// Its name.
        name: String,
    },
    /// The graph lacks an output that is needed.
    #[error("the graph has no output {name}")]
    MissingOutput {
        /// Its name.
        name: String,
    },
    /// The graph wants something a decoder has not.
    #[error(
        "the graph has an input {name}; a decoder has input_ids, attention_mask, position_ids and \
         past_key_values.N.key and .value"
    )]
    UnknownInput {
        /// Its name.
        name: String,
    },
    /// An input or output is not what its name says.
    #[error("the graph's {name} is {found}; expected {expected}")]
    Interface {
        /// The input or output.
        name: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The parts of an input do not fit together.
    #[error("{name} has shape {found:?}; expected {expected:?} [batch, tokens]")]
    InputShape {
        /// The part.
        name: &'static str,
        /// What it should be.
        expected: [usize; 2],
        /// What it is.
        found: [usize; 2],
    },
    /// There is nothing to run.
    #[error("a step needs at least one row and one token; got [{batch}, {sequence}]")]
    Empty {
        /// Rows.
        batch: usize,
        /// New tokens per row.
        sequence: usize,
    },
    /// A token that the model does not have.
    #[error("row {row}, token {position}: id {id} is outside the vocabulary of {vocab}")]
    Token {
        /// The row.
        row: usize,
        /// The place among the new tokens.
        position: usize,
        /// The id.
        id: i64,
        /// Number of tokens in the vocabulary.
        vocab: usize,
    },
    /// Logits that the graph does not give.
    #[error(
        "the logits of all {sequence} new tokens are asked for, and the graph gives those of the last \
         one alone: export it with --logits all, or ask for the last"
    )]
    LastOnly {
        /// New tokens per row.
        sequence: usize,
    },
    /// Sequences that the graph does not take.
    #[error(
        "the step has {batch} sequences of which {padded} are padded, and the graph takes one without \
         padding: export it with --sequences any"
    )]
    OneSequence {
        /// Sequences of the step.
        batch: usize,
        /// How many of them have padding.
        padded: usize,
    },
    /// The attention mask tells of another past than the cache holds.
    #[error(
        "the attention mask has {past} past tokens in {batch} rows; the cache holds {cached} in \
         {cached_batch}"
    )]
    Past {
        /// Past tokens per row, by the mask.
        past: usize,
        /// Rows of the input.
        batch: usize,
        /// Tokens per row in the cache.
        cached: usize,
        /// Rows of the cache.
        cached_batch: usize,
    },
    /// The graph gave a tensor of another shape than its interface promises.
    #[error("the graph gave {name} with shape {found:?}; expected {expected:?}")]
    Shape {
        /// The output.
        name: String,
        /// What it should be.
        expected: Vec<usize>,
        /// What it is.
        found: Vec<usize>,
    },
    /// The graph gave a tensor of another rank than its interface promises.
    #[error("the graph gave {name} with shape {found:?}; expected rank {expected}")]
    Rank {
        /// The output.
        name: String,
        /// The rank it should have.
        expected: usize,
        /// Its shape.
        found: Vec<usize>,
    },
    /// An input could not be handed over.
    #[error("{name} cannot be handed to ONNX Runtime: {source}")]
    Feed {
        /// The input.
        name: String,
        /// What went wrong.
        source: ort::Error,
    },
    /// An output could not be read.
    #[error("{name} cannot be read from ONNX Runtime: {source}")]
    Read {
        /// The output.
        name: String,
        /// What went wrong.
        source: ort::Error,
    },
    /// The graph takes its decisions from outside, and was given none for these tokens.
    #[error(
        "the graph's {name} takes biases for tokens {tokens:?} [batch, sequence]; it was given those of {given:?}"
    )]
    Unforced {
        /// The input.
        name: String,
        /// Tokens of the step.
        tokens: [usize; 2],
        /// Tokens it was given biases for.
        given: [usize; 2],
    },
    /// A cache of another number of layers.
    #[error("a cache of {found} layers does not fit the graph, which has {expected}")]
    Layers {
        /// Layers with a cache.
        expected: usize,
        /// Layers given.
        found: usize,
    },
    /// The graph failed.
    #[error("ONNX Runtime fails to run the graph: {0}")]
    Run(#[source] ort::Error),
    /// It ran elsewhere than it was asked to.
    #[error(transparent)]
    Session(#[from] crate::runtime::session::Error),
}
