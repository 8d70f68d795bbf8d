//! The graph as text, one line per node, for people and golden files.

use std::fmt::{self, Display, Formatter};

use super::graph::{
    Attribute, Data, Dim, Element, Graph, Initializer, Node, Part, Quantized, Value,
};

impl Display for Graph {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "graph {}", self.name)?;
        self.inputs.iter().try_for_each(|input| writeln!(f, "  input {input}"))?;
        self.outputs.iter().try_for_each(|output| writeln!(f, "  output {output}"))?;
        self.initializers.iter().try_for_each(|constant| writeln!(f, "  {constant}"))?;
        nodes(f, &self.nodes, 1)
    }
}

fn nodes(f: &mut Formatter<'_>, all: &[Node], depth: usize) -> fmt::Result {
    let indent = "  ".repeat(depth);
    for node in all {
        writeln!(f, "{indent}{node}")?;
        for (name, attribute) in &node.attributes {
            if let Attribute::Graph(branch) = attribute {
                writeln!(f, "{indent}  {name} {}", branch.name)?;
                for input in &branch.inputs {
                    writeln!(f, "{indent}    input {input}")?;
                }
                let mut weights = branch.initializers.iter();
                weights.try_for_each(|weight| writeln!(f, "{indent}    {weight}"))?;
                nodes(f, &branch.nodes, depth + 2)?;
                for output in &branch.outputs {
                    writeln!(f, "{indent}    output {output}")?;
                }
            }
        }
    }
    Ok(())
}

impl Display for Node {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let domain = if self.domain.is_empty() { "" } else { "::" };
        write!(f, "{} = {}{domain}{}", self.outputs.join(", "), self.domain, self.op)?;
        write!(f, "({})", self.inputs.join(", "))?;
        for (name, attribute) in &self.attributes {
            match attribute {
                Attribute::Int(value) => write!(f, " {name}={value}")?,
                Attribute::Ints(values) => write!(f, " {name}={values:?}")?,
                Attribute::Float(value) => write!(f, " {name}={value:?}")?,
                Attribute::Text(value) => write!(f, " {name}={value}")?,
                Attribute::Type(element) => write!(f, " {name}={element}")?,
                Attribute::Graph(_) => {}
            }
        }
        Ok(())
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}[", self.name, self.element)?;
        list(f, &self.shape)?;
        f.write_str("]")
    }
}

impl Display for Initializer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = if matches!(self.data, Data::Inline(_)) { "const" } else { "weight" };
        write!(f, "{kind} {}: {}[", self.name, self.element)?;
        list(f, &self.shape)?;
        f.write_str("] = ")?;
        match (&self.data, self.element) {
            (Data::Weight(weight), _) => write!(f, "{weight}"),
            (Data::Quantized(Quantized { weight, scheme, part, .. }), _) => {
                let part = match part {
                    Part::Codes => "codes",
                    Part::Scales => "scales",
                    Part::Zeros => "zeros",
                };
                write!(f, "{part} quantized({scheme}, {weight})")
            }
            (Data::Inline(bytes), Element::Int64) => {
                list(f, bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)))
            }
            (Data::Inline(bytes), Element::Int32) => {
                list(f, bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)))
            }
            (Data::Inline(bytes), Element::Float(dtype)) => {
                let mut values = Vec::new();
                crate::sources::decode(bytes, dtype, &mut values);
                list(f, values.iter().map(|value| format!("{value:?}")))
            }
            (Data::Inline(bytes), Element::Uint8) => list(f, bytes),
            (Data::Inline(bytes), Element::Bool) => list(f, bytes.iter().map(|b| *b != 0)),
        }
    }
}

impl Display for Dim {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Symbolic(name) => f.write_str(name),
            Self::Open => f.write_str("?"),
        }
    }
}

impl Display for Element {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(dtype) => write!(f, "{dtype}"),
            Self::Int64 => f.write_str("i64"),
            Self::Int32 => f.write_str("i32"),
            Self::Uint8 => f.write_str("u8"),
            Self::Bool => f.write_str("bool"),
        }
    }
}

fn list<T: Display>(f: &mut Formatter<'_>, items: impl IntoIterator<Item = T>) -> fmt::Result {
    for (i, item) in items.into_iter().enumerate() {
        write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
    }
    Ok(())
}
