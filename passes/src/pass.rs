//! What a pass is, and the driver that runs a list of them.
//!
//! The driver enforces three things no pass can forget: a pass runs only on the phase it takes, the
//! model is validated before the first pass and after each one, and, in debug builds, a pass that
//! says it changed nothing did change nothing (and the reverse).

use crate::ir::{Model, ModuleId, Phase};
use crate::plan::Plan;
use crate::validate::{Violations, validate};

/// Whether a pass rewrote anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// The printed IR differs.
    Yes,
    /// The printed IR is the same.
    No,
}

impl From<bool> for Changed {
    fn from(changed: bool) -> Self {
        if changed { Self::Yes } else { Self::No }
    }
}

/// One rewrite of a [`Model`].
pub trait Pass: Sync {
    /// Kebab-case, unique: the name on the command line, in logs and of dump files.
    fn name(&self) -> &'static str;

    /// What it does in one line, without a full stop: for help and documentation.
    fn summary(&self) -> &'static str;

    /// The phase the model must be in, and the one it is in afterwards.
    fn phases(&self) -> (Phase, Phase);

    /// Rewrites `model` as `plan` says. The driver changes [`Model::phase`], not the pass.
    ///
    /// # Errors
    ///
    /// [`Unsupported`] names the first construct that cannot be rewritten as planned; `model` is
    /// then unspecified and must be dropped.
    fn apply(&self, model: &mut Model, plan: &Plan) -> Result<Changed, Unsupported>;
}

/// What a valid model or plan may ask for and a pass does not do: the user's model or plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// The plan names a module the checkpoint does not have.
    #[error("the plan names {module}, and the checkpoint's {layers} layers are counted from 0")]
    NoSuchModule {
        /// What it names.
        module: ModuleId,
        /// `num_hidden_layers`.
        layers: usize,
    },
    /// The plan both removes a module and keeps it for every token.
    #[error("the plan has {module} both in `removed` and in `always`; take it out of one")]
    RemovedAndAlways {
        /// Which.
        module: ModuleId,
    },
    /// The plan keeps a module for every token that the model does not have any more.
    #[error("the plan has {module} in `always`, and the model was read without it")]
    AlwaysButAbsent {
        /// Which.
        module: ModuleId,
    },
    /// The plan removes every attention module.
    #[error(
        "the plan removes every attention module, and a decoder needs one cache; keep at least one"
    )]
    NoAttentionLeft,
    /// A layer's two routers are of different forms.
    #[error(
        "layers.{layer}: one router is linear and the other has two layers; they cannot be one \
         matrix, so export routers of one form"
    )]
    MixedRouters {
        /// The layer's index.
        layer: usize,
    },
    /// The plan quantises in blocks of a length that no operator takes.
    #[error("the plan quantises in blocks of {block}; a block has 16, 32, 64, 128 or 256 elements")]
    Block {
        /// The length.
        block: usize,
    },
    /// Of a layer's two routers, one has a bias and the other has none.
    #[error(
        "layers.{layer}: only one of the two routers has a bias on `{linear}`; they cannot be one \
         matrix, so give the other a bias of zeros"
    )]
    OneRouterBias {
        /// The layer's index.
        layer: usize,
        /// `hidden` or `output`.
        linear: &'static str,
    },
}

