//! One decoder layer: where its modules' decisions come from, and their order.

use candle_core::{Result, Tensor};
use skipgpt_passes::ir::{ModuleId, ModuleKind, Tap};

use super::attention::Attention;
use super::cache::Cache;
use super::mlp::Mlp;
use super::router::{Routing, Rows, Source};
use super::step::{Decide, Step};

/// An attention and an MLP module on a residual stream.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Its place in the checkpoint.
    pub index: usize,
    /// `None` once removed.
    pub attention: Option<Attention>,
    /// `None` once removed.
    pub mlp: Option<Mlp>,
}

/// What a module, or a whole layer, made of the residual stream in one step.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// The layer's place in the checkpoint.
    pub layer: usize,
    /// `None` for the layer as a whole.
    pub module: Option<ModuleKind>,
    /// The residual stream before it, `[rows, hidden]`.
    pub before: &'a Tensor,
    /// And after it.
    pub after: &'a Tensor,
}

/// Hears of every module in the order they run, and of a layer after its modules.
pub type Observer<'a> = dyn FnMut(Change<'_>) -> Result<()> + 'a;

/// What a routed module's router says in one step.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Which module.
    pub kind: ModuleKind,
    /// Keep score minus skip score, `[rows]`, `f32`.
    pub margins: Tensor,
    /// Where decisions are sampled: 0 or 1, `[rows, 1]`, with the gradient of the relaxation.
    pub keep: Option<Tensor>,
}

impl Layer {
    /// The residual stream `[rows, hidden]` after the layer; `decisions` receives those of its routed
    /// modules, attention first.
    pub fn forward(
        &self,
        x: &Tensor,
        step: &Step,
        cache: Option<&mut Cache>,
        decisions: &mut Vec<Decision>,
    ) -> Result<Tensor> {
        self.forward_observed(x, step, cache, decisions, &mut |_| Ok(()))
    }

    /// As [`Layer::forward`]; `observe` hears of every change.
    pub fn forward_observed(
        &self,
        x: &Tensor,
        step: &Step,
        cache: Option<&mut Cache>,
        decisions: &mut Vec<Decision>,
        observe: &mut Observer<'_>,
    ) -> Result<Tensor> {
        let mut routers = Routers { layer: self.index, step, layer_input: x, shared: None };
        let mut state = x.clone();
        let mut change = |module, before: &Tensor, after: &Tensor| {
            observe(Change { layer: self.index, module, before, after })
        };
        if let Some(attention) = &self.attention {
            let kind = ModuleKind::Attention;
            let rows = routers.rows(kind, &attention.routing, &state, decisions)?;
            let after = attention.forward(&state, &rows, step, cache)?;
            change(Some(kind), &state, &after)?;
            state = after;
        }
        if let Some(mlp) = &self.mlp {
            let kind = ModuleKind::Mlp;
            let rows = routers.rows(kind, &mlp.routing, &state, decisions)?;
            let after = mlp.forward(&state, &rows, step.kernels)?;
            change(Some(kind), &state, &after)?;
            state = after;
        }
        change(None, x, &state)?;
        Ok(state)
    }
}

/// The decisions of a layer in one step.
struct Routers<'a> {
    layer: usize,
    step: &'a Step,
    layer_input: &'a Tensor,
    /// Margins of the shared router, `[rows, decisions]`, once a module asked for them.
    shared: Option<Tensor>,
}

impl Routers<'_> {
    /// The rows a module runs for; its decision, if it is routed, goes to `decisions`.
    fn rows(
        &mut self,
        kind: ModuleKind,
        routing: &Routing,
        module_input: &Tensor,
        decisions: &mut Vec<Decision>,
    ) -> Result<Rows> {
        let Routing::Routed { source, dispatch } = routing else { return Ok(Rows::All) };
        if matches!(self.step.decide, Decide::Always) {
            return Ok(Rows::All);
        }
        let kernels = self.step.kernels;
        let own = match source {
            Source::Own { router, tap: Tap::LayerInput } => {
                router.margins(self.layer_input, kernels)?
            }
            Source::Own { router, tap: Tap::ModuleInput } => {
                router.margins(module_input, kernels)?
            }
            Source::Shared { router, slot } => {
                let shared = match &self.shared {
                    Some(shared) => shared,
                    None => self.shared.insert(router.margins(self.layer_input, kernels)?),
                };
                shared.narrow(1, *slot, 1)?
            }
        };
        let own = own.squeeze(1)?;
        let id = ModuleId { layer: self.layer, kind };
        let keep = self.step.sampled(id, &own)?;
        let rows = match &keep {
            Some(keep) => Rows::Sampled(keep.clone()),
            None => Rows::new(self.step.followed(id).unwrap_or(&own), *dispatch)?,
        };
        decisions.push(Decision { kind, margins: own, keep });
        Ok(rows)
    }
}
