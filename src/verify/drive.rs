//! Runs one case through both decoders.

use ndarray::{Array3, Axis};

use super::cases::{Case, Then};
use super::compare::Tally;
use super::place::{Part, Place};
use super::report::{CaseReport, Greedy, GreedyDifference};
use super::{Error, Options, Progress, Side};
use crate::decoder::{CacheEntry, Decoder, Follow, Input, LayerOutput, Logits, Output, Routing};
use crate::logits::{argmax, last};

/// The error of a pair of decoders.
type Failure<R, A> = Error<<R as Decoder>::Error, <A as Decoder>::Error>;

pub(super) fn run<R: Follow, A: Decoder>(
    reference: &mut R,
    artifact: &mut A,
    case: &Case,
    options: &Options,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<CaseReport, Failure<R, A>> {
    Drive { reference, artifact, case, options, progress, step: 0 }.run()
}

struct Drive<'a, R, A> {
    reference: &'a mut R,
    artifact: &'a mut A,
    case: &'a Case,
    options: &'a Options,
    progress: &'a mut dyn FnMut(Progress<'_>),
    step: usize,
}

impl<R: Follow, A: Decoder> Drive<'_, R, A> {
    fn run(mut self) -> Result<CaseReport, Failure<R, A>> {
        let case = self.case;
        let mut tally = Tally::new(&case.name, &case.prompt, &self.options.tolerances);
        self.reference.reset();
        self.artifact.reset();
        // Text is written with one buffer for past and present, tokens are fed without.
        let room = match (case.then, case.prompt.last()) {
            (Then::Greedy(tokens), Some(input)) => input.mask.ncols() + tokens,
            _ => 0,
        };
        self.artifact.reserve(room);
        self.artifact.take_one_token_apart(case.one_token_apart);
        let mut latest = None;
        for input in &case.prompt {
            latest = Some((input.clone(), self.both(input, &mut tally)?));
        }
        let mut greedy = None;
        if let Some((input, outputs)) = latest {
            match case.then {
                Then::Fed(steps) => self.fed(steps, input, outputs, &mut tally)?,
                Then::Greedy(0) => {}
                Then::Greedy(tokens) => {
                    let written = self.written(tokens, input, outputs, &mut tally)?;
                    self.caches(&mut tally)?;
                    let tied = tally.ties.first().map(|tie| tie.step);
                    greedy = Some(self.alone(&written, tied)?);
                }
            }
        }
        if greedy.is_none() {
            self.caches(&mut tally)?;
        }
        let tokens = case.prompt.last().map(|input| input.mask.sum_axis(Axis(1)));
        let tokens = tokens.iter().flatten().map(|n| *n as usize).collect();
        Ok(CaseReport::new(case.name.clone(), tokens, self.step, tally, greedy))
    }

    /// Feeds both the reference's most likely tokens.
    fn fed(
        &mut self,
        steps: usize,
        mut input: Input,
        (mut reference, _): (Output, Output),
        tally: &mut Tally<'_>,
    ) -> Result<(), Failure<R, A>> {
        for _ in 0..steps {
            let tokens: Vec<_> = last(&reference).map(|logits| argmax(&logits)).collect();
            input = input.then(&tokens);
            (reference, _) = self.both(&input, tally)?;
        }
        Ok(())
    }

    /// The text the artifact writes, and what the reference would have written after the same
    /// beginning, differences that are not ties being divergences.
    fn written(
        &mut self,
        tokens: usize,
        mut input: Input,
        mut outputs: (Output, Output),
        tally: &mut Tally<'_>,
    ) -> Result<Vec<i64>, Failure<R, A>> {
        let mut written = Vec::with_capacity(tokens);
        loop {
            let (reference, artifact) = &outputs;
            let mut next = Vec::new();
            for (row, (r, a)) in last(reference).zip(last(artifact)).enumerate() {
                let (best, chosen) = (argmax(&r), argmax(&a));
                let gap = r[best as usize] - r[chosen as usize];
                let tie = gap <= self.options.tolerances.token_gap;
                if best != chosen && !tie {
                    let place = (row, input.mask.ncols() - 1);
                    let tokens = (best as f32, chosen as f32);
                    tally.diverges(Place::Token, place, tokens, self.options.tolerances.token_gap);
                }
                next.push(chosen);
            }
            written.extend(&next);
            if written.len() >= tokens {
                return Ok(written);
            }
            input = input.then(&next);
            outputs = self.both(&input, tally)?;
        }
    }

    /// The text the reference writes with no other's decisions, beside the artifact's. `tied` is the
    /// first step in which a tie came out the other way.
    fn alone(&mut self, artifact: &[i64], tied: Option<usize>) -> Result<Greedy, Failure<R, A>> {
        self.reference.reset();
        let mut equal = 0;
        let mut difference = None;
        let mut input = self.case.prompt[0].clone();
        for (index, &chosen) in artifact.iter().enumerate() {
            let output = self.reference.step(&input).map_err(|e| self.reference_error(e))?;
            self.expect(Side::Reference, &input, &output)?;
            self.advance();
            for logits in last(&output) {
                let best = argmax(&logits);
                if best == chosen {
                    equal += 1;
                } else {
                    let gap = logits[best as usize] - logits[chosen as usize];
                    let near = gap <= self.options.tolerances.token_gap;
                    difference = Some(GreedyDifference {
                        index,
                        reference: best,
                        artifact: chosen,
                        gap,
                        // The token at `index` comes out of step `index`.
                        tie: near || tied.is_some_and(|step| step <= index),
                    });
                }
                input = input.then(&[best]);
            }
            if difference.is_some() {
                break;
            }
        }
        Ok(Greedy { tokens: artifact.len(), equal, first_difference: difference })
    }

    /// One step of both, compared: the reference's output, then the artifact's.
    fn both(
        &mut self,
        input: &Input,
        tally: &mut Tally<'_>,
    ) -> Result<(Output, Output), Failure<R, A>> {
        tally.begin(input);
        let artifact = self.artifact.step(input).map_err(|e| self.artifact_error(e))?;
        self.expect(Side::Artifact, input, &artifact)?;
        let reference = match &artifact.routing {
            Some(routing) => self.reference.follow(input, routing),
            None => self.reference.step(input),
        };
        let reference = reference.map_err(|e| self.reference_error(e))?;
        self.expect(Side::Reference, input, &reference)?;

        let none = Routing { modules: Vec::new(), margins: Array3::zeros((0, 0, 0)) };
        let expected = reference.routing.as_ref().unwrap_or(&none);
        match &artifact.routing {
            Some(routing) => tally.decisions(input, expected, routing),
            None => tally.unreported(input, expected),
        }
        if self.options.layer_outputs {
            self.layers(input, tally)?;
        }
        tally.logits(input, &reference.logits, &artifact.logits);
        self.advance();
        Ok((reference, artifact))
    }

    fn layers(&self, input: &Input, tally: &mut Tally<'_>) -> Result<(), Failure<R, A>> {
        let reference = self.reference.layer_outputs().map_err(|e| self.reference_error(e))?;
        let artifact = self.artifact.layer_outputs().map_err(|e| self.artifact_error(e))?;
        let (Some(reference), Some(artifact)) = (reference, artifact) else { return Ok(()) };
        let layer = |output: &LayerOutput| output.layer;
        self.same_layers("outputs", reference.iter().map(layer), artifact.iter().map(layer))?;
        for (r, a) in reference.iter().zip(&artifact) {
            let what = || format!("the output of layer {}", r.layer);
            let rows = [input.batch(), input.sequence(), r.hidden.dim().2];
            self.shape(Side::Reference, what, &rows, r.hidden.shape())?;
            self.shape(Side::Artifact, what, &rows, a.hidden.shape())?;
            tally.layer(input, r.layer, &r.hidden, &a.hidden);
        }
        Ok(())
    }

    fn caches(&self, tally: &mut Tally<'_>) -> Result<(), Failure<R, A>> {
        let reference = self.reference.cache().map_err(|e| self.reference_error(e))?;
        let artifact = self.artifact.cache().map_err(|e| self.artifact_error(e))?;
        let layer = |entry: &CacheEntry| entry.layer;
        self.same_layers("caches", reference.iter().map(layer), artifact.iter().map(layer))?;
        for (r, a) in reference.iter().zip(&artifact) {
            let (batch, heads, _, width) = r.key.dim();
            let shape = [batch, heads, tally.total(), width];
            let layer = r.layer;
            for (part, r, a) in [(Part::Key, &r.key, &a.key), (Part::Value, &r.value, &a.value)] {
                let what = || format!("{part:?} in the cache of layer {layer}");
                self.shape(Side::Reference, what, &shape, r.shape())?;
                self.shape(Side::Artifact, what, &shape, a.shape())?;
                tally.cache(layer, part, r, a);
            }
        }
        Ok(())
    }

    /// Refuses outputs whose shapes do not follow from the input.
    fn expect(&self, side: Side, input: &Input, output: &Output) -> Result<(), Failure<R, A>> {
        let positions = match input.logits {
            Logits::All => input.sequence(),
            Logits::Last => 1,
        };
        let logits = [input.batch(), positions, self.reference.vocab_size()];
        self.shape(side, || "logits".to_owned(), &logits, output.logits.shape())?;
        let Some(routing) = &output.routing else { return Ok(()) };
        let margins = [routing.modules.len(), input.batch(), input.sequence()];
        self.shape(side, || "margins".to_owned(), &margins, routing.margins.shape())
    }

    fn shape(
        &self,
        side: Side,
        what: impl Fn() -> String,
        expected: &[usize],
        found: &[usize],
    ) -> Result<(), Failure<R, A>> {
        if expected == found {
            return Ok(());
        }
        Err(Error::Shape {
            case: self.case.name.clone(),
            step: self.step,
            side,
            what: what(),
            expected: expected.to_vec(),
            found: found.to_vec(),
        })
    }

    fn same_layers(
        &self,
        what: &'static str,
        reference: impl Iterator<Item = usize>,
        artifact: impl Iterator<Item = usize>,
    ) -> Result<(), Failure<R, A>> {
        let (reference, artifact): (Vec<_>, Vec<_>) = (reference.collect(), artifact.collect());
        if reference == artifact {
            return Ok(());
        }
        Err(Error::Layers { case: self.case.name.clone(), what, reference, artifact })
    }

    fn reference_error(&self, source: R::Error) -> Failure<R, A> {
        Error::Reference { case: self.case.name.clone(), step: self.step, source }
    }

    fn artifact_error(&self, source: A::Error) -> Failure<R, A> {
        Error::Artifact { case: self.case.name.clone(), step: self.step, source }
    }

    fn advance(&mut self) {
        self.step += 1;
        let steps = self.case.prompt.len()
            + match self.case.then {
                Then::Fed(steps) => steps,
                Then::Greedy(tokens) => 2 * tokens.saturating_sub(1) + 1,
            };
        (self.progress)(Progress { case: &self.case.name, step: self.step, steps });
    }
}
