//! What one case has shown so far: counts, largest errors, ties, the first divergence.

use ndarray::{ArrayView1, ArrayView3, ArrayView4};
use serde::Serialize;
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use crate::decoder::{Input, Routing};
use crate::tolerance::{Tolerance, Tolerances};

/// How two sets of values differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Values compared.
    pub compared: u64,
    /// Of those, how many are out of tolerance, those that are not finite included.
    pub beyond: u64,
    /// Of those, how many are NaN or infinite on either side.
    pub not_finite: u64,
    /// Largest `|a − r|`; NaN (in JSON `null`) where a value is not finite.
    pub max_abs_error: f32,
    /// Largest `|a − r|` as a share of the largest magnitude in the reference's vector, vectors of
    /// zeros apart; NaN (in JSON `null`) where a value is not finite.
    pub max_rel_error: f32,
}

/// How two sets of decisions differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Decisions {
    /// Decisions compared, ties included.
    pub compared: u64,
    /// Of those, how many are equal.
    pub equal: u64,
    /// How many are within the tie margin in the reference, whichever way they came out.
    pub near_ties: u64,
    /// Of those, how many came out the other way.
    pub flipped_ties: u64,
    /// How many differ and are no tie.
    pub different: u64,
    /// Decisions that the reference took and the artifact does not report.
    pub unreported: u64,
}

/// A decision that was a tie in the reference and came out the other way in the artifact.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tie {
    /// The case.
    pub case: String,
    /// The step, from 0.
    pub step: usize,
    /// The module, such as `layers.3.mlp`.
    pub module: String,
    /// Row of the batch.
    pub row: usize,
    /// The row's token, padding not counted.
    pub token: usize,
    /// The reference's keep score minus its skip score.
    pub margin: f32,
}

/// The first place where the artifact is wrong, in the order in which a model computes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergence {
    /// The case.
    pub case: String,
    /// The step, from 0.
    pub step: usize,
    /// The first layer that diverges; `None` where only the logits do.
    pub layer: Option<usize>,
    /// What differs there.
    pub place: String,
    /// Row of the batch.
    pub row: usize,
    /// The row's token, padding not counted.
    pub token: usize,
    /// What the reference has.
    pub reference: f32,
    /// What the artifact has.
    pub artifact: f32,
    /// The largest difference allowed; for a decision, the tie margin.
    pub bound: f32,
}

/// A kind of value, placed where a model computes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// In layers: by layer, then by kind, keys before decisions before the output.
    Layer(usize, Part),
    /// After all layers.
    Logits,
    /// After the logits.
    Token,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Key,
    Value,
    Decision(ModuleKind),
    Output,
}

impl Place {
    fn describe(self) -> String {
        match self {
            Self::Layer(layer, Part::Key) => format!(
                "key in the cache of layer {layer} (its key projection, or the layer before it)"
            ),
            Self::Layer(layer, Part::Value) => format!(
                "value in the cache of layer {layer} (its value projection, or the layer before it)"
            ),
            Self::Layer(layer, Part::Decision(kind)) => {
                format!("decision margin of {}", ModuleId { layer, kind })
            }
            Self::Layer(layer, Part::Output) => format!("output of layer {layer}"),
            Self::Logits => "logits (the final norm or the head, or the last layer)".to_owned(),
            Self::Token => "greedy token".to_owned(),
        }
    }
}

/// Everything one case has shown so far.
#[derive(Debug)]
pub(super) struct Tally<'a> {
    case: &'a str,
    tolerances: &'a Tolerances,
    /// Tokens of padding before each row.
    padding: Vec<usize>,
    /// Column after each step's last token.
    ends: Vec<usize>,
    pub(super) decisions: Decisions,
    pub(super) logits: Stats,
    pub(super) cache: Stats,
    pub(super) layers: Stats,
    pub(super) ties: Vec<Tie>,
    first: Option<((usize, Place, usize, usize), Divergence)>,
}

