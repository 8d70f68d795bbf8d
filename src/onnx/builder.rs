//! Builds a [`Graph`] node by node. Every value has one name, and a node is named after its first
//! output, so names are unique across branches as long as callers name things after their place.

use skipgpt_passes::ir::{DType, Weight};

use super::graph::{Attribute, Data, Dim, Element, Graph, Initializer, Node, Value};
use crate::decoder::Sequences;

/// The domain of ONNX Runtime's own operators.
pub(super) const MICROSOFT: &str = "com.microsoft";

/// A graph under construction.
pub(super) struct Builder {
    /// The dtype of weights, hidden states and caches.
    pub(super) dtype: DType,
    /// Which sequences the graph takes.
    pub(super) sequences: Sequences,
    nodes: Vec<Node>,
    /// Small values that any graph may read.
    constants: Vec<Initializer>,
    /// Of the graph or branch under construction.
    weights: Vec<Initializer>,
    /// How many branches are under construction, one in the other.
    depth: usize,
}

/// A value's name.
pub(super) type Name = String;

impl Builder {
    pub(super) fn new(dtype: DType, sequences: Sequences) -> Self {
        let (nodes, constants, weights) = (Vec::new(), Vec::new(), Vec::new());
        Self { dtype, sequences, nodes, constants, weights, depth: 0 }
    }

    /// How many sequences a step has.
    pub(super) const fn batch(&self) -> Dim {
        match self.sequences {
            Sequences::Any => Dim::Symbolic("batch"),
            Sequences::One => Dim::Fixed(1),
        }
    }

    /// The shape of a value of every token.
    pub(super) fn every_token(&self, width: usize) -> Vec<Dim> {
        vec![self.batch(), Dim::Symbolic("sequence"), Dim::Fixed(width)]
    }

    /// A node with one output, which gives it its name.
    pub(super) fn op(&mut self, name: &str, op: &'static str, inputs: &[&str]) -> Name {
        self.op_with(name, op, inputs, vec![])
    }

    /// As [`Self::op`], with attributes.
    pub(super) fn op_with(
        &mut self,
        name: &str,
        op: &'static str,
        inputs: &[&str],
        attributes: Vec<(&'static str, Attribute)>,
    ) -> Name {
        self.node(name, "", op, inputs, &[name], attributes);
        name.to_owned()
    }

    /// As [`Self::op_with`], for an operator of ONNX Runtime's own.
    pub(super) fn microsoft(
        &mut self,
        name: &str,
        op: &'static str,
        inputs: &[&str],
        attributes: Vec<(&'static str, Attribute)>,
    ) -> Name {
        self.node(name, MICROSOFT, op, inputs, &[name], attributes);
        name.to_owned()
    }

    /// As [`Self::microsoft`], with several outputs; `""` leaves an optional one out.
    pub(super) fn microsoft_outputs(
        &mut self,
        op: &'static str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<(&'static str, Attribute)>,
    ) {
        self.node(outputs[0], MICROSOFT, op, inputs, outputs, attributes);
    }

    fn node(
        &mut self,
        name: &str,
        domain: &'static str,
        op: &'static str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<(&'static str, Attribute)>,
    ) {
        self.nodes.push(Node {
            name: format!("/{name}"),
            op,
            domain,
            inputs: inputs.iter().map(|&input| input.to_owned()).collect(),
            outputs: outputs.iter().map(|&output| output.to_owned()).collect(),
            attributes,
        });
    }

    /// Equal parts of `value` along its last axis, under the names given.
    pub(super) fn split<const N: usize>(
        &mut self,
        name: &str,
        value: &str,
        parts: [&str; N],
    ) -> [Name; N] {
        let outputs = parts.map(|part| format!("{name}.{part}"));
        let names: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let attributes =
            vec![("axis", Attribute::Int(-1)), ("num_outputs", Attribute::Int(N as i64))];
        self.node(&format!("{name}.split"), "", "Split", &[value], &names, attributes);
        outputs
    }

    /// Parts of `value` along its last axis, of the sizes and under the names given.
    pub(super) fn split_sizes<const N: usize>(
        &mut self,
        name: &str,
        value: &str,
        parts: [(&str, usize); N],
    ) -> [Name; N] {
        let sizes = parts.map(|(_, size)| size as i64);
        let spelled = sizes.map(|size| size.to_string()).join(".");
        let sizes = self.ints(&format!("shapes.split.{spelled}"), &sizes);
        let outputs = parts.map(|(part, _)| format!("{name}.{part}"));
        let names: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let axis = vec![("axis", Attribute::Int(-1))];
        self.node(&format!("{name}.split"), "", "Split", &[value, &sizes], &names, axis);
        outputs
    }

    /// As [`Self::branch_of`], in the model's dtype.
    pub(super) fn branch<const N: usize>(
        &mut self,
        outputs: &[(&str, Vec<Dim>); N],
        condition: &str,
        then: impl FnOnce(&mut Self) -> [Name; N],
        otherwise: impl FnOnce(&mut Self) -> [Name; N],
    ) -> [Name; N] {
        let element = Element::Float(self.dtype);
        let outputs = outputs.each_ref().map(|(name, shape)| (*name, element, shape.clone()));
        self.branch_of(&outputs, condition, then, otherwise)
    }

