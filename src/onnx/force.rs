//! Decisions from outside: a router's bias becomes an input of the graph.
//!
//! ```text
//! - margins = Add(product, bias)
//! + margins = Add(product, forced.layers.3)
//! ```
//!
//! Infinity keeps a token, negative infinity skips it. No node is added or taken away: the routers
//! are computed as before, and the time of a step is that of an artifact whose routers decide so. Only a router
//! without a bias gets a node more, to add one.

use ndarray::Array3;
use onnx_protobuf::{Message, ModelProto, NodeProto};
use skipgpt_passes::ir::{DType, ModuleId};

use super::RouterMargins;
use super::graph::{Element, Value};
use super::proto::{self, serialise, value_proto};
use super::router;
use super::stream::every_token;

/// How the names of these inputs begin.
pub const PREFIX: &str = "forced.";

/// An input that stands in for a router's bias: `f32` `[batch, sequence, columns]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Its name.
    pub name: String,
    /// Whose decisions it holds, column by column.
    pub modules: Vec<ModuleId>,
    /// Whether as many columns more hold the negatives.
    pub negatives: bool,
}

impl Input {
    /// What makes decisions of so many rows and tokens: whether a module, by its column, skips the token at a row
    /// and a column.
    pub fn biases(
        &self,
        (rows, sequence): (usize, usize),
        skips: impl Fn(usize, usize, usize) -> bool,
    ) -> Array3<f32> {
        let modules = self.modules.len();
        Array3::from_shape_fn((rows, sequence, self.columns()), |(row, token, column)| {
            let skips = skips(column % modules, row, token);
            if skips == (column < modules) { f32::NEG_INFINITY } else { f32::INFINITY }
        })
    }

    fn columns(&self) -> usize {
        router::columns(self.modules.len(), self.negatives)
    }
}

/// Why a model's decisions cannot be taken from outside.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A router's margins are no product.
    #[error("the graph has no product {0}: this build did not export it")]
    NoRouter(String),
    /// The model file cannot be read or written.
    #[error(transparent)]
    Proto(#[from] proto::Error),
}

/// The same model with an input for the decisions of each of `routers`, and those inputs.
///
/// `bytes` must be a file that [`proto::encode`] wrote: compare its hash with the manifest's first.
///
/// # Errors
///
/// [`Error::NoRouter`] if a router's margins are not computed as this build lowers them.
pub fn with_forced(
    bytes: &[u8],
    routers: &[RouterMargins],
) -> Result<(Vec<u8>, Vec<Input>), Error> {
    let mut model = ModelProto::parse_from_bytes(bytes).map_err(proto::Error::from)?;
    let graph = model.graph.mut_or_insert_default();
    let mut inputs = Vec::with_capacity(routers.len());
    for RouterMargins { value, modules, negatives } in routers {
        let place = value.strip_suffix(".router.margins").unwrap_or(value);
        let unknown = || Error::NoRouter(value.clone());
        let at = graph.node.iter().position(|node| node.output.first() == Some(value));
        let at = at.ok_or_else(unknown)?;
        let node = &mut graph.node[at];
        let (name, modules) = (format!("{PREFIX}{place}"), modules.clone());
        let input = Input { name, modules, negatives: *negatives };
        match (node.op_type.as_str(), node.input.len()) {
            ("Add", 2) => {
                let bias = std::mem::replace(&mut node.input[1], input.name.clone());
                graph.initializer.retain(|tensor| tensor.name != bias);
            }
            ("FusedMatMul", 2) => {
                let product = format!("{value}.product");
                node.output = vec![product.clone()];
                let sum = NodeProto {
                    name: format!("/{value}.sum"),
                    op_type: "Add".to_owned(),
                    input: vec![product, input.name.clone()],
                    output: vec![value.clone()],
                    ..Default::default()
                };
                graph.node.insert(at + 1, sum);
            }
            _ => return Err(unknown()),
        }
        graph.input.push(value_proto(&Value {
            name: input.name.clone(),
            element: Element::Float(DType::F32),
            shape: every_token(input.columns()),
        }));
        inputs.push(input);
    }
    Ok((serialise(&model)?, inputs))
}