/// Why [`run`] stopped.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A pass was asked for out of order: the caller's bug.
    #[error("{pass} runs on {needs} models; this one is {got}")]
    OutOfOrder {
        /// The pass.
        pass: &'static str,
        /// The phase it takes.
        needs: Phase,
        /// The phase the model is in.
        got: Phase,
    },
    /// The model or the plan asks for what a pass does not do: the user's input.
    #[error("{pass} cannot rewrite this model")]
    Unsupported {
        /// The pass.
        pass: &'static str,
        /// What it does not do.
        source: Unsupported,
    },
    /// The model broke rules before the first pass: a bug in what built it.
    #[error("the model is not a valid {phase} model")]
    Invalid {
        /// The phase it claims.
        phase: Phase,
        /// The rules it breaks.
        source: Violations,
    },
    /// The validator refused the result: a bug in the pass.
    #[error("{pass} left an invalid {phase} model; this is a bug, please report it")]
    Broken {
        /// The pass.
        pass: &'static str,
        /// The phase it was to reach.
        phase: Phase,
        /// The rules its result breaks.
        source: Violations,
    },
    /// A pass said `Changed::No` and changed the model, or the reverse: a bug in the pass. Looked
    /// for in debug builds.
    #[error(
        "{pass} reported Changed::{reported:?}, which is not so; this is a bug, please report it"
    )]
    Misreported {
        /// The pass.
        pass: &'static str,
        /// What it said.
        reported: Changed,
    },
}

