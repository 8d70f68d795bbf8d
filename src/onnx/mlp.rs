//! The MLP module: `down(silu(gate(norm(x))) · up(norm(x)))`.

use skipgpt_passes::ir::{Config, GateUp, Mlp, ModuleId};

use super::builder::{Builder, Name};
use super::dispatch;
use super::router::Decision;
use super::stream::Stream;

/// Adds the module to the residual stream.
pub(super) fn lower(
    b: &mut Builder,
    config: &Config,
    module: ModuleId,
    mlp: &Mlp,
    decision: Option<&Decision>,
    stream: Stream,
) -> Stream {
    let name = module.to_string();
    let (norm, eps) = (format!("{name}.norm"), config.rms_norm_eps);
    match decision.filter(|decision| decision.gathers()) {
        None => {
            let (normed, x) = stream.norm(b, &norm, &mlp.norm, eps);
            let change = feed_forward(b, &name, mlp, &normed);
            dispatch::whole(b, decision, &name, x, change)
        }
        Some(decision) => {
            let x = stream.value(b);
            dispatch::kept_rows(b, decision, config.hidden_size, &x, |b, rows| {
                let normed = b.rms_norm(&norm, rows, &mlp.norm, eps);
                feed_forward(b, &name, mlp, &normed)
            })
        }
    }
}

/// `[…, hidden]` to `[…, hidden]`.
fn feed_forward(b: &mut Builder, name: &str, mlp: &Mlp, x: &str) -> Name {
    let (gate, up) = match &mlp.gate_up {
        GateUp::Separate { gate, up } => (
            b.linear(&format!("{name}.gate"), x, gate, b.dtype),
            b.linear(&format!("{name}.up"), x, up, b.dtype),
        ),
        GateUp::Fused(linear) => {
            let both = b.linear(&format!("{name}.gate_up"), x, linear, b.dtype);
            let [gate, up] = b.split(&format!("{name}.gate_up"), &both, ["gate", "up"]);
            (gate, up)
        }
    };
    let sigmoid = b.op(&format!("{name}.sigmoid"), "Sigmoid", &[&gate]);
    let silu = b.op(&format!("{name}.silu"), "Mul", &[&gate, &sigmoid]);
    let product = b.op(&format!("{name}.product"), "Mul", &[&silu, &up]);
    b.linear(&format!("{name}.down"), &product, &mlp.down, b.dtype)
}