impl<'a> Tally<'a> {
    pub(super) fn new(case: &'a str, prompt: &[Input], tolerances: &'a Tolerances) -> Self {
        let padding = prompt.last().map_or_else(Vec::new, |last| {
            last.mask
                .rows()
                .into_iter()
                .map(|row| row.iter().take_while(|&&m| m == 0).count())
                .collect()
        });
        Self {
            case,
            tolerances,
            padding,
            ends: Vec::new(),
            decisions: Decisions::default(),
            logits: Stats::default(),
            cache: Stats::default(),
            layers: Stats::default(),
            ties: Vec::new(),
            first: None,
        }
    }

    /// A step begins; what is compared next belongs to it.
    pub(super) fn begin(&mut self, input: &Input) {
        self.ends.push(input.mask.ncols());
    }

    /// The step, and the first column of the tokens it brought in.
    fn now(&self) -> (usize, usize) {
        match self.ends[..] {
            [] | [_] => (0, 0),
            [.., before, _] => (self.ends.len() - 1, before),
        }
    }

    pub(super) fn first(self) -> Option<Divergence> {
        self.first.map(|(_, divergence)| divergence)
    }

    /// Remembers a divergence unless an earlier one is known.
    pub(super) fn diverges(
        &mut self,
        place: Place,
        (row, column): (usize, usize),
        (reference, artifact): (f32, f32),
        bound: f32,
    ) {
        let step = self.ends.partition_point(|&end| end <= column);
        let key = (step, place, column, row);
        if self.first.as_ref().is_some_and(|(first, _)| *first <= key) {
            return;
        }
        let layer = match place {
            Place::Layer(layer, _) => Some(layer),
            Place::Logits | Place::Token => None,
        };
        let divergence = Divergence {
            case: self.case.to_owned(),
            step,
            layer,
            place: place.describe(),
            row,
            token: column - self.padding[row],
            reference,
            artifact,
            bound,
        };
        self.first = Some((key, divergence));
    }

    /// The decisions of the current step, at real tokens. A module that only one of the two routes
    /// is kept by the other.
    pub(super) fn decisions(&mut self, input: &Input, reference: &Routing, artifact: &Routing) {
        let mut modules: Vec<_> = reference.modules.iter().chain(&artifact.modules).collect();
        modules.sort();
        modules.dedup();
        let (step, start) = self.now();
        for &module in modules {
            let (r, a) = (margins(reference, module), margins(artifact, module));
            for (b, s) in real(input) {
                let (r, a) = (r(b, s), a(b, s));
                let tie = r.abs() <= self.tolerances.tie_margin;
                let equal = !r.is_nan() && !a.is_nan() && (r >= 0.0) == (a >= 0.0);
                self.decisions.compared += 1;
                self.decisions.equal += u64::from(equal);
                self.decisions.near_ties += u64::from(tie);
                if equal {
                    continue;
                }
                let column = start + s;
                if tie && !a.is_nan() {
                    self.decisions.flipped_ties += 1;
                    self.ties.push(Tie {
                        case: self.case.to_owned(),
                        step,
                        module: module.to_string(),
                        row: b,
                        token: column - self.padding[b],
                        margin: r,
                    });
                } else {
                    self.decisions.different += 1;
                    let place = Place::Layer(module.layer, Part::Decision(module.kind));
                    self.diverges(place, (b, column), (r, a), self.tolerances.tie_margin);
                }
            }
        }
    }

    /// The artifact reports no decisions in the current step.
    pub(super) fn unreported(&mut self, input: &Input, reference: &Routing) {
        self.decisions.unreported += (reference.modules.len() * real(input).count()) as u64;
    }

    /// Columns of the cache by now.
    pub(super) fn total(&self) -> usize {
        self.ends.last().copied().unwrap_or_default()
    }

    /// Logits `[batch, n, vocab]` of the last `n` tokens of the current step.
    pub(super) fn logits(
        &mut self,
        input: &Input,
        reference: ArrayView3<'_, f32>,
        artifact: ArrayView3<'_, f32>,
    ) {
        let mut stats = self.logits;
        let skipped = input.sequence() - reference.dim().1;
        for (b, s) in real(input).filter(|(_, s)| *s >= skipped) {
            let lane = ndarray::s![b, s - skipped, ..];
            let place = (Place::Logits, b, self.now().1 + s);
            let (r, a) = (reference.slice(lane), artifact.slice(lane));
            self.vector(&mut stats, place, r, a, self.tolerances.logits);
        }
        self.logits = stats;
    }

