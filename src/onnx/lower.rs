//! The whole model as an ONNX graph: inputs, what every layer shares, the layers, the head.
//!
//! The hidden state is `[tokens, hidden]`, `tokens = batch · sequence`, so that `Gemm` takes it as
//! it is and rows can be gathered and scattered.

use skipgpt_passes::ir::{DType, Layer, Model, ModuleId, ModuleKind, Routing};

use super::attention::{self, Shared};
use super::builder::{Builder, Name};
use super::graph::{Attribute, Dim, Element, Graph, Value};
use super::quantized::quantized;
use super::router::{self, RouterMargins};
use super::stream::Stream;
use super::{Attention, Options, mlp};
use crate::decoder::Logits;

/// The name of the output that holds the decisions.
pub const ROUTING: &str = "routing_margins";

/// Lowers a model whose every module says how it is dispatched.
pub(super) fn lower(model: &Model, options: Options) -> Graph {
    let config = &model.config;
    let mut b = Builder::new(options.dtype);
    let rows = embedding_rows(&mut b, model);
    let shared = attention::preamble(&mut b, model, options.attention == Attention::Grouped);
    let embedded = embed(&mut b, model, rows.as_deref());
    let flat = b.ints("shapes.hidden", &[-1, config.hidden_size as i64]);
    let mut stream = Stream::Value(b.op("layers.input", "Reshape", &[&embedded, &flat]));

    for layer in &model.layers {
        stream = lower_layer(&mut b, &shared, model, layer, stream);
    }

    if options.logits == Logits::Last {
        let last = shared.last_rows(&mut b);
        stream = stream.gathered(&mut b, "last", &last);
    }
    let (normed, _) = stream.norm(&mut b, "norm", &model.norm, config.rms_norm_eps);
    let scores = head(&mut b, model, rows.as_deref(), &normed);
    let mut outputs = vec![logits(&mut b, &shared, config.vocab_size, options.logits, &scores)];
    outputs.extend(caches(model, options.dtype, "present", Dim::Symbolic("total_sequence")));
    let routers = router::router_margins(model);
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

/// Scores `[rows, vocab]` of normed rows, in the model's dtype; the weight is the embedding itself where they are
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

/// The output `logits`, from the head's scores `[rows, vocab]`.
fn logits(b: &mut Builder, shared: &Shared, vocab: usize, given: Logits, scores: &str) -> Value {
    let scores = b.as_f32("head.f32", scores);
    let positions = match given {
        Logits::All => {
            b.op("logits", "Reshape", &[&scores, &shared.batch_sequence]);
            SEQUENCE
        }
        Logits::Last => {
            let position = b.ints("constants.sequence_axis", &[1]);
            b.op("logits", "Unsqueeze", &[&scores, &position]);
            Dim::Fixed(1)
        }
    };
    Value {
        name: "logits".into(),
        element: Element::Float(DType::F32),
        shape: vec![BATCH, positions, Dim::Fixed(vocab)],
    }
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
        shared_decisions = router::shared(b, layer, shared.gates(), &x);
        stream = Stream::Value(x);
    }
    let decide = |b: &mut Builder, module, routing: &Routing, stream: Stream| {
        if !routing.is_routed() {
            return (None, stream);
        }
        let x = stream.value(b);
        let decided = shared_decisions.as_ref();
        (router::decide(b, module, routing, decided, shared.gates(), &x), Stream::Value(x))
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

/// All margins as one output, `[modules, batch, sequence]`: what was compared with 0.
fn emit_routing(b: &mut Builder, routers: &[RouterMargins]) -> Value {
    let columns: Vec<&str> = routers.iter().map(|router| router.value.as_str()).collect();
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

#[cfg(test)]
mod tests;
