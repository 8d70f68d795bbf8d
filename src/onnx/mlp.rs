//! The MLP module: `down(silu(gate(norm(x))) · up(norm(x)))`.

use skipgpt_passes::ir::{Config, GateUp, Mlp, ModuleId};

use super::builder::{Builder, Name};
use super::routing::{self, Decision};

/// Adds the module to the residual stream `x` `[tokens, hidden]`.
pub(super) fn lower(
    b: &mut Builder,
    config: &Config,
    module: ModuleId,
    mlp: &Mlp,
    decision: Option<&Decision>,
    x: &str,
) -> Name {
    let name = module.to_string();
    let feed_forward = |b: &mut Builder, x: &str| {
        let normed = b.rms_norm(&format!("{name}.norm"), x, &mlp.norm, config.rms_norm_eps);
        let (gate, up) = match &mlp.gate_up {
            GateUp::Separate { gate, up } => (
                b.linear(&format!("{name}.gate"), &normed, gate, b.dtype),
                b.linear(&format!("{name}.up"), &normed, up, b.dtype),
            ),
            GateUp::Fused(linear) => {
                let both = b.linear(&format!("{name}.gate_up"), &normed, linear, b.dtype);
                let [gate, up] = b.split(&format!("{name}.gate_up"), &both, 1, ["gate", "up"]);
                (gate, up)
            }
        };
        let sigmoid = b.op(&format!("{name}.sigmoid"), "Sigmoid", &[&gate]);
        let silu = b.op(&format!("{name}.silu"), "Mul", &[&gate, &sigmoid]);
        let product = b.op(&format!("{name}.product"), "Mul", &[&silu, &up]);
        b.linear(&format!("{name}.down"), &product, &mlp.down, b.dtype)
    };
    routing::dispatch(
        b,
        decision,
        &name,
        config.hidden_size,
        x,
        |b| feed_forward(b, x),
        |b, rows| {
            let kept = rows.gather(b, &format!("{name}.rows"), x);
            feed_forward(b, &kept)
        },
    )
}
