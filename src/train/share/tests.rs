//! Ranks that share a step's windows, against one that does them all.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use candle_core::Device;
use tempfile::TempDir;

use super::*;
use crate::device::Compute;
use crate::text::Tokenizer;
use crate::train::data::FIELD;
use crate::train::optimizer;
use crate::train::schedule::{Rate, Shape};
use crate::train::settings::{Base, Lora, Settings, Stage, Target};
use crate::train::tests::{checkpoint, router_settings};
use crate::train::{Event, Options, Outcome, Request, metrics, run};
use crate::world::{Alone, threads};

/// Of values and losses after a few steps, in which sums were ordered otherwise.
const TOLERANCE: f32 = 2e-5;

fn settings(stage: Stage, batch: usize, accumulate: usize) -> Settings {
    Settings {
        stage,
        steps: 4,
        batch,
        accumulate,
        window: 16,
        pad: false,
        seed: 5,
        rate: Rate { peak: 2e-3, shape: Shape::Constant, warm_up: 0.0 },
        optimizer: optimizer::Settings { weight_decay: 0.01, clip: Some(1.0) },
        base: Base::F32,
        distill: false,
        hold_out: Some(0.1),
    }
}

fn lora() -> Stage {
    let targets = vec![Target::Q, Target::O, Target::Gate, Target::Down];
    Stage::Lora(Lora { rank: 3, alpha: 6.0, dropout: 0.2, targets })
}

struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { directory: TempDir::new().unwrap() };
        for (name, seed) in [("text.txt", 1_u32), ("other.txt", 2)] {
            let words = (0..300).map(|at| format!("{} ", (at * at * 31 + at * seed) % 997));
            fs::write(place.path(name), words.collect::<String>()).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn train(
        &self,
        world: &dyn World,
        settings: &Settings,
        paths: (&str, &str),
        resume: bool,
    ) -> Result<Outcome, Error> {
        self.train_on(Compute::Cpu, world, settings, paths, resume)
    }

    fn train_on(
        &self,
        device: Compute,
        world: &dyn World,
        settings: &Settings,
        (text, output): (&str, &str),
        resume: bool,
    ) -> Result<Outcome, Error> {
        let checkpoint = checkpoint(matches!(settings.stage, Stage::Lora(_)));
        let tokenizer = Tokenizer::open(&checkpoint.directory).unwrap();
        let request = Request {
            checkpoint: &checkpoint,
            tokenizer: &tokenizer,
            text: &[self.path(text)],
            evaluation: &[],
            output: &self.path(output),
            cache: None,
            text_field: FIELD,
            resume,
            settings,
            device,
            options: Options {
                recompute: false,
                evaluate_every: 2,
                evaluation_windows: 5,
                save_every: 2,
                keep_checkpoints: 9,
                pth: false,
                tensorboard: false,
            },
            world,
        };
        run(&request, &mut |_: Event<'_>| ControlFlow::Continue(()))
    }

    fn values(&self, path: &str) -> BTreeMap<String, Vec<f32>> {
        let tensors = candle_core::safetensors::load(self.path(path), &Device::Cpu).unwrap();
        let flat = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1().unwrap();
        tensors.iter().map(|(name, tensor)| (name.clone(), flat(tensor))).collect()
    }

    fn metrics(&self, output: &str) -> Vec<metrics::Metrics> {
        let text = fs::read_to_string(self.path(output).join(metrics::FILE)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[track_caller]
    fn same_metrics(&self, one: &str, other: &str) {
        let (one, other) = (self.metrics(one), self.metrics(other));
        assert_eq!(one.len(), other.len());
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-4 * a.abs(), "{a} {b}");
        for pair in one.iter().zip(&other) {
            match pair {
                (metrics::Metrics::Step(a), metrics::Metrics::Step(b)) => {
                    assert_eq!((a.step, a.tokens, a.target), (b.step, b.tokens, b.target));
                    close(a.loss, b.loss);
                    close(a.prediction, b.prediction);
                    close(a.keep.unwrap(), b.keep.unwrap());
                    close(a.gradient_norm, b.gradient_norm);
                }
                (metrics::Metrics::Dense(a), metrics::Metrics::Dense(b)) => {
                    // The same weights: not even sums are ordered otherwise.
                    assert_eq!(a, b);
                }
                (metrics::Metrics::Evaluation(a), metrics::Metrics::Evaluation(b)) => {
                    assert_eq!((a.step, a.windows), (b.step, b.windows));
                    close(a.perplexity, b.perplexity);
                }
                (a, b) => panic!("{a:?} {b:?}"),
            }
        }
    }

    #[track_caller]
    fn same_values(&self, one: &str, other: &str) {
        let (one, other) = (self.values(one), self.values(other));
        assert!(one.keys().eq(other.keys()));
        for (name, values) in &one {
            for (a, b) in values.iter().zip(&other[name]) {
                assert!((a - b).abs() < TOLERANCE, "{name}: {a} {b}");
            }
        }
    }
}

/// Whole passes, parts of passes, and both at once with parts of different sizes.
#[test]
fn ranks_train_what_one_process_trains() {
    let place = Place::new();
    let router = || Stage::Router(router_settings());
    for (name, stage, batch, accumulate, ranks) in [
        ("passes", router(), 1, 2, 2),
        ("windows", router(), 4, 1, 2),
        ("both", router(), 3, 2, 4),
        ("adapter", lora(), 3, 1, 2),
    ] {
        let result = match &stage {
            Stage::Router(_) => "router.safetensors",
            Stage::Lora(_) => "adapter/adapter_model.safetensors",
        };
        let settings = settings(stage, batch, accumulate);
        let (alone, together) = (format!("{name}-alone"), format!("{name}-together"));
        place.train(&Alone, &settings, ("text.txt", &alone), false).unwrap();
        let outcomes = threads::run(ranks, |world| {
            place.train(world, &settings, ("text.txt", &together), false).unwrap()
        });
        place.same_metrics(&alone, &together);
        place.same_values(&format!("{alone}/{result}"), &format!("{together}/{result}"));
        // What was trained is what the loss was of: the first step alone moves every value.
        let moved = place.values(&format!("{together}/{result}"));
        assert!(moved.values().flatten().any(|value| *value != 0.0));
        assert_eq!(outcomes[0].written.len(), 1);
        for other in &outcomes[1..] {
            assert!(other.written.is_empty());
            assert_eq!(other.evaluation, outcomes[0].evaluation);
        }
    }
}

#[test]
fn ranks_resume_to_the_same_bytes() {
    let place = Place::new();
    let settings = settings(Stage::Router(router_settings()), 3, 1);
    let run = |output: &str, resume| {
        threads::run(2, |world| {
            place.train(world, &settings, ("text.txt", output), resume).unwrap();
        });
    };
    run("whole", false);
    run("resumed", false);
    let remove = |path: &str| fs::remove_dir_all(place.path(path)).unwrap();
    remove("resumed/checkpoints/step-000004");
    fs::remove_file(place.path("resumed/router.safetensors")).unwrap();
    run("resumed", true);
    for name in ["router.safetensors", "checkpoints/step-000004/state.safetensors"] {
        let bytes = |run: &str| fs::read(place.path(run).join(name)).unwrap();
        assert!(bytes("whole") == bytes("resumed"), "{name}");
    }
    // One process goes on where two were.
    remove("resumed/checkpoints/step-000004");
    place.train(&Alone, &settings, ("text.txt", "resumed"), true).unwrap();
    place.same_values("whole/router.safetensors", "resumed/router.safetensors");
}

#[test]
fn ranks_that_cannot_work_together_stop() {
    let place = Place::new();
    let router = || Stage::Router(router_settings());
    let failed = |ranks, settings: &Settings, text: &(dyn Fn(usize) -> &'static str + Sync)| {
        threads::run(ranks, |world| {
            let names = (text(world.rank()), "run");
            let error = place.train(world, settings, names, false).unwrap_err();
            (error.to_string(), world.stop())
        })
    };
    // A GPU is one rank's.
    let on_cuda = threads::run(2, |world| {
        let (settings, names) = (settings(router(), 2, 1), ("text.txt", "run"));
        place.train_on(Compute::Cuda, world, &settings, names, false).unwrap_err().to_string()
    });
    assert!(on_cuda.iter().all(|error| error.starts_with("2 processes on cuda: ")), "{on_cuda:?}");
    assert!(!place.path("run").exists());
    // Two windows in one pass are not enough for three.
    let found = failed(3, &settings(router(), 2, 1), &|_| "text.txt");
    let expected = "3 processes cannot share 1 forward passes of 2 windows: make --accumulate a \
                    multiple of 3, or --batch 3 or more";
    assert_eq!(found[0], (expected.to_owned(), true));
    assert!(found[1..].iter().all(|(_, says)| !says));
    assert!(!place.path("run").exists());
    // One rank sees another text.
    let found = failed(2, &settings(router(), 2, 1), &|rank| ["text.txt", "other.txt"][rank]);
    let expected = "the processes do not agree on the texts; all must see the same files";
    assert_eq!(found, [(expected.to_owned(), true), (expected.to_owned(), false)]);
    // One rank sees none; the other hears of it and keeps quiet.
    fs::remove_dir_all(place.path("run")).unwrap();
    let found = failed(2, &settings(router(), 2, 1), &|rank| ["text.txt", "none.txt"][rank]);
    assert_eq!(found[0], ("process 1 stopped".to_owned(), false));
    assert!(found[1].1 && found[1].0.contains("none.txt: cannot read"), "{found:?}");
}

#[test]
fn every_window_of_a_step_is_one_ranks() {
    for (ranks, batch, accumulate) in [(1, 3, 2), (2, 1, 4), (4, 3, 2), (6, 5, 4), (5, 7, 1)] {
        let mut taken: Vec<_> = threads::run(ranks, |world| {
            let share = Share::new(world, batch, accumulate).unwrap();
            let windows = share.windows.clone();
            let passes = (0..share.turns).map(|turn| share.pass(turn));
            passes.flat_map(|pass| windows.clone().map(move |at| (pass, at))).collect::<Vec<_>>()
        })
        .concat();
        taken.sort_unstable();
        let all = |pass| (0..batch).map(move |window| (pass, window));
        assert_eq!(taken, (0..accumulate as u64).flat_map(all).collect::<Vec<_>>());
    }
}
