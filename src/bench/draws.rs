//! Decisions that are drawn: from a seed, a module, a row and a position, and from nothing else, so
//! that they do not depend on who asks, or in which order; or once for all tokens.

use std::collections::BTreeSet;

use ndarray::Array3;
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use crate::decoder::{Input, Routing};
use crate::onnx::force;
use crate::random;

/// Draws that skip a share of decisions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draws {
    /// The same seed draws the same.
    pub seed: u64,
    /// Share that is skipped, 0 to 1.
    pub skip: f64,
    /// Whether all tokens skip the same modules, as in a static graph.
    pub fixed: bool,
}

impl Draws {
    /// The modules that every token skips, if they are drawn once: of each kind the share, rounded.
    pub fn skipped(&self, modules: &[ModuleId]) -> Option<BTreeSet<ModuleId>> {
        let of_kind = |kind| {
            let modules: Vec<_> = modules.iter().copied().filter(|m| m.kind == kind).collect();
            let count = (self.skip * modules.len() as f64).round() as usize;
            choose(&modules, count, self.seed)
        };
        self.fixed.then(|| {
            let [mut attention, mlp] = [ModuleKind::Attention, ModuleKind::Mlp].map(of_kind);
            attention.extend(mlp);
            attention
        })
    }

    /// Whether `module` skips the token of row `row` at `position`, where each token has its own draw.
    pub fn skips(&self, module: ModuleId, row: usize, position: i64) -> bool {
        let words = [number(module), row as u64, position as u64];
        // 53 bits: every share that f64 tells from 1 is reached, and 1 is never drawn.
        let uniform = (stir(self.seed, &words) >> 11) as f64 / (1_u64 << 53) as f64;
        uniform < self.skip
    }

    /// The decisions of `modules` on the new tokens of `input`.
    pub fn routing(&self, modules: &[ModuleId], input: &Input) -> Routing {
        let (rows, sequence) = input.ids.dim();
        let skipped = self.skipped(modules);
        let margin = |(m, b, s): (usize, usize, usize)| {
            let skips = match &skipped {
                Some(skipped) => skipped.contains(&modules[m]),
                None => self.skips(modules[m], b, input.positions[[b, s]]),
            };
            if skips { f32::NEG_INFINITY } else { f32::INFINITY }
        };
        let margins = Array3::from_shape_fn((modules.len(), rows, sequence), margin);
        Routing { modules: modules.to_vec(), margins }
    }
}

/// What a forced graph's input takes for `routing` to be its decisions. Modules that `routing` lacks keep every token.
pub(super) fn biases(input: &force::Input, routing: &Routing) -> Array3<f32> {
    let (_, rows, sequence) = routing.margins.dim();
    let places: Vec<Option<usize>> = input
        .modules
        .iter()
        .map(|module| routing.modules.iter().position(|other| other == module))
        .collect();
    input.biases((rows, sequence), |column, b, s| {
        places[column].is_some_and(|m| !routing.keeps(m, b, s))
    })
}

/// `count` of `modules`, drawn.
pub(super) fn choose(modules: &[ModuleId], count: usize, seed: u64) -> BTreeSet<ModuleId> {
    let mut drawn: Vec<_> =
        modules.iter().map(|module| (stir(seed, &[number(*module), u64::MAX]), *module)).collect();
    drawn.sort_unstable();
    drawn.into_iter().take(count).map(|(_, module)| module).collect()
}

/// A token id below `vocab`, drawn for a row and a position.
pub(super) fn token(seed: u64, row: usize, position: usize, vocab: usize) -> i64 {
    (stir(seed, &[u64::MAX, row as u64, position as u64]) % vocab.max(1) as u64) as i64
}

const fn number(module: ModuleId) -> u64 {
    2 * module.layer as u64 + matches!(module.kind, ModuleKind::Mlp) as u64
}

