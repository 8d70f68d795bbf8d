//! The smallest graph: whether a provider runs anything at all.

use skipgpt_passes::ir::DType;

use super::graph::{Dim, Element, Graph, Node, Value};
use super::proto;

/// The model file of `y = x + x`, one number.
///
/// # Errors
///
/// As [`proto::encode`].
pub fn probe() -> Result<Vec<u8>, proto::Error> {
    let value = |name: &str| Value {
        name: name.to_owned(),
        element: Element::Float(DType::F32),
        shape: vec![Dim::Fixed(1)],
    };
    let graph = Graph {
        name: "probe".to_owned(),
        inputs: vec![value("x")],
        outputs: vec![value("y")],
        nodes: vec![Node {
            name: "/add".to_owned(),
            op: "Add",
            domain: "",
            inputs: vec!["x".to_owned(), "x".to_owned()],
            outputs: vec!["y".to_owned()],
            attributes: Vec::new(),
        }],
        initializers: Vec::new(),
    };
    proto::encode(&graph, &[].into(), &[])
}
