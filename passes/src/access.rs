//! Walking a [`Model`]: its modules, linears, weights and tensors, each with its path.
//!
//! A path is where the text IR prints the thing and what an error calls it: `embedding`,
//! `layers.3.mlp.down`, `layers.3.router.output`, `norm`, `head`.

use std::collections::BTreeMap;

use crate::ir::{
    Attention, GateUp, KeyValue, Layer, Linear, Lora, Mlp, Model, ModuleId, ModuleKind, Policy,
    Router, Routing, Source, Stored, Weight,
};

impl Model {
    /// The modules that are still there, in the order they run.
    pub fn modules(&self) -> impl Iterator<Item = ModuleId> {
        self.layers.iter().flat_map(Layer::modules)
    }

    /// The modules that skip tokens, in the order they run.
    pub fn routed_modules(&self) -> impl Iterator<Item = ModuleId> {
        self.modules().filter(|&id| self.routing(id).is_some_and(Routing::is_routed))
    }

    /// The layers that have a key/value cache: those whose attention module is still there.
    pub fn cached_layers(&self) -> impl Iterator<Item = usize> {
        self.layers.iter().filter(|layer| layer.attention.is_some()).map(|layer| layer.index)
    }

    /// The layer at `index` of the checkpoint; `None` once it is dropped.
    pub fn layer(&self, index: usize) -> Option<&Layer> {
        self.layers.iter().find(|layer| layer.index == index)
    }

    /// Which tokens a module runs for; `None` once the module is removed.
    pub fn routing(&self, id: ModuleId) -> Option<&Routing> {
        self.layer(id.layer)?.routing(id.kind)
    }

    /// Every linear with its path, routers included, in the order the text IR prints them.
    pub fn linears(&self) -> Vec<(String, &Linear)> {
        self.parts()
            .into_iter()
            .filter_map(|(path, part)| match part {
                Part::Linear(linear) => Some((path, linear)),
                Part::Weight(_) => None,
            })
            .collect()
    }

    /// Every linear, routers included, in the order the text IR prints them.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all: Vec<_> = self.layers.iter_mut().flat_map(Layer::linears_mut).collect();
        all.push(&mut self.head);
        all
    }

    /// Every weight with its path: embedding, norms, and the weights and biases of linears, whose
    /// paths end in `.weight` and `.bias`. Adapters are not weights until they are merged.
    pub fn weights(&self) -> Vec<(String, &Weight)> {
        let mut all = Vec::new();
        for (path, part) in self.parts() {
            match part {
                Part::Weight(weight) => all.push((path, weight)),
                Part::Linear(linear) => {
                    all.push((format!("{path}.weight"), &linear.weight));
                    all.extend(linear.bias.iter().map(|bias| (format!("{path}.bias"), bias)));
                }
            }
        }
        all
    }

    /// The checkpoint's tensors that are read, adapters included, each once, sorted by name.
    pub fn tensors(&self) -> Vec<&Stored> {
        let mut all = BTreeMap::new();
        for (_, part) in self.parts() {
            for stored in part.stored() {
                all.entry(stored.name.as_str()).or_insert(stored);
            }
        }
        all.into_values().collect()
    }

    /// Everything that holds a weight, with its path, in the order the text IR prints it.
    pub(crate) fn parts(&self) -> Vec<(String, Part<'_>)> {
        let mut all = vec![("embedding".to_owned(), Part::Weight(&self.embedding))];
        for layer in &self.layers {
            let index = layer.index;
            if let Some(router) = &layer.router {
                all.extend(named(format!("layers.{index}.router"), router.parts()));
            }
            if let Some(attention) = &layer.attention {
                all.extend(named(format!("layers.{index}.attention"), attention.parts()));
            }
            if let Some(mlp) = &layer.mlp {
                all.extend(named(format!("layers.{index}.mlp"), mlp.parts()));
            }
        }
        all.push(("norm".to_owned(), Part::Weight(&self.norm)));
        all.push(("head".to_owned(), Part::Linear(&self.head)));
        all
    }
}

/// Something that holds a weight.
#[derive(Clone, Copy)]
pub(crate) enum Part<'a> {
    Weight(&'a Weight),
    Linear(&'a Linear),
}

impl<'a> Part<'a> {
    pub(crate) fn stored(self) -> Vec<&'a Stored> {
        match self {
            Self::Weight(weight) => weight.stored(),
            Self::Linear(linear) => linear.stored(),
        }
    }
}

/// `attention` and `q` make `attention.q`.
fn named<'a>(
    prefix: String,
    parts: Vec<(&'static str, Part<'a>)>,
) -> impl Iterator<Item = (String, Part<'a>)> {
    parts.into_iter().map(move |(name, part)| (format!("{prefix}.{name}"), part))
}

