//! Processes that share a command.

use anyhow::{Result, bail};
use skipgpt_export::world::{self, Alone, World};

use super::{Command, Verdict, screen};

impl Command {
    /// Whether several processes can share it.
    const fn shared(&self) -> bool {
        matches!(self, Self::Train(_) | Self::Profile(_) | Self::Eval(_))
    }
}

/// Runs `command` among the processes it was started in: the first shows what there is to see, and of
/// those that fail one says why with `say`, before any may leave: a launcher ends all at once when the first
/// does, and a message on its way would be lost.
pub(crate) fn run(
    command: Command,
    say: impl FnOnce(&anyhow::Error),
    run: impl FnOnce(Command, &dyn World) -> Result<Verdict>,
) -> Result<Verdict> {
    if !command.shared() {
        if let Some(size) = world::launched().filter(|size| *size > 1) {
            bail!(
                "{size} processes were started for a command that runs in one; train, profile and eval can be shared"
            );
        }
        return run(command, &Alone);
    }
    let world = world::open()?;
    if !world.leads() {
        screen::silence();
    }
    let outcome = run(command, world.as_ref()).and_then(|verdict| {
        world.meet()?;
        Ok(verdict)
    });
    match outcome {
        Ok(verdict) => Ok(verdict),
        Err(error) => {
            if world.stop() {
                say(&error);
            }
            // Leaving the world, at the end of this function, waits for every process.
            Ok(Verdict::Stopped)
        }
    }
}
