#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use skipgpt_passes::ir::{Architecture, Rope, RopeScaling};

use super::*;
use crate::eval::tests::Successor;
use crate::world::{Alone, threads};

pub(super) fn config(layers: usize) -> Config {
    Config {
        architecture: Architecture::Llama,
        hidden_size: 8,
        vocab_size: 4,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None },
        max_position_embeddings: 64,
        num_hidden_layers: layers,
    }
}

/// Attention of layer 0 runs at positions 0, 1, 3 and 4, the MLP of layer 2 at position 0 alone.
pub(super) fn profile() -> Profile {
    let mut decoder = Successor::new(
        |module, position| if module == 0 { position % 3 != 2 } else { position == 0 },
    );
    let options = Options { window: 6, stride: None, limit: Some(2) };
    let mut seen = Vec::new();
    let tokens = [0, 1, 2, 3].repeat(5);
    let profile = measure(&mut decoder, &config(3), &tokens, options, &Alone, |done, all| {
        seen.push((done, all));
    });
    assert_eq!(seen, [(1, 2), (2, 2)]);
    profile.unwrap()
}

const ATTENTION: ModuleId = ModuleId { layer: 0, kind: ModuleKind::Attention };
const MLP: ModuleId = ModuleId { layer: 2, kind: ModuleKind::Mlp };

#[test]
fn rates_are_per_module_and_range_of_positions() {
    let profile = profile();
    assert_eq!((profile.version, profile.tokens, profile.window), (1, 12, 6));
    let ranges: Vec<_> = profile.positions.iter().map(|p| (p.from, p.to, p.tokens)).collect();
    assert_eq!(ranges, [(0, 1, 2), (1, 2, 2), (2, 4, 4), (4, 6, 4)]);
    let third = 1.0 / 6.0;
    assert_eq!(
        profile.modules,
        [
            Module { module: ATTENTION, keep: 4.0 / 6.0, by_position: vec![1.0, 1.0, 0.5, 0.5] },
            Module { module: MLP, keep: third, by_position: vec![1.0, 0.0, 0.0, 0.0] },
        ]
    );
    assert_eq!(profile.keep(ModuleKind::Attention), Some(4.0 / 6.0));
    assert_eq!(profile.skipped.attention, Some(4.0 / 12.0));
    assert_eq!(profile.skipped.all, Some(14.0 / 24.0));
}

#[test]
fn thresholds_select_at_or_beyond_them() {
    let profile = profile();
    let (rare, often) = (1.0 / 6.0, 4.0 / 6.0);
    let selected = |below, above| {
        let selection = profile.plan(&config(3), below, above).unwrap();
        (selection.removed, selection.always)
    };
    assert_eq!(selected(None, None), (vec![], vec![]));
    assert_eq!(selected(Some(rare), Some(often)), (vec![MLP], vec![ATTENTION]));
    assert_eq!(selected(Some(rare - 1e-9), Some(often + 1e-9)), (vec![], vec![]));
    assert_eq!(selected(Some(0.9), None), (vec![ATTENTION, MLP], vec![]));
    assert_eq!(selected(None, Some(0.0)), (vec![], vec![ATTENTION, MLP]));
}

#[test]
fn senseless_thresholds_and_other_models_are_refused() {
    let profile = profile();
    let refused =
        |config: &Config, below, above| profile.plan(config, below, above).unwrap_err().to_string();
    let own = config(3);
    assert_eq!(refused(&own, Some(1.5), None), "--prune-below is 1.5; it must be 0 to 1");
    assert_eq!(refused(&own, None, Some(f64::NAN)), "--always-above is NaN; it must be 0 to 1");
    assert_eq!(
        refused(&own, Some(0.5), Some(0.5)),
        "--prune-below 0.5 is not under --always-above 0.5"
    );
    assert_eq!(
        refused(&config(4), None, None),
        "the profile was measured on a model with num_hidden_layers 3; this one has 4: measure it again on this model"
    );
}

#[test]
fn a_decoder_without_decisions_is_refused() {
    let options = Options { window: 4, stride: None, limit: None };
    let mut decoder = Successor { reports: false, ..Successor::new(|_, _| true) };
    let error =
        measure(&mut decoder, &config(3), &[0, 1, 2, 3], options, &Alone, |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::NoRouting), "{error}");
}

#[test]
fn ranks_that_share_the_windows_count_what_one_counts() {
    let tokens = [0, 1, 2, 3].repeat(8);
    let run = |world: &dyn World| {
        let mut decoder = Successor::new(|module, position| (module + position) % 3 != 2);
        let options = Options { window: 6, stride: None, limit: None };
        measure(&mut decoder, &config(3), &tokens, options, world, |_, _| {}).unwrap()
    };
    let alone = run(&Alone);
    for size in [2, 7] {
        assert_eq!(threads::run(size, |world| run(world)), vec![alone.clone(); size]);
    }
}
