//! Rules per phase. (skeleton)
use crate::ir::{Model, Phase};

/// Proof that a model obeys every rule of its phase.
#[derive(Debug, Clone, Copy)]
pub struct Validated<'a>(&'a Model);

impl<'a> Validated<'a> {
    /// The model.
    pub const fn model(self) -> &'a Model {
        self.0
    }

    /// How far it is lowered.
    pub const fn phase(self) -> Phase {
        self.0.phase
    }
}

/// Every rule a model breaks, each with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violations(pub Vec<String>);

/// Checks `model` against the rules of its phase.
pub fn validate(model: &Model) -> Result<Validated<'_>, Violations> {
    Ok(Validated(model))
}
