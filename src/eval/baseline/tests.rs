#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::Device;
use skipgpt_passes::ir::ModuleKind;

use super::*;

fn id(layer: usize, kind: ModuleKind) -> ModuleId {
    ModuleId { layer, kind }
}

fn attention(layer: usize) -> ModuleId {
    id(layer, ModuleKind::Attention)
}

fn mlp(layer: usize) -> ModuleId {
    id(layer, ModuleKind::Mlp)
}

/// Four layers; the attention of each is more like the identity than its MLP, and layers 1 and 2 more
/// than 0 and 3.
fn similarities() -> Similarities {
    let layers = [(0, 0.5), (1, 0.9), (2, 0.9), (3, 0.6)].into();
    let modules = (0..4)
        .flat_map(|layer| {
            let middle = if layer == 1 || layer == 2 { 0.05 } else { 0.0 };
            [(attention(layer), 0.9 + middle), (mlp(layer), 0.7 + middle)]
        })
        .collect();
    Similarities { layers, modules, tokens: 8 }
}

#[test]
fn the_most_alike_go_first_and_the_earliest_of_equals() {
    let chosen = |unit, rate| similarities().choose(unit, rate).unwrap();
    assert_eq!(chosen(Unit::Blocks, 0.25), [attention(1), mlp(1)]);
    assert_eq!(chosen(Unit::Blocks, 0.5), [attention(1), mlp(1), attention(2), mlp(2)]);
    assert_eq!(chosen(Unit::Modules, 0.25), [attention(1), attention(2)]);
    assert_eq!(chosen(Unit::Modules, 0.375), [attention(0), attention(1), attention(2)]);
    let five = [attention(0), attention(1), mlp(1), attention(2), attention(3)];
    assert_eq!(chosen(Unit::Modules, 0.625), five);
}

#[test]
fn rates_that_remove_none_or_all_are_refused() {
    let refused = |unit, rate| similarities().choose(unit, rate).unwrap_err().to_string();
    for rate in [0.0, 1.0, f64::NAN] {
        let expected = format!("the skip rate is {rate}; it must be above 0 and below 1");
        assert_eq!(refused(Unit::Blocks, rate), expected);
    }
    assert_eq!(
        refused(Unit::Blocks, 0.1),
        "a skip rate of 0.1 removes 0 of 4 blocks; it must leave one and remove one"
    );
    assert_eq!(
        refused(Unit::Modules, 0.99),
        "a skip rate of 0.99 removes 8 of 8 modules; it must leave one and remove one"
    );
}

#[test]
fn cosines_are_summed_over_tokens() {
    let tensor = |rows: [[f32; 2]; 3]| Tensor::new(&rows, &Device::Cpu).unwrap();
    let before = tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0]]);
    let after = tensor([[0.0, 2.0], [6.0, 8.0], [-1.0, -1.0]]);
    assert!((cosines(&before, &after).unwrap() - (0.0 + 1.0 - 1.0)).abs() < 1e-6);
    let zero = tensor([[0.0, 0.0]; 3]);
    assert!(cosines(&before, &zero).unwrap().is_nan());
}
