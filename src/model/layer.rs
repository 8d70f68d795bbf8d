//! One decoder layer: where its modules' decisions come from, and their order.

use candle_core::{Result, Tensor};
use skipgpt_passes::ir::{ModuleId, ModuleKind, Tap};

use super::attention::Attention;
use super::cache::Cache;
use super::mlp::Mlp;
use super::router::{Routing, Rows, Source};
use super::step::Step;

/// An attention and an MLP module on a residual stream.
#[derive(Debug)]
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

/// A routed module's margins in one step: keep score minus skip score, `[rows]`, `f32`.
pub type Margins = (ModuleKind, Tensor);

impl Layer {
    /// The residual stream `[rows, hidden]` after the layer; `margins` receives those of its routed
    /// modules, attention first.
    pub fn forward(
        &self,
        x: &Tensor,
        step: &Step,
        cache: Option<&mut Cache>,
        margins: &mut Vec<Margins>,
    ) -> Result<Tensor> {
        self.forward_observed(x, step, cache, margins, &mut |_| Ok(()))
    }

    /// As [`Layer::forward`]; `observe` hears of every change.
    pub fn forward_observed(
        &self,
        x: &Tensor,
        step: &Step,
        cache: Option<&mut Cache>,
        margins: &mut Vec<Margins>,
        observe: &mut Observer<'_>,
    ) -> Result<Tensor> {
        let mut routers = Routers { layer: self.index, step, layer_input: x, shared: None };
        let mut state = x.clone();
        let mut change = |module, before: &Tensor, after: &Tensor| {
            observe(Change { layer: self.index, module, before, after })
        };
        if let Some(attention) = &self.attention {
            let kind = ModuleKind::Attention;
            let rows = routers.rows(kind, &attention.routing, &state, margins)?;
            let after = attention.forward(&state, &rows, step, cache)?;
            change(Some(kind), &state, &after)?;
            state = after;
        }
        if let Some(mlp) = &self.mlp {
            let kind = ModuleKind::Mlp;
            let rows = routers.rows(kind, &mlp.routing, &state, margins)?;
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
    /// The rows a module runs for; its margins, if it is routed, go to `margins`.
    fn rows(
        &mut self,
        kind: ModuleKind,
        routing: &Routing,
        module_input: &Tensor,
        margins: &mut Vec<Margins>,
    ) -> Result<Rows> {
        let Routing::Routed { source, dispatch } = routing else { return Ok(Rows::All) };
        let own = match source {
            Source::Own { router, tap: Tap::LayerInput } => router.margins(self.layer_input)?,
            Source::Own { router, tap: Tap::ModuleInput } => router.margins(module_input)?,
            Source::Shared { router, slot } => {
                let shared = match &self.shared {
                    Some(shared) => shared,
                    None => self.shared.insert(router.margins(self.layer_input)?),
                };
                shared.narrow(1, *slot, 1)?
            }
        };
        let own = own.squeeze(1)?;
        let followed = self.step.followed(ModuleId { layer: self.layer, kind });
        let rows = Rows::new(followed.unwrap_or(&own), *dispatch)?;
        margins.push((kind, own));
        Ok(rows)
    }
}