    /// A layer's output `[batch, sequence, hidden]` in the current step.
    pub(super) fn layer(
        &mut self,
        input: &Input,
        layer: usize,
        reference: ArrayView3<'_, f32>,
        artifact: ArrayView3<'_, f32>,
    ) {
        let mut stats = self.layers;
        for (b, s) in real(input) {
            let lane = ndarray::s![b, s, ..];
            let place = (Place::Layer(layer, Part::Output), b, self.now().1 + s);
            let (r, a) = (reference.slice(lane), artifact.slice(lane));
            self.vector(&mut stats, place, r, a, self.tolerances.layer);
        }
        self.layers = stats;
    }

    /// Keys or values `[batch, kv_heads, total, head_dim]` of a whole cache, at real tokens.
    pub(super) fn cache(
        &mut self,
        layer: usize,
        part: Part,
        reference: ArrayView4<'_, f32>,
        artifact: ArrayView4<'_, f32>,
    ) {
        let mut stats = self.cache;
        let (batch, heads, total, _) = reference.dim();
        for b in 0..batch {
            for column in self.padding[b]..total {
                for head in 0..heads {
                    let lane = ndarray::s![b, head, column, ..];
                    let place = (Place::Layer(layer, part), b, column);
                    let (r, a) = (reference.slice(lane), artifact.slice(lane));
                    self.vector(&mut stats, place, r, a, self.tolerances.cache);
                }
            }
        }
        self.cache = stats;
    }

    fn vector(
        &mut self,
        stats: &mut Stats,
        (place, row, column): (Place, usize, usize),
        reference: ArrayView1<'_, f32>,
        artifact: ArrayView1<'_, f32>,
        tolerance: Tolerance,
    ) {
        let scale = reference.iter().fold(0.0, |scale: f32, r| scale.max(r.abs()));
        let bound = tolerance.bound(scale);
        for (&r, &a) in reference.iter().zip(artifact) {
            if stats.add(r, a, scale, bound) {
                continue;
            }
            self.diverges(place, (row, column), (r, a), bound);
        }
    }
}

impl Stats {
    /// Counts a pair of values; whether they agree.
    fn add(&mut self, reference: f32, artifact: f32, scale: f32, bound: f32) -> bool {
        let error = (artifact - reference).abs();
        let finite = reference.is_finite() && artifact.is_finite();
        let agree = finite && error <= bound;
        self.compared += 1;
        self.beyond += u64::from(!agree);
        self.not_finite += u64::from(!finite);
        let relative = if scale == 0.0 { 0.0 } else { error / scale };
        if finite {
            // `max` would forget a NaN.
            self.max_abs_error = larger(self.max_abs_error, error);
            self.max_rel_error = larger(self.max_rel_error, relative);
        } else {
            self.max_abs_error = f32::NAN;
            self.max_rel_error = f32::NAN;
        }
        agree
    }

    /// The two sets as one.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            compared: self.compared + other.compared,
            beyond: self.beyond + other.beyond,
            not_finite: self.not_finite + other.not_finite,
            max_abs_error: larger(self.max_abs_error, other.max_abs_error),
            max_rel_error: larger(self.max_rel_error, other.max_rel_error),
        }
    }
}

/// The larger of two, NaN above all.
fn larger(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b { a } else { b }
}

impl Decisions {
    /// The two sets as one.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            compared: self.compared + other.compared,
            equal: self.equal + other.equal,
            near_ties: self.near_ties + other.near_ties,
            flipped_ties: self.flipped_ties + other.flipped_ties,
            different: self.different + other.different,
            unreported: self.unreported + other.unreported,
        }
    }
}

/// Row and place of every real token a step brings in.
pub(super) fn real(input: &Input) -> impl Iterator<Item = (usize, usize)> {
    (0..input.batch())
        .flat_map(|b| (0..input.sequence()).map(move |s| (b, s)))
        .filter(|&(b, s)| input.is_real(b, s))
}

/// A module's margins by row and token; one that is not routed keeps.
fn margins(routing: &Routing, module: ModuleId) -> impl Fn(usize, usize) -> f32 {
    let index = routing.modules.iter().position(|m| *m == module);
    move |b, s| index.map_or(f32::INFINITY, |m| routing.margins[[m, b, s]])
}
