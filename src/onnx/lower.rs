//! The whole model as an ONNX graph: inputs, what every layer shares, the layers, the head.
//!
//! The hidden state is `[tokens, hidden]`, `tokens = batch · sequence`, so that `Gemm` takes it as
//! it is and rows can be gathered and scattered.

use skipgpt_passes::ir::{DType, Layer, Model, ModuleId, ModuleKind, Routing};

use super::builder::{Builder, Name};
use super::graph::{Attribute, Dim, Element, Graph, Value};
use super::quantized::quantized;
use super::router::{self, RouterScores};
use super::stream::Stream;
use super::{Options, attention, dispatch, mlp};
use crate::rope;

/// The name of the output that holds the decisions.
pub const ROUTING: &str = "routing_margins";

/// Values every layer uses.
pub(super) struct Shared {
    /// `[batch, sequence]` as a shape with the rest left open: `[batch, sequence, -1]`.
    pub(super) batch_sequence: Name,
    /// Which row of the tables a token reads, `[batch, sequence]`: its own.
    pub(super) rows: Name,
    /// Cosines of every token's angles, `[tokens, head_dim / 2]`.
    pub(super) cos: Name,
    /// Sines of every token's angles, `[tokens, head_dim / 2]`.
    pub(super) sin: Name,
    /// Added to attention scores: 0 where a query may look, `[batch, 1, group · sequence, total]`.
    pub(super) bias: Name,
    /// Zeros, `[tokens, heads · head_dim]`; present if an attention module gathers its rows.
    pub(super) zero_queries: Option<Name>,
}

/// Lowers a model whose every module says how it is dispatched.
pub(super) fn lower(model: &Model, options: Options) -> Graph {
    let config = &model.config;
    let mut b = Builder::new(options.dtype);
    let rows = embedding_rows(&mut b, model);
    let shared = preamble(&mut b, model);
    let embedded = embed(&mut b, model, rows.as_deref());
    let flat = b.ints("shapes.hidden", &[-1, config.hidden_size as i64]);
    let mut stream = Stream::Value(b.op("layers.input", "Reshape", &[&embedded, &flat]));

    for layer in &model.layers {
        stream = lower_layer(&mut b, &shared, model, layer, stream);
    }

    let (normed, _) = stream.norm(&mut b, "norm", &model.norm, config.rms_norm_eps);
    let scores = head(&mut b, model, rows.as_deref(), &normed);
    let scores = b.as_f32("head.f32", &scores);
    b.op("logits", "Reshape", &[&scores, &shared.batch_sequence]);

    let mut outputs = vec![Value {
        name: "logits".into(),
        element: Element::Float(DType::F32),
        shape: vec![BATCH, SEQUENCE, Dim::Fixed(config.vocab_size)],
    }];
    outputs.extend(caches(model, options.dtype, "present", Dim::Symbolic("total_sequence")));
    let routers = router::router_scores(model);
    if options.emit_routing && !routers.is_empty() {
        outputs.push(emit_routing(&mut b, &routers));
    }
    let mut inputs = token_inputs();
    inputs.extend(caches(model, options.dtype, "past_key_values", Dim::Symbolic("past_sequence")));
    b.finish("skipgpt", inputs, outputs)
}

const BATCH: Dim = Dim::Symbolic("batch");
const SEQUENCE: Dim = Dim::Symbolic("sequence");

fn token_inputs() -> Vec<Value> {
    let integers = |name: &str, shape| Value { name: name.into(), element: Element::Int64, shape };
    vec![
        integers("input_ids", vec![BATCH, SEQUENCE]),
        integers("attention_mask", vec![BATCH, Dim::Symbolic("total_sequence")]),
        integers("position_ids", vec![BATCH, SEQUENCE]),
    ]
}

/// The caches of every layer that has attention, under the layer's place in the checkpoint.
fn caches(model: &Model, dtype: DType, prefix: &str, length: Dim) -> Vec<Value> {
    let config = &model.config;
    let shape =
        vec![BATCH, Dim::Fixed(config.num_key_value_heads), length, Dim::Fixed(config.head_dim)];
    let cached = model.cached_layers();
    cached
        .flat_map(|layer| {
            ["key", "value"].map(|part| Value {
                name: format!("{prefix}.{layer}.{part}"),
                element: Element::Float(dtype),
                shape: shape.clone(),
            })
        })
        .collect()
}

/// The embedding as an initializer, unless it is in few bits.
fn embedding_rows(b: &mut Builder, model: &Model) -> Option<Name> {
    let plain = quantized(&model.embedding).is_none();
    plain.then(|| b.weight("embedding.weight", &model.embedding))
}

/// The tokens' rows of the embedding, `[batch, sequence, hidden]`.
fn embed(b: &mut Builder, model: &Model, rows: Option<&str>) -> Name {
    match (rows, quantized(&model.embedding)) {
        (_, Some(weight)) => b.gather_bits("embedding", "input_ids", weight),
        (rows, None) => b.op("embedding", "Gather", &[rows.unwrap_or_default(), "input_ids"]),
    }
}

