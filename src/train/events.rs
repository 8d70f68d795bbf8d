//! TensorBoard's event files: the lines of `metrics.jsonl` as scalars.
//!
//! A run has one file, in `tensorboard/`. A run that is resumed writes it anew from the lines it keeps,
//! and begins it with the mark by which a TensorBoard that watches forgets what it has read: no step is
//! there twice, whatever came after the checkpoint.

#[cfg(not(feature = "tensorboard"))]
pub(super) use unwritten::Events;
#[cfg(feature = "tensorboard")]
pub(super) use written::Events;

/// The files' directory, in the run's.
#[cfg(feature = "tensorboard")]
const DIRECTORY: &str = "tensorboard";

/// Whether this build writes them.
pub const AVAILABLE: bool = cfg!(feature = "tensorboard");

#[cfg(not(feature = "tensorboard"))]
mod unwritten {
    use std::path::Path;

    use crate::train::Error;
    use crate::train::metrics::Metrics;

    /// There are none.
    #[derive(Debug)]
    pub(in crate::train) enum Events {}

    impl Events {
        pub(in crate::train) fn begin(_: &Path) -> Result<Self, Error> {
            Err(Error::NoTensorBoard)
        }

        pub(in crate::train) fn add(&mut self, _: &Metrics) -> Result<(), Error> {
            match *self {}
        }
    }
}

#[cfg(feature = "tensorboard")]
mod written {
    use std::fmt;
    use std::fs::{self, File};
    use std::io::{self, BufWriter};
    use std::path::{Path, PathBuf};
    use std::time::{SystemTime, UNIX_EPOCH};

    use tboard::EventWriter;
    use tboard::tensorboard::event::What;
    use tboard::tensorboard::session_log::SessionStatus;
    use tboard::tensorboard::summary::{Value, value};
    use tboard::tensorboard::{SessionLog, Summary};

    use super::DIRECTORY;
    use crate::artifact;
    use crate::train::Error;
    use crate::train::metrics::{Evaluation, Metrics};

    /// How TensorBoard knows its files.
    const PREFIX: &str = "events.out.tfevents.";

    /// The file of a run, being appended to.
    pub(in crate::train) struct Events {
        path: PathBuf,
        writer: EventWriter<BufWriter<File>>,
    }