/// Runs `passes` in order, validating before the first and after each; `observe` sees the model
/// after every pass (for dumps and timing), in its new phase.
///
/// # Errors
///
/// The first [`Error`]; `model` is then unspecified and must be dropped.
pub fn run(
    passes: &[&dyn Pass],
    model: &mut Model,
    plan: &Plan,
    mut observe: impl FnMut(&dyn Pass, &Model),
) -> Result<(), Error> {
    let phase = model.phase;
    validate(model).map_err(|source| Error::Invalid { phase, source })?;
    for &pass in passes {
        let (needs, phase) = pass.phases();
        let (name, got) = (pass.name(), model.phase);
        if got != needs {
            return Err(Error::OutOfOrder { pass: name, needs, got });
        }
        let before = cfg!(debug_assertions).then(|| model.clone());
        let reported =
            pass.apply(model, plan).map_err(|source| Error::Unsupported { pass: name, source })?;
        if before.is_some_and(|before| Changed::from(before != *model) != reported) {
            return Err(Error::Misreported { pass: name, reported });
        }
        model.phase = phase;
        validate(model).map_err(|source| Error::Broken { pass: name, phase, source })?;
        observe(pass, model);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::PASSES;
    use crate::testing::{dense, model, plan};
    use expect_test::expect;
    use std::error::Error as _;

    /// A pass that does what a test needs.
    struct Fake(Phase, fn(&mut Model) -> Changed);

    impl Pass for Fake {
        fn name(&self) -> &'static str {
            "fake"
        }
        fn summary(&self) -> &'static str {
            "Do what a test needs"
        }
        fn phases(&self) -> (Phase, Phase) {
            (Phase::Imported, self.0)
        }
        fn apply(&self, model: &mut Model, _: &Plan) -> Result<Changed, Unsupported> {
            Ok((self.1)(model))
        }
    }

    fn run_fake(to: Phase, apply: fn(&mut Model) -> Changed) -> Result<(), Error> {
        run(&[&Fake(to, apply)], &mut model(1), &plan(), |_, _| {})
    }

    /// The error and its sources, one a line.
    fn chain(error: &Error) -> String {
        let source = error.source().map(|source| format!("\n{source}")).unwrap_or_default();
        format!("{error}{source}\n")
    }

    #[test]
    fn the_whole_table_runs_and_every_result_is_seen() {
        for mut model in [model(2), dense(2)] {
            let mut seen = Vec::new();
            run(PASSES, &mut model, &plan(), |pass, model| {
                seen.push(format!("{} {}", pass.name(), model.phase));
            })
            .unwrap();
            assert_eq!(
                seen,
                [
                    "merge-lora Merged",
                    "freeze-routers Frozen",
                    "prune-modules Frozen",
                    "fuse-projections Fused",
                    "quantize Fused",
                    "lower-routers Lowered"
                ]
            );
        }
    }

    #[test]
    fn every_pass_refuses_every_phase_but_its_own() {
        for start in 0..=PASSES.len() {
            let mut model = model(1);
            run(&PASSES[..start], &mut model, &plan(), |_, _| {}).unwrap();
            for pass in PASSES {
                let result = run(&[*pass], &mut model.clone(), &plan(), |_, _| {});
                let (needs, _) = pass.phases();
                if needs == model.phase {
                    assert_eq!(result, Ok(()));
                } else {
                    let got = model.phase;
                    assert_eq!(result, Err(Error::OutOfOrder { pass: pass.name(), needs, got }));
                }
            }
        }
    }

    #[test]
    fn an_invalid_model_is_not_blamed_on_the_first_pass() {
        let mut broken = model(1);
        broken.config.head_dim = 3;
        let error = run(&[], &mut broken, &plan(), |_, _| {}).unwrap_err();
        assert!(matches!(error, Error::Invalid { phase: Phase::Imported, .. }), "{error}");
    }

    #[test]
    fn a_broken_result_names_the_pass_and_its_rules() {
        let error = run_fake(Phase::Frozen, |_| Changed::No).unwrap_err();
        expect![[r"
            fake left an invalid Frozen model; this is a bug, please report it
            layers.0.attention.router: a sampled router outlived freeze-routers
            layers.0.mlp.router: a sampled router outlived freeze-routers
        "]]
        .assert_eq(&chain(&error));
    }

    #[cfg(debug_assertions)]
    #[test]
    fn a_false_report_is_an_error() {
        let silent = run_fake(Phase::Merged, |model| {
            model.layers[0].mlp = None;
            Changed::No
        });
        let reported = Changed::No;
        assert_eq!(silent, Err(Error::Misreported { pass: "fake", reported }));
        let idle = run_fake(Phase::Merged, |_| Changed::Yes);
        let reported = Changed::Yes;
        assert_eq!(idle, Err(Error::Misreported { pass: "fake", reported }));
        assert_eq!(run_fake(Phase::Merged, |_| Changed::No), Ok(()));
    }

    #[test]
    fn refusals_say_where_and_what_to_do() {
        let refusals = [
            Unsupported::RemovedAndAlways { module: crate::testing::mlp_id(3) },
            Unsupported::AlwaysButAbsent { module: crate::testing::attention_id(3) },
            Unsupported::NoAttentionLeft,
            Unsupported::MixedRouters { layer: 3 },
            Unsupported::OneRouterBias { layer: 3, linear: "hidden" },
            Unsupported::Block { block: 24 },
        ];
        let lines: Vec<_> = refusals.iter().map(|refusal| format!("{refusal}\n")).collect();
        expect![[r#"
            the plan has layers.3.mlp both in `removed` and in `always`; take it out of one
            the plan has layers.3.attention in `always`, and the model was read without it
            the plan removes every attention module, and a decoder needs one cache; keep at least one
            layers.3: one router is linear and the other has two layers; they cannot be one matrix, so export routers of one form
            layers.3: only one of the two routers has a bias on `hidden`; they cannot be one matrix, so give the other a bias of zeros
            the plan quantises in blocks of 24; a block has 16, 32, 64, 128 or 256 elements
        "#]].assert_eq(&lines.concat());
        let (pass, needs, got) = ("merge-lora", Phase::Imported, Phase::Merged);
        expect!["merge-lora runs on Imported models; this one is Merged"]
            .assert_eq(&Error::OutOfOrder { pass, needs, got }.to_string());
        let misreported = Error::Misreported { pass, reported: Changed::No };
        expect![
            "merge-lora reported Changed::No, which is not so; this is a bug, please report it"
        ]
        .assert_eq(&misreported.to_string());
    }

    #[test]
    fn what_a_pass_does_not_support_keeps_its_reason() {
        let mut plan = plan();
        plan.removed = vec![crate::testing::attention_id(7)];
        let error = run(&PASSES[..3], &mut model(2), &plan, |_, _| {}).unwrap_err();
        expect![[r"
            prune-modules cannot rewrite this model
            the plan names layers.7.attention, and the checkpoint's 2 layers are counted from 0
        "]]
        .assert_eq(&chain(&error));
    }
}