impl Layer {
    /// The modules that are still there, in the order they run.
    pub fn modules(&self) -> impl Iterator<Item = ModuleId> {
        let attention = self.attention.iter().map(|_| ModuleKind::Attention);
        let kinds = attention.chain(self.mlp.iter().map(|_| ModuleKind::Mlp));
        kinds.map(|kind| ModuleId { layer: self.index, kind })
    }

    /// Which tokens a module runs for; `None` once the module is removed.
    pub fn routing(&self, kind: ModuleKind) -> Option<&Routing> {
        match kind {
            ModuleKind::Attention => self.attention.as_ref().map(|module| &module.routing),
            ModuleKind::Mlp => self.mlp.as_ref().map(|module| &module.routing),
        }
    }

    /// As [`Layer::routing`], to change it.
    pub fn routing_mut(&mut self, kind: ModuleKind) -> Option<&mut Routing> {
        match kind {
            ModuleKind::Attention => self.attention.as_mut().map(|module| &mut module.routing),
            ModuleKind::Mlp => self.mlp.as_mut().map(|module| &mut module.routing),
        }
    }

    /// Every linear of the layer, routers included.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = Vec::new();
        if let Some(router) = &mut self.router {
            all.extend(router.hidden.iter_mut().chain([&mut router.output]));
        }
        if let Some(Attention { q, kv, o, routing, .. }) = &mut self.attention {
            all.extend(routing.linears_mut());
            all.push(q);
            match kv {
                KeyValue::Separate { k, v } => all.extend([k, v]),
                KeyValue::Fused(kv) => all.push(kv),
            }
            all.push(o);
        }
        if let Some(Mlp { gate_up, down, routing, .. }) = &mut self.mlp {
            all.extend(routing.linears_mut());
            match gate_up {
                GateUp::Separate { gate, up } => all.extend([gate, up]),
                GateUp::Fused(gate_up) => all.push(gate_up),
            }
            all.push(down);
        }
        all
    }
}

impl Attention {
    /// What holds its weights, in printing order; names are path segments.
    pub(crate) fn parts(&self) -> Vec<(&'static str, Part<'_>)> {
        let mut all = self.routing.parts();
        all.push(("norm", Part::Weight(&self.norm)));
        all.push(("q", Part::Linear(&self.q)));
        match &self.kv {
            KeyValue::Separate { k, v } => {
                all.extend([("k", Part::Linear(k)), ("v", Part::Linear(v))]);
            }
            KeyValue::Fused(kv) => all.push(("kv", Part::Linear(kv))),
        }
        all.extend(self.q_norm.iter().map(|norm| ("q_norm", Part::Weight(norm))));
        all.extend(self.k_norm.iter().map(|norm| ("k_norm", Part::Weight(norm))));
        all.push(("o", Part::Linear(&self.o)));
        all
    }
}

impl Mlp {
    /// Width of the product of gate and up: the columns of `down`.
    pub fn intermediate_size(&self) -> usize {
        self.down.weight.columns()
    }

    /// What holds its weights, in printing order; names are path segments.
    pub(crate) fn parts(&self) -> Vec<(&'static str, Part<'_>)> {
        let mut all = self.routing.parts();
        all.push(("norm", Part::Weight(&self.norm)));
        match &self.gate_up {
            GateUp::Separate { gate, up } => {
                all.extend([("gate", Part::Linear(gate)), ("up", Part::Linear(up))]);
            }
            GateUp::Fused(gate_up) => all.push(("gate_up", Part::Linear(gate_up))),
        }
        all.push(("down", Part::Linear(&self.down)));
        all
    }
}

impl Routing {
    /// Whether a router decides; otherwise the module runs for every token.
    pub const fn is_routed(&self) -> bool {
        matches!(self, Self::Routed { .. })
    }

    /// The module's own router, if it has one.
    pub const fn own_router(&self) -> Option<&Router> {
        match self {
            Self::Routed { source: Source::Own(router), .. } => Some(router),
            _ => None,
        }
    }

    /// As [`Routing::own_router`], to change it.
    pub const fn own_router_mut(&mut self) -> Option<&mut Router> {
        match self {
            Self::Routed { source: Source::Own(router), .. } => Some(router),
            _ => None,
        }
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.own_router_mut()
            .into_iter()
            .flat_map(|router| router.hidden.iter_mut().chain([&mut router.output]))
    }

    fn parts(&self) -> Vec<(&'static str, Part<'_>)> {
        let Some(router) = self.own_router() else { return Vec::new() };
        let hidden = router.hidden.iter().map(|hidden| ("router.hidden", Part::Linear(hidden)));
        hidden.chain([("router.output", Part::Linear(&router.output))]).collect()
    }
}

impl Router {
    /// Whether it decides with noise.
    pub const fn is_sampled(&self) -> bool {
        matches!(self.policy, Policy::Sampled)
    }
}

