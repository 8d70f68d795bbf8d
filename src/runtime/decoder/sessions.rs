//! The sessions of one graph: one that takes every step, and perhaps one more for steps of one token.

use crate::decoder::Input;
use crate::runtime::Session;

/// The sessions a decoder runs.
#[derive(Debug)]
pub(super) struct Sessions {
    /// Takes every step, or is all there is.
    pub(super) any: Session,
    /// Takes steps of one token in one sequence.
    pub(super) one_token: Option<Session>,
    /// Whether it does.
    pub(super) takes_one_token: bool,
}

impl Sessions {
    /// The session that takes `input`.
    pub(super) fn of(&mut self, input: &Input) -> &mut Session {
        match &mut self.one_token {
            Some(session) if self.takes_one_token && input.ids.len() == 1 => session,
            _ => &mut self.any,
        }
    }
}

impl From<Session> for Sessions {
    fn from(any: Session) -> Self {
        Self { any, one_token: None, takes_one_token: true }
    }
}