/// Stirs `words` into `seed`, one by one.
fn stir(seed: u64, words: &[u64]) -> u64 {
    let next = |word: u64| random::mix(word.wrapping_add(random::INCREMENT));
    words.iter().fold(next(seed), |state, word| next(state ^ next(*word)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::Logits;

    fn modules(layers: usize) -> Vec<ModuleId> {
        let kinds = [ModuleKind::Attention, ModuleKind::Mlp];
        (0..layers).flat_map(|layer| kinds.map(|kind| ModuleId { layer, kind })).collect()
    }

    fn draws(skip: f64) -> Draws {
        Draws { seed: 7, skip, fixed: false }
    }

    /// Over 4 rows and 100 positions of 20 modules: 8,000 draws.
    fn all(draws: Draws) -> Vec<bool> {
        let mut all = Vec::new();
        for module in modules(10) {
            for row in 0..4 {
                all.extend((0..100).map(|position| draws.skips(module, row, position)));
            }
        }
        all
    }

    #[test]
    fn the_share_is_the_one_asked_for() {
        let share = |skip| {
            let all = all(draws(skip));
            all.iter().filter(|skips| **skips).count() as f64 / all.len() as f64
        };
        assert_eq!((share(0.0), share(1.0)), (0.0, 1.0));
        for skip in [0.1, 0.25, 0.4, 0.6] {
            // Four standard deviations of 8,000 draws.
            let bound = 4.0 * (skip * (1.0 - skip) / 8000.0_f64).sqrt();
            assert!((share(skip) - skip).abs() < bound, "{skip}: {}", share(skip));
        }
    }

    /// Two draws that differ in one coordinate agree as often as independent ones do.
    #[test]
    fn tokens_rows_and_modules_are_drawn_apart() {
        let draws = draws(0.5);
        let agree = |other: &dyn Fn(ModuleId, usize, i64) -> bool| {
            let mut agreeing = 0;
            for module in modules(10) {
                for row in 0..4 {
                    for position in 0..100 {
                        let same =
                            draws.skips(module, row, position) == other(module, row, position);
                        agreeing += usize::from(same);
                    }
                }
            }
            f64::from(agreeing as u32) / 8000.0
        };
        let next = |m: ModuleId| ModuleId { layer: m.layer + 10, ..m };
        let other = |m: ModuleId| ModuleId {
            kind: match m.kind {
                ModuleKind::Attention => ModuleKind::Mlp,
                ModuleKind::Mlp => ModuleKind::Attention,
            },
            ..m
        };
        let shares = [
            agree(&|m, row, position| draws.skips(m, row, position + 100)),
            agree(&|m, row, position| draws.skips(m, row + 4, position)),
            agree(&|m, row, position| draws.skips(next(m), row, position)),
            agree(&|m, row, position| draws.skips(other(m), row, position)),
            agree(&|m, row, position| Draws { seed: 8, ..draws }.skips(m, row, position)),
        ];
        for share in shares {
            assert!((share - 0.5).abs() < 4.0 * 0.5 / 8000.0_f64.sqrt(), "{shares:?}");
        }
    }

    #[test]
    fn drawn_once_every_token_skips_the_same() {
        let modules = modules(10);
        let draws = Draws { fixed: true, ..draws(0.4) };
        let skipped = draws.skipped(&modules).unwrap_or_default();
        for kind in [ModuleKind::Attention, ModuleKind::Mlp] {
            assert_eq!(skipped.iter().filter(|module| module.kind == kind).count(), 4);
        }
        let input = Input::prompts(&[vec![1, 2, 3], vec![4, 5, 6]], Logits::Last);
        let routing = draws.routing(&modules, &input);
        for ((m, b, s), _) in routing.margins.indexed_iter() {
            assert_eq!(routing.keeps(m, b, s), !skipped.contains(&modules[m]));
        }
        assert_eq!(Draws { fixed: false, ..draws }.skipped(&modules), None);
    }

    #[test]
    fn biases_say_what_was_drawn() {
        let modules = modules(2);
        let input = Input::prompts(&[vec![1, 2, 3], vec![4, 5, 6]], Logits::Last);
        let routing = draws(0.5).routing(&modules, &input);
        let named = |modules: &[ModuleId], negatives| {
            let (name, modules) = ("forced.a".to_owned(), modules.to_vec());
            force::Input { name, modules, negatives }
        };
        for negatives in [false, true] {
            let biases = biases(&named(&[modules[3], modules[0]], negatives), &routing);
            assert_eq!(biases.dim(), (2, 3, if negatives { 4 } else { 2 }));
            for ((b, s, column), bias) in biases.indexed_iter() {
                let m = [3, 0][column % 2];
                let keeps = routing.keeps(m, b, s);
                assert_eq!(*bias >= 0.0, keeps == (column < 2), "{b}, {s}, {column}");
                assert_eq!(!keeps, draws(0.5).skips(modules[m], b, s as i64));
            }
        }
        let unknown = named(&self::modules(3)[5..], false);
        assert!(super::biases(&unknown, &routing).iter().all(|t| *t == f32::INFINITY));
    }

    #[test]
    fn choices_differ_by_seed_and_have_the_size_asked_for() {
        let modules = modules(10);
        let sets: BTreeSet<_> = (0..5).map(|seed| choose(&modules, 8, seed)).collect();
        assert_eq!(sets.len(), 5);
        assert!(sets.iter().all(|set| set.len() == 8));
        assert_eq!(choose(&modules, 20, 1), modules.iter().copied().collect());
        assert_eq!(choose(&modules, 0, 1), BTreeSet::new());
    }

    #[test]
    fn tokens_are_in_the_vocabulary() {
        let tokens: BTreeSet<i64> = (0..200).map(|position| token(0, 0, position, 10)).collect();
        assert_eq!(tokens, (0..10).collect());
    }
}
