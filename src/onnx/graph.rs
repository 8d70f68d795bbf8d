//! An ONNX graph as plain data: what the lowering builds, and what is printed, stored and written.
//!
//! Weights are initializers that still hold the IR's expression; their values are computed only
//! while the artifact is written.

use skipgpt_passes::ir::{DType, Weight};
use skipgpt_passes::quantization::Scheme;

/// A graph, a branch of an `If` (which has no inputs: it captures outer-scope values by name), or the body of a `Loop`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Graph {
    /// Unique among all graphs of a model.
    pub name: String,
    /// What the caller feeds.
    pub inputs: Vec<Value>,
    /// What the caller gets.
    pub outputs: Vec<Value>,
    /// In topological order; names are unique across nested graphs.
    pub nodes: Vec<Node>,
    /// Constants and weights.
    pub initializers: Vec<Initializer>,
}

/// A named tensor of the graph's interface.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// Element type.
    pub element: Element,
    /// Dimensions, fixed or named.
    pub shape: Vec<Dim>,
}

/// A dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// Known when the model is exported.
    Fixed(usize),
    /// A `dim_param`: the same name is the same number.
    Symbolic(&'static str),
    /// Any number.
    Open,
}

/// ONNX element types in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// A floating-point type.
    Float(DType),
    /// 64-bit integers: ids, masks, shapes.
    Int64,
    /// 32-bit integers: lengths, where an operator asks for these.
    Int32,
    /// Bytes: codes and zero points of matrices in few bits.
    Uint8,
    /// Truth values.
    Bool,
}

/// One operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Unique across nested graphs.
    pub name: String,
    /// Operator, such as `MatMul`.
    pub op: &'static str,
    /// `""` for the standard operators, or `com.microsoft`.
    pub domain: &'static str,
    /// Value names; `""` leaves an optional input out.
    pub inputs: Vec<String>,
    /// Value names; `""` leaves an optional output out.
    pub outputs: Vec<String>,
    /// In alphabetical order.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// A node's attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// One integer.
    Int(i64),
    /// Several integers.
    Ints(Vec<i64>),
    /// One real number.
    Float(f32),
    /// A word.
    Text(&'static str),
    /// What a `Cast` casts to.
    Type(Element),
    /// A branch of an `If`, or the body of a `Loop`.
    Graph(Graph),
}

/// A constant of the graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Initializer {
    /// Its name.
    pub name: String,
    /// Element type.
    pub element: Element,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Its value.
    pub data: Data,
}

/// The value of an initializer.
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// Little-endian bytes inside the model file: small integers must be there.
    Inline(Vec<u8>),
    /// A weight, rounded to the initializer's element type, in an external file.
    Weight(Weight),
    /// A part of a weight in few bits, in an external file.
    Quantized(Quantized),
}

/// A part of a matrix in few bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// The matrix, before it is quantised.
    pub weight: Weight,
    /// How it is stored.
    pub scheme: Scheme,
    /// Dtype of its scales.
    pub scales: DType,
    /// Which part.
    pub part: Part,
}

/// The parts of a matrix in few bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// One code per element, packed.
    Codes,
    /// One number per block.
    Scales,
    /// One code per block, packed.
    Zeros,
}

/// Where an external initializer's bytes lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// File name, in the artifact's own directory.
    pub location: String,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl Graph {
    /// The weights that are whole initializers, in the order in which they are written.
    pub fn weights(&self) -> impl Iterator<Item = (&Initializer, &Weight)> {
        self.all_initializers().into_iter().filter_map(|initializer| match &initializer.data {
            Data::Weight(weight) => Some((initializer, weight)),
            Data::Inline(_) | Data::Quantized(_) => None,
        })
    }

    /// The same graph, every weight of its branches in the main graph.
    #[must_use]
    pub fn hoisted(&self) -> Self {
        fn take(graph: &mut Graph, weights: &mut Vec<Initializer>) {
            for (_, attribute) in graph.nodes.iter_mut().flat_map(|node| &mut node.attributes) {
                if let Attribute::Graph(branch) = attribute {
                    weights.append(&mut branch.initializers);
                    take(branch, weights);
                }
            }
        }
        let mut all = self.clone();
        let mut weights = Vec::new();
        take(&mut all, &mut weights);
        all.initializers.append(&mut weights);
        all
    }

    /// Every initializer of this graph and its branches, outer before inner.
    pub fn all_initializers(&self) -> Vec<&Initializer> {
        let mut all: Vec<&Initializer> = self.initializers.iter().collect();
        for (_, attribute) in self.nodes.iter().flat_map(|node| &node.attributes) {
            if let Attribute::Graph(branch) = attribute {
                all.extend(branch.all_initializers());
            }
        }
        all
    }

    /// Every node of this graph and its branches, outer before inner.
    pub fn all_nodes(&self) -> Vec<&Node> {
        let mut all = Vec::new();
        for node in &self.nodes {
            all.push(node);
            for (_, attribute) in &node.attributes {
                if let Attribute::Graph(branch) = attribute {
                    all.extend(branch.all_nodes());
                }
            }
        }
        all
    }
}

impl Initializer {
    /// Size of the value in bytes.
    pub fn size(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.element.size() as u64
    }
}

impl Element {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.size(),
            Self::Int64 => 8,
            Self::Int32 => 4,
            Self::Bool | Self::Uint8 => 1,
        }
    }
}