    impl fmt::Debug for Events {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{}", self.path.display())
        }
    }

    impl Events {
        /// Begins the file of the run in `output`, in place of earlier ones.
        pub(in crate::train) fn begin(output: &Path) -> Result<Self, Error> {
            let directory = output.join(DIRECTORY);
            let failed = |action, source| artifact::Error::io(action, &directory, source);
            fs::create_dir_all(&directory).map_err(|source| failed("create", source))?;
            for entry in fs::read_dir(&directory).map_err(|source| failed("list", source))? {
                let entry = entry.map_err(|source| failed("list", source))?;
                if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                    fs::remove_file(entry.path()).map_err(|source| failed("replace", source))?;
                }
            }
            let seconds =
                SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            // TensorBoard reads files in the order of their names.
            let path = directory.join(format!("{PREFIX}{seconds:010}.skipgpt-export"));
            let failed = |source| artifact::Error::io("create", &path, source);
            let file = File::create_new(&path).map_err(failed)?;
            let writer = EventWriter::from_writer(BufWriter::new(file), None)
                .map_err(|error| failed(io::Error::other(error)))?;
            let mut events = Self { path, writer };
            let status = SessionStatus::Start.into();
            let start = SessionLog { status, ..SessionLog::default() };
            events.send(0, What::SessionLog(start))?;
            Ok(events)
        }

        /// Adds a line's numbers.
        pub(in crate::train) fn add(&mut self, metrics: &Metrics) -> Result<(), Error> {
            let scalars = match metrics {
                Metrics::Step(step) => vec![
                    ("train/loss", Some(step.loss)),
                    ("train/prediction", Some(step.prediction)),
                    ("train/keep", step.keep),
                    ("train/target", step.target),
                    ("train/tau", step.tau),
                    ("train/rate", Some(step.rate)),
                    ("train/gradient_norm", Some(step.gradient_norm)),
                    ("train/tokens_per_second", Some(step.tokens_per_second)),
                ],
                Metrics::Evaluation(Evaluation {
                    perplexity, skipped, skipped_weights, ..
                }) => {
                    vec![
                        ("evaluation/perplexity", Some(*perplexity)),
                        ("evaluation/skipped", *skipped),
                        ("evaluation/skipped_weights", *skipped_weights),
                    ]
                }
                Metrics::Dense(Evaluation { perplexity, .. }) => {
                    vec![("evaluation/dense_perplexity", Some(*perplexity))]
                }
            };
            let scalar = |(tag, number): (&str, Option<f64>)| {
                let value = Some(value::Value::SimpleValue(number? as f32));
                Some(Value { tag: tag.to_owned(), value, ..Value::default() })
            };
            let value = scalars.into_iter().filter_map(scalar).collect();
            self.send(metrics.step(), What::Summary(Summary { value }))
        }

        fn send(&mut self, step: u64, what: What) -> Result<(), Error> {
            let sent = self.writer.write(step as i64, what).and_then(|()| self.writer.flush());
            sent.map_err(|error| {
                artifact::Error::io("write", &self.path, io::Error::other(error)).into()
            })
        }
    }

    #[cfg(test)]
    mod tests {
        #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

        use tboard::SummaryReader;
        use tempfile::TempDir;

        use super::*;
        use crate::train::metrics::{Log, Step};

        fn step(step: u64, loss: f64) -> Metrics {
            Metrics::Step(Step {
                step,
                loss,
                prediction: 2.5,
                keep: Some(0.75),
                target: None,
                tau: None,
                rate: 0.125,
                gradient_norm: 3.0,
                tokens: 64 * step,
                tokens_per_second: 100.0,
            })
        }

        /// What the one file of a run holds, checksums compared: (step, tag, value).
        fn scalars(output: &Path) -> Vec<(i64, String, f32)> {
            let files: Vec<_> = fs::read_dir(output.join(DIRECTORY)).unwrap().collect();
            assert_eq!(files.len(), 1);
            let path = files[0].as_ref().unwrap().path();
            let mut events = SummaryReader::new(File::open(path).unwrap()).map(Result::unwrap);
            let version = What::FileVersion("brain.Event:2".to_owned());
            assert_eq!(events.next().unwrap().what, Some(version));
            let Some(What::SessionLog(start)) = events.next().unwrap().what else {
                panic!("no session begins")
            };
            assert_eq!(start.status, SessionStatus::Start as i32);
            events
                .flat_map(|event| {
                    assert!(event.wall_time > 1e9);
                    let Some(What::Summary(summary)) = event.what else { panic!("no summary") };
                    summary.value.into_iter().map(move |value| {
                        let Some(value::Value::SimpleValue(number)) = value.value else {
                            panic!("no number")
                        };
                        (event.step, value.tag, number)
                    })
                })
                .collect()
        }

        #[test]
        fn the_lines_of_a_run_are_its_scalars_and_come_once() {
            let directory = TempDir::new().unwrap();
            let output = directory.path();
            let evaluation = Evaluation {
                step: 2,
                perplexity: 40.0,
                skipped: Some(0.25),
                skipped_weights: Some(0.125),
                windows: 3,
            };
            let mut log = Log::open(output, 0, true).unwrap();
            for line in [step(1, 8.0), step(2, 4.0), Metrics::Evaluation(evaluation), step(3, 9.0)]
            {
                log.write(&line).unwrap();
            }
            let found = scalars(output);
            let first: Vec<_> =
                found[..6].iter().map(|(_, tag, value)| (&tag[..], *value)).collect();
            let expected = [
                ("train/loss", 8.0),
                ("train/prediction", 2.5),
                ("train/keep", 0.75),
                ("train/rate", 0.125),
                ("train/gradient_norm", 3.0),
                ("train/tokens_per_second", 100.0),
            ];
            assert_eq!(first, expected);
            assert_eq!(
                found[12..15],
                [
                    (2, "evaluation/perplexity".to_owned(), 40.0),
                    (2, "evaluation/skipped".to_owned(), 0.25),
                    (2, "evaluation/skipped_weights".to_owned(), 0.125)
                ]
            );
            assert_eq!(found.len(), 21);
            // The third step came after the checkpoint; it is done again.
            drop(log);
            let mut log = Log::open(output, 2, true).unwrap();
            log.write(&step(3, 2.0)).unwrap();
            let losses: Vec<_> = scalars(output)
                .into_iter()
                .filter(|(_, tag, _)| tag == "train/loss")
                .map(|(step, _, value)| (step, value))
                .collect();
            assert_eq!(losses, [(1, 8.0), (2, 4.0), (3, 2.0)]);
        }
    }
}
