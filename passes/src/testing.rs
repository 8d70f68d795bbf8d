//! Tiny models for the tests, and the one `check` that every pass test goes through.

use crate::ir::{
    Architecture, Attention, Config, DType, Dispatch, GateUp, KeyValue, Layer, Linear, Lora, Mlp,
    Model, ModuleId, ModuleKind, Phase, Policy, Rope, RopeScaling, Router, Routing, Source, Stored,
    Tap, Weight,
};
use crate::pass::{Error, Pass, Unsupported, run};
use crate::plan::Plan;
use crate::registry::PASSES;
use expect_test::Expect;

pub(crate) fn stored(name: &str, shape: &[usize]) -> Stored {
    Stored { name: name.to_owned(), shape: shape.to_vec(), dtype: DType::F32 }
}

pub(crate) fn weight(name: &str, shape: &[usize]) -> Weight {
    Weight::Stored(stored(name, shape))
}

pub(crate) fn linear(name: &str, shape: [usize; 2]) -> Linear {
    Linear { weight: weight(name, &shape), bias: None, lora: None }
}

pub(crate) fn biased(name: &str, shape: [usize; 2]) -> Linear {
    let bias = weight(&format!("{name}.bias"), &shape[..1]);
    Linear { bias: Some(bias), ..linear(name, shape) }
}

pub(crate) fn lora(name: &str, [rows, columns]: [usize; 2], rank: usize, scale: f64) -> Lora {
    Lora {
        down: stored(&format!("{name}.a"), &[rank, columns]),
        up: stored(&format!("{name}.b"), &[rows, rank]),
        scale,
    }
}

/// Attaches an adapter that fits.
pub(crate) fn adapt(linear: &mut Linear, name: &str, rank: usize, scale: f64) {
    let shape = [linear.out_features(), linear.in_features()];
    linear.lora = Some(lora(name, shape, rank, scale));
}

/// An Imported model of `layers` layers, both modules of each routed by a linear router on the
/// layer's input. Hidden size 8, two query heads on one key/value head, MLP width 12, 32 tokens.
pub(crate) fn model(layers: usize) -> Model {
    let config = Config {
        architecture: Architecture::Llama,
        hidden_size: 8,
        vocab_size: 32,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None },
        max_position_embeddings: 64,
        num_hidden_layers: layers,
    };
    Model {
        phase: Phase::Imported,
        config,
        embedding: weight("embed", &[32, 8]),
        layers: (0..layers).map(layer).collect(),
        norm: weight("norm", &[8]),
        head: linear("head", [32, 8]),
    }
}

fn layer(index: usize) -> Layer {
    let name = |part: &str| format!("{index}.{part}");
    let attention = Attention {
        norm: weight(&name("attention_norm"), &[8]),
        q: linear(&name("q"), [8, 8]),
        kv: KeyValue::Separate { k: linear(&name("k"), [4, 8]), v: linear(&name("v"), [4, 8]) },
        o: linear(&name("o"), [8, 8]),
        q_norm: None,
        k_norm: None,
        routing: routed(&name("router_attention")),
    };
    let mlp = Mlp {
        norm: weight(&name("mlp_norm"), &[8]),
        gate_up: GateUp::Separate {
            gate: linear(&name("gate"), [12, 8]),
            up: linear(&name("up"), [12, 8]),
        },
        down: linear(&name("down"), [8, 12]),
        routing: routed(&name("router_mlp")),
    };
    Layer { index, router: None, attention: Some(attention), mlp: Some(mlp) }
}

fn routed(name: &str) -> Routing {
    let router = Router {
        hidden: None,
        output: biased(name, [2, 8]),
        tap: Tap::LayerInput,
        policy: Policy::Sampled,
    };
    Routing::Routed { source: Source::Own(router), dispatch: None }
}

/// As [`model`], without routers.
pub(crate) fn dense(layers: usize) -> Model {
    let mut model = model(layers);
    for layer in 0..layers {
        attention(&mut model, layer).routing = Routing::Always;
        mlp(&mut model, layer).routing = Routing::Always;
    }
    model
}

/// Runs the table's passes on an Imported model until it is in `phase`.
pub(crate) fn at(phase: Phase, mut model: Model) -> Model {
    for pass in PASSES.iter().filter(|pass| pass.phases().1 <= phase) {
        run(&[*pass], &mut model, &plan(), |_, _| {}).expect("a valid test model");
    }
    model
}

/// One layer, everything fused.
pub(crate) fn fused() -> Model {
    at(Phase::Fused, model(1))
}

/// One layer, everything fused, one dispatch for all.
pub(crate) fn lowered(dispatch: Dispatch) -> Model {
    let plan = Plan { attention_dispatch: dispatch, mlp_dispatch: dispatch, ..plan() };
    let mut model = model(1);
    run(PASSES, &mut model, &plan, |_, _| {}).expect("a valid test model");
    model
}

/// Removes nothing, fuses everything, conditional.
pub(crate) fn plan() -> Plan {
    Plan {
        removed: Vec::new(),
        always: Vec::new(),
        fuse_key_value: true,
        fuse_gate_up: true,
        quantization: None,
        attention_dispatch: Dispatch::Conditional,
        mlp_dispatch: Dispatch::Conditional,
    }
}

pub(crate) fn attention(model: &mut Model, layer: usize) -> &mut Attention {
    model.layers[layer].attention.as_mut().expect("an attention module")
}

pub(crate) fn mlp(model: &mut Model, layer: usize) -> &mut Mlp {
    model.layers[layer].mlp.as_mut().expect("an MLP module")
}

pub(crate) fn attention_id(layer: usize) -> ModuleId {
    ModuleId { layer, kind: ModuleKind::Attention }
}