/// Logits `[tokens, vocab]` in the model's dtype; the weight is the embedding itself where they are
/// tied.
fn head(b: &mut Builder, model: &Model, rows: Option<&str>, x: &str) -> Name {
    match rows.filter(|_| model.head.weight == model.embedding) {
        Some(weight) => {
            let bias = model.head.bias.as_ref().map(|bias| b.weight("head.bias", bias));
            b.gemm("head", x, weight, bias.as_deref())
        }
        None => b.linear("head", x, &model.head, b.dtype),
    }
}

fn preamble(b: &mut Builder, model: &Model) -> Shared {
    let config = &model.config;
    let shape = b.op("shapes.ids", "Shape", &["input_ids"]);
    let open = b.ints("constants.open", &[-1]);
    let batch_sequence = b.op_with(
        "shapes.batch_sequence",
        "Concat",
        &[&shape, &open],
        vec![("axis", Attribute::Int(0))],
    );
    let zero = b.int("constants.zero", 0);
    let one = b.int("constants.one", 1);
    let tokens = b.op("shapes.tokens", "Size", &["input_ids"]);
    let range = b.op("rope.range", "Range", &[&zero, &tokens, &one]);
    let rows = b.op("rope.rows", "Reshape", &[&range, &shape]);

    let column = b.ints("shapes.column", &[-1, 1]);
    let positions = b.op("rope.positions", "Reshape", &["position_ids", &column]);
    let positions = b.cast("rope.positions.f32", &positions, DType::F32);
    let frequencies = rope::inverse_frequencies(config);
    let frequencies = b.floats("rope.frequencies", &[1, frequencies.len()], &frequencies);
    let angles = b.op("rope.angles", "Mul", &[&positions, &frequencies]);
    let cos = b.op("rope.cos.f32", "Cos", &[&angles]);
    let sin = b.op("rope.sin.f32", "Sin", &[&angles]);
    let cos = b.rounded("rope.cos", &cos);
    let sin = b.rounded("rope.sin", &sin);

    let bias = attention::bias(b, config, &zero, &one);
    attention::head_shapes(b, model);
    let gathers =
        |kind| model.layers.iter().filter_map(|layer| layer.routing(kind)).any(dispatch::gathers);
    let zero_queries = gathers(ModuleKind::Attention).then(|| attention::zero_queries(b, config));
    if zero_queries.is_some() || gathers(ModuleKind::Mlp) {
        dispatch::row_numbers(b, &range);
    }
    Shared { batch_sequence, rows, cos, sin, bias, zero_queries }
}

/// One layer on the residual stream.
fn lower_layer(
    b: &mut Builder,
    shared: &Shared,
    model: &Model,
    layer: &Layer,
    mut stream: Stream,
) -> Stream {
    let config = &model.config;
    let at = |kind| ModuleId { layer: layer.index, kind };
    let mut shared_decisions = None;
    if layer.router.is_some() {
        let x = stream.value(b);
        shared_decisions = router::shared(b, layer, &x);
        stream = Stream::Value(x);
    }
    let decide = |b: &mut Builder, module, routing: &Routing, stream: Stream| {
        if !routing.is_routed() {
            return (None, stream);
        }
        let x = stream.value(b);
        (router::decide(b, module, routing, shared_decisions.as_ref(), &x), Stream::Value(x))
    };
    if let Some(attention) = &layer.attention {
        let module = at(ModuleKind::Attention);
        let (decision, x) = decide(b, module, &attention.routing, stream);
        stream = attention::lower(b, shared, config, (module, attention), decision.as_ref(), x);
    }
    if let Some(mlp) = &layer.mlp {
        let module = at(ModuleKind::Mlp);
        let (decision, x) = decide(b, module, &mlp.routing, stream);
        stream = mlp::lower(b, config, module, mlp, decision.as_ref(), x);
    }
    stream
}

/// All margins as one output, `[modules, batch, sequence]`. A difference of floats is never rounded
/// to the other side of 0, so a margin says what was decided.
fn emit_routing(b: &mut Builder, routers: &[RouterScores]) -> Value {
    let columns: Vec<Name> = routers
        .iter()
        .map(|router| {
            let name = format!("{}.emitted", router.value);
            let [keep, skip] = b.split(&name, &router.value, 1, ["keep", "skip"]);
            b.op(&format!("{name}.margins"), "Sub", &[&keep, &skip])
        })
        .collect();
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let axis = vec![("axis", Attribute::Int(1))];
    let all = b.op_with("routing.columns", "Concat", &columns, axis);
    let all = b.op("routing.rows", "Transpose", &[&all]);
    let modules = routers.iter().map(|router| router.modules.len()).sum();
    let count = b.ints("routing.modules", &[modules as i64]);
    let axis = vec![("axis", Attribute::Int(0))];
    let shape = b.op_with("routing.shape", "Concat", &[&count, "shapes.ids"], axis);
    b.op(ROUTING, "Reshape", &[&all, &shape]);
    Value {
        name: ROUTING.into(),
        element: Element::Float(DType::F32),
        shape: vec![Dim::Fixed(modules), BATCH, SEQUENCE],
    }
}