    /// `then` if `condition`, which has one element, else `otherwise`; both build values of these
    /// elements and shapes. Their names must be of their own: a branch cannot give a value of the graph around
    /// it.
    pub(super) fn branch_of<const N: usize>(
        &mut self,
        outputs: &[(&str, Element, Vec<Dim>); N],
        condition: &str,
        then: impl FnOnce(&mut Self) -> [Name; N],
        otherwise: impl FnOnce(&mut Self) -> [Name; N],
    ) -> [Name; N] {
        let names = outputs.each_ref().map(|(name, ..)| *name);
        let name = names.first().copied().unwrap_or_default();
        let types = outputs.each_ref().map(|(_, element, shape)| (*element, shape));
        let then = self.body(&format!("{name}.then"), types, then);
        let otherwise = self.body(&format!("{name}.else"), types, otherwise);
        let branches = vec![
            ("else_branch", Attribute::Graph(otherwise)),
            ("then_branch", Attribute::Graph(then)),
        ];
        self.node(name, "", "If", &[condition], &names, branches);
        names.map(str::to_owned)
    }

    /// What `body` gives, of this shape and in the model's dtype, for each number below `count`, a scalar: stacked along a
    /// new first axis, called `output`.
    pub(super) fn stacked(
        &mut self,
        output: &str,
        count: &str,
        shape: [Dim; 3],
        body: impl FnOnce(&mut Self, &str) -> Name,
    ) -> Name {
        let name = |part: &str| format!("{output}.{part}");
        let scalar = |name, element| Value { name, element, shape: vec![] };
        let (number, go_on, going) = (name("number"), name("go_on"), name("going"));
        let (element, shape) = (Element::Float(self.dtype), shape.to_vec());
        let mut repeated = self.body(&name("body"), [(element, &shape)], |b| {
            b.op(&going, "Identity", &[&go_on]);
            [body(b, &number)]
        });
        repeated.inputs = vec![scalar(number, Element::Int64), scalar(go_on, Element::Bool)];
        repeated.outputs.insert(0, scalar(going, Element::Bool));
        let repeated = vec![("body", Attribute::Graph(repeated))];
        self.op_with(output, "Loop", &[count, ""], repeated)
    }

    fn body<const N: usize>(
        &mut self,
        name: &str,
        types: [(Element, &Vec<Dim>); N],
        build: impl FnOnce(&mut Self) -> [Name; N],
    ) -> Graph {
        let outer = (std::mem::take(&mut self.nodes), std::mem::take(&mut self.weights));
        self.depth += 1;
        let outputs = build(self);
        self.depth -= 1;
        let nodes = std::mem::replace(&mut self.nodes, outer.0);
        let mut initializers = std::mem::replace(&mut self.weights, outer.1);
        // ONNX Runtime packs a branch's weights from the graph around it, and frees what it packed; from
        // two graphs further out it does not pack, and in the branch itself it keeps both. But before 1.29 it
        // packs codes from the graph around wrongly where activations are rounded to 8 bits.
        if self.depth == 0 {
            let plain = |weight: &Initializer| !matches!(weight.data, Data::Quantized(_));
            self.weights.extend(initializers.extract_if(.., |weight| plain(weight)));
        }
        let outputs = outputs.into_iter().zip(types);
        let outputs = outputs
            .map(|(name, (element, shape))| Value { name, element, shape: shape.clone() })
            .collect();
        Graph { name: name.to_owned(), outputs, nodes, initializers, ..Graph::default() }
    }

    /// A constant vector of integers, shared by name. Integers stay inside the model file: ONNX
    /// Runtime cannot read shapes from external data.
    pub(super) fn ints(&mut self, name: &str, values: &[i64]) -> Name {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(name, Element::Int64, &[values.len()], bytes)
    }

    /// A constant integer scalar, shared by name.
    pub(super) fn int(&mut self, name: &str, value: i64) -> Name {
        self.constant(name, Element::Int64, &[], value.to_le_bytes().to_vec())
    }

    /// A constant `f32` tensor, shared by name.
    pub(super) fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Name {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(name, Element::Float(DType::F32), shape, bytes)
    }

    /// Zero in the model's dtype, shared by name.
    pub(super) fn zero(&mut self, name: &str) -> Name {
        self.constant(name, Element::Float(self.dtype), &[], vec![0; self.dtype.size()])
    }

    fn constant(&mut self, name: &str, element: Element, shape: &[usize], bytes: Vec<u8>) -> Name {
        let constant = Initializer {
            name: name.to_owned(),
            element,
            shape: shape.to_vec(),
            data: Data::Inline(bytes),
        };
        match self.constants.iter().find(|known| known.name == name) {
            Some(known) => debug_assert_eq!(*known, constant, "two constants of one name"),
            None => self.constants.push(constant),
        }
        name.to_owned()
    }

    /// A weight in the model's dtype.
    pub(super) fn weight(&mut self, name: &str, weight: &Weight) -> Name {
        self.weight_as(name, weight, self.dtype)
    }

    /// A weight in a dtype of its own.
    pub(super) fn weight_as(&mut self, name: &str, weight: &Weight, dtype: DType) -> Name {
        self.initializer(Initializer {
            name: name.to_owned(),
            element: Element::Float(dtype),
            shape: weight.shape(),
            data: Data::Weight(weight.clone()),
        });
        name.to_owned()
    }

    /// A weight whose name no other has.
    pub(super) fn initializer(&mut self, initializer: Initializer) {
        self.weights.push(initializer);
    }

    /// The finished graph.
    pub(super) fn finish(self, name: &str, inputs: Vec<Value>, outputs: Vec<Value>) -> Graph {
        Graph {
            name: name.to_owned(),
            inputs,
            outputs,
            nodes: self.nodes,
            initializers: [self.constants, self.weights].concat(),
        }
    }
}