pub(crate) fn mlp_id(layer: usize) -> ModuleId {
    ModuleId { layer, kind: ModuleKind::Mlp }
}

/// Runs one pass through the driver and compares what it did to the text IR.
#[track_caller]
#[expect(clippy::needless_pass_by_value, reason = "a test's model and expectation are made for it")]
pub(crate) fn check(pass: &dyn Pass, model: Model, plan: &Plan, expected: Expect) {
    expected.assert_eq(&changes(pass, model, plan));
}

/// As [`check`], against the first `text` block of the pass's own header, so that the header and
/// the page made from it show what the pass does.
#[track_caller]
pub(crate) fn check_header(pass: &dyn Pass, model: Model, plan: &Plan, source: &str) {
    let actual = changes(pass, model, plan);
    let block: String = actual.lines().flat_map(|line| ["//! ", line, "\n"]).collect();
    assert!(
        source.contains(&format!("//! ```text\n{block}//! ```\n")),
        "the example in the header of {} should be:\n{block}",
        pass.name()
    );
}

/// The reason a pass gives for refusing a model.
#[track_caller]
pub(crate) fn refused(pass: &dyn Pass, mut model: Model, plan: &Plan) -> Unsupported {
    match run(&[pass], &mut model, plan, |_, _| {}) {
        Err(Error::Unsupported { source, .. }) => source,
        other => panic!("expected {} to refuse, got {other:?}", pass.name()),
    }
}

/// A line diff of the text IR around one pass: changed lines, and the heading each stands under.
/// The first line, with the phase, is left out: the driver's tests cover it.
fn changes(pass: &dyn Pass, mut model: Model, plan: &Plan) -> String {
    let before = model.to_string();
    run(&[pass], &mut model, plan, |_, _| {}).expect("the pass runs");
    let after = model.to_string();
    diff(&body(&before), &body(&after))
}

fn body(text: &str) -> Vec<&str> {
    text.lines().skip(1).collect()
}

fn diff(before: &[&str], after: &[&str]) -> String {
    // common[i][j]: length of the longest common subsequence of before[i..] and after[j..].
    let mut common = vec![vec![0; after.len() + 1]; before.len() + 1];
    for i in (0..before.len()).rev() {
        for j in (0..after.len()).rev() {
            common[i][j] = if before[i] == after[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut out, mut heading) = (0, 0, String::new(), None);
    while i < before.len() || j < after.len() {
        if i < before.len() && j < after.len() && before[i] == after[j] {
            if !before[i].starts_with(' ') {
                heading = Some(before[i]);
            }
            (i, j) = (i + 1, j + 1);
            continue;
        }
        let removed =
            j == after.len() || (i < before.len() && common[i + 1][j] >= common[i][j + 1]);
        let (sign, line) = if removed { ("- ", before[i]) } else { ("+ ", after[j]) };
        if let Some(heading) = heading.take().filter(|_| line.starts_with(' ')) {
            out.extend(["  ", heading, "\n"]);
        }
        out.extend([sign, line, "\n"]);
        if removed { i += 1 } else { j += 1 }
    }
    out
}

/// The value of an expression whose stored tensors hold numbers made from their names. A vector is
/// a matrix of one column.
pub(crate) fn evaluate(weight: &Weight) -> Vec<Vec<f64>> {
    match weight {
        Weight::Stored(stored) => fill(stored),
        Weight::Merged { base, lora } => {
            let (mut sum, up, down) = (evaluate(base), fill(&lora.up), fill(&lora.down));
            for (row, up) in sum.iter_mut().zip(&up) {
                for (column, value) in row.iter_mut().enumerate() {
                    let product = up.iter().zip(&down).map(|(up, down)| up * down[column]);
                    *value += lora.scale * product.sum::<f64>();
                }
            }
            sum
        }
        Weight::Concat(parts) => parts.iter().flat_map(evaluate).collect(),
        Weight::Slice { of, rows } => evaluate(of)[rows.clone()].to_vec(),
        Weight::BlockDiagonal(parts) => {
            let columns = weight.columns();
            let mut start = 0;
            let mut all = Vec::new();
            for part in parts {
                for row in evaluate(part) {
                    let mut padded = vec![0.0; columns];
                    padded[start..start + row.len()].copy_from_slice(&row);
                    all.push(padded);
                }
                start += part.columns();
            }
            all
        }
        Weight::Difference { of, minus } => {
            let minus = evaluate(minus);
            let rows = evaluate(of).into_iter().zip(minus);
            rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a - b).collect()).collect()
        }
        Weight::Transpose(of) => {
            let of = evaluate(of);
            (0..of[0].len()).map(|column| of.iter().map(|row| row[column]).collect()).collect()
        }
        Weight::Cast { of, .. } | Weight::Quantized { of, .. } => evaluate(of),
    }
}

/// Small integers, so that sums are exact in any order.
fn fill(stored: &Stored) -> Vec<Vec<f64>> {
    let mut state = stored
        .name
        .bytes()
        .fold(17_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte)));
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 24) - 128.0
    };
    let columns = stored.shape[1..].iter().product();
    (0..stored.shape[0]).map(|_| (0..columns).map(|_| next()).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::diff;

    #[test]
    fn a_diff_shows_changed_lines_under_their_headings() {
        let before = ["x", "a:", "  1", "  2", "b:", "  3", "c"];
        let after = ["x", "a:", "  1", "b:", "  4", "  3", "d"];
        assert_eq!(diff(&before, &after), "  a:\n-   2\n  b:\n+   4\n- c\n+ d\n");
        assert_eq!(diff(&before, &before), "");
    }
}
