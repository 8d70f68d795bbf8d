//! The whole model as an ONNX graph: inputs, what every layer shares, the layers, the head.
//!
//! The hidden state is `[batch, sequence, hidden]` from the embedding to the logits, which is what attention
//! takes: nothing is reshaped on the way.

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
    let mut b = Builder::new(options.dtype, options.sequences);
    let embedding = embedding_rows(&mut b, model);
    let shared = attention::preamble(&mut b, model, options.attention == Attention::Grouped);
    let mut stream = Stream::Value(embed(&mut b, model, embedding.as_deref()));

    for layer in &model.layers {
        stream = lower_layer(&mut b, &shared, model, layer, stream);
    }

    let batch = b.batch();
    let mut positions = SEQUENCE;
    if options.logits == Logits::Last {
        let last = shared.last_columns(&mut b);
        stream = stream.gathered(&mut b, "last", &last);
        positions = Dim::Fixed(1);
    }
    let (normed, _) = stream.norm(&mut b, "norm", &model.norm, config.rms_norm_eps);
    logits(&mut b, model, embedding.as_deref(), &normed);
    let mut outputs = vec![Value {
        name: "logits".into(),
        element: Element::Float(DType::F32),
        shape: vec![batch, positions, Dim::Fixed(config.vocab_size)],
    }];
    let caches = |prefix, length| caches(model, options.dtype, prefix, [batch, length]);
    outputs.extend(caches("present", Dim::Symbolic("total_sequence")));
    let routers = router::router_margins(model);
    if options.emit_routing && !routers.is_empty() {
        outputs.push(emit_routing(&mut b, &routers));
    }
    let mut inputs = token_inputs(batch);
    inputs.extend(caches("past_key_values", Dim::Symbolic("past_sequence")));
    b.finish("skipgpt", inputs, outputs)
}

const SEQUENCE: Dim = Dim::Symbolic("sequence");

fn token_inputs(batch: Dim) -> Vec<Value> {
    let integers = |name: &str, tokens| {
        let shape = vec![batch, tokens];
        Value { name: name.into(), element: Element::Int64, shape }
    };
    vec![
        integers("input_ids", SEQUENCE),
        integers("attention_mask", Dim::Symbolic("total_sequence")),
        integers("position_ids", SEQUENCE),
    ]
}

/// The caches of every layer that has attention, under the layer's place in the checkpoint.
fn caches(model: &Model, dtype: DType, prefix: &str, [batch, length]: [Dim; 2]) -> Vec<Value> {
    let config = &model.config;
    let shape =
        vec![batch, Dim::Fixed(config.num_key_value_heads), length, Dim::Fixed(config.head_dim)];
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

/// The output `logits`, `[batch, positions, vocab]` in `f32`, of the normed stream `x` `[batch, positions,
/// hidden]`. The weight is the embedding itself where they are tied.
fn logits(b: &mut Builder, model: &Model, embedding: Option<&str>, x: &str) {
    let head = &model.head;
    let last = head.bias.is_none() && b.dtype == DType::F32;
    let name = if last { "logits" } else { "head" };
    let mut scores = if let Some(weight) = quantized(&head.weight) {
        b.matmul_bits(name, "head", x, weight, b.dtype)
    } else {
        let tied = embedding.filter(|_| head.weight == model.embedding).map(str::to_owned);
        let weight = tied.unwrap_or_else(|| b.weight("head.weight", &head.weight));
        b.matmul(name, x, &weight)
    };
    if let Some(bias) = &head.bias {
        let bias = b.weight("head.bias", bias);
        let sum = if b.dtype == DType::F32 { "logits" } else { "head.biased" };
        scores = b.op(sum, "Add", &[&scores, &bias]);
    }
    if b.dtype != DType::F32 {
        b.cast("logits", &scores, DType::F32);
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
    let axis = || vec![("axis", Attribute::Int(2))];
    let mut all = b.op_with("routing.columns", "Concat", &columns, axis());
    if routers.iter().any(|router| router.negatives) {
        let mut next = 0;
        let own = routers.iter().flat_map(|router| {
            let (first, own) = (next, router.modules.len());
            next += router.columns();
            (first..first + own).map(|column| column as i64)
        });
        let own = own.collect::<Vec<_>>();
        let own = b.ints("routing.own_columns", &own);
        all = b.op_with("routing.margins", "Gather", &[&all, &own], axis());
    }
    let modules_first = vec![("perm", Attribute::Ints(vec![2, 0, 1]))];
    b.op_with(ROUTING, "Transpose", &[&all], modules_first);
    let modules = routers.iter().map(|router| router.modules.len()).sum();
    Value {
        name: ROUTING.into(),
        element: Element::Float(DType::F32),
        shape: vec![Dim::Fixed(modules), b.batch(), SEQUENCE],
    }
}

#[cfg(test)]
mod tests;
