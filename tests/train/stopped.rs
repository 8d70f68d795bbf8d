//! Runs that are told to stop.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::ops::ControlFlow;

use serde_json::Value;
use skipgpt_export::checkpoint;
use skipgpt_export::device::Compute;
use skipgpt_export::text::Tokenizer;
use skipgpt_export::train::settings::Settings;
use skipgpt_export::train::{Error, Event, Options, Request, data, run};
use skipgpt_export::world::Alone;

use super::{Place, tiny};

/// Also where no step is done between two such words, and the checkpoint is the one the first left.
#[test]
fn a_run_that_is_stopped_twice_goes_on() {
    let place = Place::new();
    let more = ["--steps", "8", "--save-every", "4"];
    place.succeeds("router", "whole", &more);
    let record = fs::read_to_string(place.path("whole/run.json")).unwrap();
    let mut record: Value = serde_json::from_str(&record).unwrap();
    let settings: Settings = serde_json::from_value(record["settings"].take()).unwrap();

    let model = tiny();
    let request = checkpoint::Request { model: Some(&model), ..checkpoint::Request::default() };
    let checkpoint = checkpoint::read(&request).unwrap();
    let tokenizer = Tokenizer::open(&model).unwrap();
    let (text, output) = ([place.path("text.txt")], place.path("stopped"));
    let stopped = |resume: bool, stop: fn(&Event<'_>) -> bool| {
        let request = Request {
            checkpoint: &checkpoint,
            tokenizer: &tokenizer,
            text: &text,
            evaluation: &[],
            text_field: data::FIELD,
            output: &output,
            cache: None,
            resume,
            settings: &settings,
            device: Compute::Cpu,
            options: Options {
                recompute: false,
                evaluate_every: 10,
                evaluation_windows: 16,
                save_every: 4,
                keep_checkpoints: 2,
                pth: false,
                tensorboard: false,
            },
            world: &Alone,
        };
        let result = run(&request, &mut |event| {
            if stop(&event) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        match result {
            Ok(_) => None,
            Err(Error::Interrupted { step, checkpoint }) => Some((step, checkpoint)),
            Err(error) => panic!("{error}"),
        }
    };
    let third = |event: &Event<'_>| matches!(event, Event::Step(step) if step.step == 3);
    let at_once = |event: &Event<'_>| matches!(event, Event::Begins { .. });
    let kept = Some((3, output.join("checkpoints/step-000003")));
    assert_eq!(stopped(false, third), kept);
    assert_eq!(stopped(true, at_once), kept);
    assert_eq!(stopped(true, |_| false), None);
    let bytes = |run| place.bytes(run, "000008", "router.safetensors");
    assert!(bytes("whole") == bytes("stopped"));
}