impl crate::ir::SharedRouter {
    pub(crate) fn parts(&self) -> Vec<(&'static str, Part<'_>)> {
        let hidden = self.hidden.iter().map(|hidden| ("hidden", Part::Linear(hidden)));
        hidden.chain([("output", Part::Linear(&self.output))]).collect()
    }
}

impl Linear {
    /// Length of a row of its output.
    pub fn out_features(&self) -> usize {
        self.weight.rows()
    }

    /// Length of a row of its input.
    pub fn in_features(&self) -> usize {
        self.weight.columns()
    }

    /// Every stored tensor it reads: weight, adapter, bias.
    pub fn stored(&self) -> Vec<&Stored> {
        let mut all = self.weight.stored();
        all.extend(self.lora.iter().flat_map(|lora| [&lora.down, &lora.up]));
        all.extend(self.bias.iter().flat_map(Weight::stored));
        all
    }
}

impl Lora {
    /// Width of the adapter: rows of A.
    pub fn rank(&self) -> usize {
        self.down.shape.first().copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Dispatch;
    use crate::testing::{self, model};

    fn paths<T>(of: Vec<(String, T)>) -> Vec<String> {
        of.into_iter().map(|(path, _)| path).collect()
    }

    #[test]
    fn every_linear_is_reached_by_path_and_to_be_changed() {
        let mut own = model(1);
        let router = testing::mlp(&mut own, 0).routing.own_router_mut().unwrap();
        router.hidden = Some(testing::linear("hidden", [4, 8]));
        let mut shared = testing::fused();
        let router = shared.layers[0].router.as_mut().unwrap();
        router.hidden = Some(testing::linear("hidden", [4, 8]));
        for mut model in [own, shared] {
            assert!(model.linears().iter().any(|(path, _)| path.ends_with("router.hidden")));
            let expected: Vec<_> =
                model.linears().into_iter().map(|(_, linear)| linear.clone()).collect();
            let reached: Vec<_> = model.linears_mut().into_iter().map(|l| l.clone()).collect();
            assert_eq!(expected, reached);
        }
    }

    #[test]
    fn paths_are_those_of_the_text() {
        let mut model = model(1);
        testing::attention(&mut model, 0).q.bias = Some(testing::weight("0.q.bias", &[8]));
        assert_eq!(
            paths(model.linears()).join(" "),
            "layers.0.attention.router.output layers.0.attention.q layers.0.attention.k \
             layers.0.attention.v layers.0.attention.o layers.0.mlp.router.output \
             layers.0.mlp.gate layers.0.mlp.up layers.0.mlp.down head"
        );
        let weights = paths(model.weights());
        assert_eq!(weights[0], "embedding");
        assert!(weights.contains(&"layers.0.attention.q.bias".to_owned()));
        assert!(weights.contains(&"layers.0.attention.norm".to_owned()));
        assert_eq!(weights[weights.len() - 2..], ["norm", "head.weight"]);
    }

    #[test]
    fn tensors_are_listed_once_adapters_included() {
        let mut model = model(1);
        model.head.weight = model.embedding.clone();
        testing::adapt(&mut testing::attention(&mut model, 0).q, "0.q", 2, 2.0);
        let names: Vec<_> = model.tensors().into_iter().map(|stored| stored.name.clone()).collect();
        assert_eq!(names.iter().filter(|name| *name == "embed").count(), 1);
        assert!(names.contains(&"0.q.a".to_owned()) && names.contains(&"0.q.b".to_owned()));
        assert!(names.is_sorted());
    }

    #[test]
    fn modules_layers_and_routing_follow_what_is_left() {
        let mut model = model(3);
        model.layers[0].mlp = None;
        model.layers[1].attention = None;
        testing::mlp(&mut model, 2).routing = Routing::Always;
        let text = |ids: Vec<ModuleId>| -> Vec<String> {
            ids.into_iter().map(|id| id.to_string()).collect()
        };
        assert_eq!(
            text(model.modules().collect()),
            ["layers.0.attention", "layers.1.mlp", "layers.2.attention", "layers.2.mlp"]
        );
        assert_eq!(
            text(model.routed_modules().collect()),
            ["layers.0.attention", "layers.1.mlp", "layers.2.attention"]
        );
        assert_eq!(model.cached_layers().collect::<Vec<_>>(), [0, 2]);
        model.layers.remove(0);
        assert_eq!(model.layer(1).map(|layer| layer.index), Some(1));
        assert!(model.layer(0).is_none());
        let gone = ModuleId { layer: 0, kind: ModuleKind::Attention };
        assert!(model.routing(gone).is_none());
        assert!(
            testing::fused().layers[0].routing(ModuleKind::Mlp).unwrap().own_router().is_none()
        );
        assert!(matches!(
            testing::lowered(Dispatch::Gathered).layers[0].routing(ModuleKind::Mlp),
            Some(Routing::Routed { dispatch: Some(Dispatch::Gathered), .. })
        ));
    }
}
