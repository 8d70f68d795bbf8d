//! What is installed, what is missing, and what to type to get it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::device::Compute;
use crate::runtime::cuda::{self, Library};
use crate::runtime::locate::{How, Outcome, install_command};
use crate::runtime::{self, Found, Provider, Runtime, Search, Version, session};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Version of the tool.
    pub version: &'static str,
    /// ONNX Runtime, if any place had one that will do.
    pub onnxruntime: Option<Found>,
    /// Where ONNX Runtime was looked for in vain, in order.
    pub looked_at: Vec<Place>,
    /// Which providers start on this machine.
    pub providers: Vec<ProviderReport>,
    /// What the CUDA provider needs, and what of it is there; empty without ONNX Runtime.
    pub cuda: Vec<Library>,
    /// Whether this build trains, and runs checkpoints, on a GPU, and why not.
    pub device: DeviceReport,
    /// What is wrong; empty where `export`, `verify` and `generate` all work on the processor.
    pub problems: Vec<Problem>,
}

/// A place that was looked at in vain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The rule that led to it.
    pub how: How,
    /// The place; `None` where the rule names none.
    pub place: Option<PathBuf>,
    /// Why it did not do.
    pub reason: String,
}

/// A provider on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProviderReport {
    /// Which.
    pub provider: Provider,
    /// Whether it starts.
    pub works: bool,
    /// Why not.
    pub reason: Option<String>,
}

/// Candle on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceReport {
    /// Whether the GPU answers.
    pub works: bool,
    /// Why not.
    pub reason: Option<String>,
}

/// Something that is missing, and what to type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What is wrong.
    pub problem: String,
    /// The command that mends it, where one does.
    pub command: Option<String>,
}

/// Looks for everything; `flag` is the command line's `--onnxruntime`. What is missing is part of
/// the report, never an error.
pub fn examine(flag: Option<&Path>) -> Report {
    let outcome = Search::of_process(flag).run(Version::OLDEST);
    let runtime = outcome.found.clone().map(Runtime::load);
    Report::new(outcome, runtime)
}

impl Report {
    fn new(outcome: Outcome, runtime: Option<Result<Runtime, runtime::Error>>) -> Self {
        let looked_at = outcome
            .tried
            .into_iter()
            .map(|attempt| Place {
                how: attempt.how,
                place: attempt.place,
                reason: attempt.rejection.to_string(),
            })
            .collect();
        let (providers, problem) = match runtime {
            None => {
                let problem = format!("ONNX Runtime {} or later was not found", Version::OLDEST);
                (Vec::new(), Some((problem, Some(install_command(Provider::Cpu)))))
            }
            Some(Err(error)) => (Vec::new(), Some((error.to_string(), None))),
            Some(Ok(runtime)) => {
                let all = [Provider::Cpu, Provider::Cuda];
                (all.map(|provider| ProviderReport::new(&runtime, provider)).into(), None)
            }
        };
        let cuda = outcome.found.as_ref().map(|found| cuda::libraries(&found.path));
        let reason = Compute::Cuda.open().err().map(|error| error.to_string());
        let problems = problem.map(|(problem, command)| Problem { problem, command });
        Self {
            version: env!("CARGO_PKG_VERSION"),
            onnxruntime: outcome.found,
            looked_at,
            providers,
            cuda: cuda.unwrap_or_default(),
            device: DeviceReport { works: reason.is_none(), reason },
            problems: problems.into_iter().collect(),
        }
    }

    /// Whether everything that runs on the processor works.
    pub fn is_healthy(&self) -> bool {
        self.problems.is_empty()
    }
}

impl ProviderReport {
    fn new(runtime: &Runtime, provider: Provider) -> Self {
        let reason = match session::try_provider(runtime, provider) {
            Ok(()) => None,
            Err(session::Error::NoProvider { .. }) => {
                Some(format!("this ONNX Runtime has none; {}", install_command(provider)))
            }
            // ONNX Runtime's own messages have line breaks.
            Err(error) => Some(error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")),
        };
        Self { provider, works: reason.is_none(), reason }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "skipgpt-export {}", self.version)?;
        if let Some(found) = &self.onnxruntime {
            writeln!(f, "ONNX Runtime {}", found.version)?;
            writeln!(f, "  library    {}", found.path.display())?;
            writeln!(f, "  found by   {}", found.how)?;
            writeln!(f, "  providers  {}", found.providers.join(", "))?;
        }
        for ProviderReport { provider, reason, .. } in &self.providers {
            let state = reason.as_deref().unwrap_or("works");
            writeln!(f, "  {:<10} {state}", provider.to_string())?;
        }
        for library in &self.cuda {
            writeln!(f, "    {library}")?;
        }
        let state = self.device.reason.as_deref().unwrap_or("works");
        writeln!(f, "training and checkpoints on a GPU: {state}")?;
        if !self.looked_at.is_empty() {
            let before = if self.onnxruntime.is_some() { "before, " } else { "" };
            writeln!(f, "{before}looked for ONNX Runtime in vain at")?;
        }
        for Place { how, place, reason } in &self.looked_at {
            match place {
                Some(place) => writeln!(f, "  {how}: {}: {reason}", place.display())?,
                None => writeln!(f, "  {how}: {reason}")?,
            }
        }
        for Problem { problem, command } in &self.problems {
            writeln!(f, "missing: {problem}")?;
            if let Some(command) = command {
                writeln!(f, "  type: {command}")?;
            }
        }
        if self.is_healthy() { writeln!(f, "all is well") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::runtime::Rejection;
    use crate::runtime::locate::Attempt;

    fn attempt(how: How, place: Option<&str>, rejection: Rejection) -> Attempt {
        Attempt { how, place: place.map(PathBuf::from), rejection }
    }

    #[test]
    fn what_is_missing_comes_with_its_command() {
        let tried = vec![
            attempt(How::Flag, None, Rejection::NotGiven),
            attempt(How::Project, Some("/a/target/runtime"), Rejection::Missing),
            attempt(
                How::Python,
                Some("/usr/lib/libonnxruntime.so.1.14.0"),
                Rejection::TooOld { found: Version::new(1, 14, 0), minimum: Version::OLDEST },
            ),
        ];
        let report = Report::new(Outcome { found: None, tried }, None);
        assert!(!report.is_healthy());
        expect![[r"
            skipgpt-export 0.1.0
            training and checkpoints on a GPU: this build of skipgpt-export computes on the processor alone (its feature `cuda` is off); `make cuda` builds one that runs on a GPU, as target/cuda/release/skipgpt-export
            looked for ONNX Runtime in vain at
              --onnxruntime: not given
              target/runtime: /a/target/runtime: there is no such file or directory
              Python package: /usr/lib/libonnxruntime.so.1.14.0: it is ONNX Runtime 1.14.0; 1.22.0 or later is needed
            missing: ONNX Runtime 1.22.0 or later was not found
              type: pip install onnxruntime==1.31.1
        "]]
        .assert_eq(&report.to_string());
    }
}
