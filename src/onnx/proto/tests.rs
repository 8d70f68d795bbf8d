//! What is written is read back with the generated reader.

use skipgpt_passes::ir::{Stored, Weight};

use super::*;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn value(name: &str, element: Element, shape: &[Dim]) -> Value {
    Value { name: name.into(), element, shape: shape.to_vec() }
}

fn node(name: &str, op: &'static str, inputs: &[&str], outputs: &[&str]) -> Node {
    Node {
        name: name.into(),
        op,
        domain: "",
        inputs: inputs.iter().map(ToString::to_string).collect(),
        outputs: outputs.iter().map(ToString::to_string).collect(),
        attributes: vec![],
    }
}

/// `y = if c { x · w } else { x }`, transposed.
fn graph() -> Graph {
    let f32 = Element::Float(DType::F32);
    let branch = |name: &str, node: Node| Graph {
        name: name.into(),
        outputs: vec![value(&node.outputs[0], f32, &[Dim::Symbolic("batch"), Dim::Fixed(2)])],
        nodes: vec![node],
        ..Default::default()
    };
    let mut choose = node("choose", "If", &["c"], &["h"]);
    choose.attributes = vec![
        (
            "else_branch",
            Attribute::Graph(branch("no", node("same", "Identity", &["x"], &["h.no"]))),
        ),
        (
            "then_branch",
            Attribute::Graph(branch("yes", node("product", "MatMul", &["x", "w"], &["h.yes"]))),
        ),
    ];
    let mut turn = node("turn", "Transpose", &["h"], &["y"]);
    turn.attributes = vec![("perm", Attribute::Ints(vec![1, 0]))];
    let weight = Stored { name: "w".into(), shape: vec![2, 2], dtype: DType::BF16 };
    Graph {
        name: "main".into(),
        inputs: vec![value("x", f32, &[Dim::Symbolic("batch"), Dim::Fixed(2)])],
        outputs: vec![value("y", f32, &[Dim::Fixed(2), Dim::Symbolic("batch")])],
        nodes: vec![choose, turn],
        initializers: vec![
            Initializer {
                name: "c".into(),
                element: Element::Bool,
                shape: vec![],
                data: Data::Inline(vec![1]),
            },
            Initializer {
                name: "w".into(),
                element: f32,
                shape: vec![2, 2],
                data: Data::Weight(Weight::Stored(weight)),
            },
        ],
    }
}

fn placements() -> BTreeMap<String, Placement> {
    let place = Placement { location: "model.onnx.data".into(), offset: 4096, length: 16 };
    BTreeMap::from([("w".to_owned(), place)])
}

fn encoded() -> Result<ModelProto> {
    let bytes = encode(&graph(), &placements(), &[("dtype", "f32")])?;
    Ok(ModelProto::parse_from_bytes(&bytes)?)
}

#[test]
fn the_header_names_tool_opsets_and_metadata() -> Result {
    let model = encoded()?;
    assert_eq!(model.ir_version, 8);
    let opsets: Vec<_> =
        model.opset_import.iter().map(|o| (o.domain.as_str(), o.version)).collect();
    assert_eq!(opsets, [("", 18), ("com.microsoft", 1)]);
    assert_eq!(model.producer_name, "skipgpt-export");
    assert_eq!(model.metadata_props[0].key, "dtype");
    Ok(())
}

#[test]
fn weights_are_external_and_constants_inline() -> Result {
    let model = encoded()?;
    let [constant, weight] = &model.graph.initializer[..] else {
        return Err("two initializers".into());
    };
    assert_eq!((constant.data_type, &constant.raw_data[..]), (DataType::BOOL as i32, &[1][..]));
    assert_eq!((weight.dims.as_slice(), weight.data_type), (&[2, 2][..], DataType::FLOAT as i32));
    assert_eq!(weight.data_location.enum_value(), Ok(DataLocation::EXTERNAL));
    let external: Vec<_> =
        weight.external_data.iter().map(|e| (e.key.as_str(), e.value.as_str())).collect();
    assert_eq!(external, [("location", "model.onnx.data"), ("offset", "4096"), ("length", "16")]);
    Ok(())
}

#[test]
fn branches_and_shapes_survive() -> Result {
    let model = encoded()?;
    let choose = &model.graph.node[0];
    assert_eq!(choose.attribute[1].name, "then_branch");
    assert_eq!(choose.attribute[1].type_.enum_value(), Ok(AttributeType::GRAPH));
    assert_eq!(choose.attribute[1].g.node[0].input, ["x", "w"]);
    assert_eq!(model.graph.node[1].attribute[0].ints, [1, 0]);
    let output = &model.graph.output[0];
    assert_eq!(output.type_.tensor_type().shape.dim[0].dim_value(), 2);
    assert_eq!(output.type_.tensor_type().shape.dim[1].dim_param(), "batch");
    Ok(())
}

#[test]
fn the_bytes_are_a_function_of_the_graph() -> Result {
    let first = encode(&graph(), &placements(), &[("a", "b")])?;
    assert_eq!(first, encode(&graph(), &placements(), &[("a", "b")])?);
    Ok(())
}

#[test]
fn outputs_are_added_once_and_only_if_computed() -> Result {
    let bytes = encode(&graph(), &placements(), &[])?;
    let h = value("h", Element::Float(DType::F32), &[Dim::Symbolic("batch"), Dim::Fixed(2)]);
    let y = value("y", Element::Float(DType::F32), &[Dim::Fixed(2)]);
    let model = ModelProto::parse_from_bytes(&with_outputs(&bytes, &[h, y])?)?;
    let names: Vec<_> = model.graph.output.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(names, ["y", "h"]);
    let inner = value("h.yes", Element::Bool, &[]);
    let error = with_outputs(&bytes, &[inner]).err().map(|e| e.to_string());
    assert_eq!(error.as_deref(), Some("the graph computes no value named h.yes"));
    Ok(())
}

#[test]
fn contradictions_are_named() {
    let error = encode(&graph(), &BTreeMap::new(), &[]).err().map(|e| e.to_string());
    assert_eq!(error.as_deref(), Some("initializer w has no place in an external file"));
    let mut wrong = graph();
    wrong.initializers[0].data = Data::Inline(vec![1, 0]);
    let error = encode(&wrong, &placements(), &[]).err().map(|e| e.to_string());
    assert_eq!(error.as_deref(), Some("initializer c has 2 bytes; its shape takes 1"));
}
