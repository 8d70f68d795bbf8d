//! What one case has shown so far: counts, largest errors, ties, the first divergence.

use ndarray::{Array3, Array4, ArrayView1};
use skipgpt_passes::ir::ModuleId;

use super::place::{Divergence, Part, Place, Tie};
use super::stats::{Decisions, Stats};
use crate::decoder::{Input, Routing};
use crate::tolerance::{Tolerance, Tolerances};

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
        reference: &Array3<f32>,
        artifact: &Array3<f32>,
    ) {
        let mut stats = self.logits;
        let skipped = input.sequence() - reference.dim().1;
        for (b, s) in real(input).filter(|(_, s)| *s >= skipped) {
            let lane = ndarray::s![b, s - skipped, ..];
            let place = (Place::Logits, b, self.now().1 + s);
            let (r, a) = (reference.slice(lane), artifact.slice(lane));
            self.vector(&mut stats, place, &r, &a, self.tolerances.logits);
        }
        self.logits = stats;
    }

    /// A layer's output `[batch, sequence, hidden]` in the current step.
    pub(super) fn layer(
        &mut self,
        input: &Input,
        layer: usize,
        reference: &Array3<f32>,
        artifact: &Array3<f32>,
    ) {
        let mut stats = self.layers;
        for (b, s) in real(input) {
            let lane = ndarray::s![b, s, ..];
            let place = (Place::Layer(layer, Part::Output), b, self.now().1 + s);
            let (r, a) = (reference.slice(lane), artifact.slice(lane));
            self.vector(&mut stats, place, &r, &a, self.tolerances.layer);
        }
        self.layers = stats;
    }

    /// Keys or values `[batch, kv_heads, total, head_dim]` of a whole cache, at real tokens.
    pub(super) fn cache(
        &mut self,
        layer: usize,
        part: Part,
        reference: &Array4<f32>,
        artifact: &Array4<f32>,
    ) {
        let mut stats = self.cache;
        let (batch, heads, total, _) = reference.dim();
        for b in 0..batch {
            for column in self.padding[b]..total {
                for head in 0..heads {
                    let lane = ndarray::s![b, head, column, ..];
                    let place = (Place::Layer(layer, part), b, column);
                    let (r, a) = (reference.slice(lane), artifact.slice(lane));
                    self.vector(&mut stats, place, &r, &a, self.tolerances.cache);
                }
            }
        }
        self.cache = stats;
    }

    fn vector(
        &mut self,
        stats: &mut Stats,
        (place, row, column): (Place, usize, usize),
        reference: &ArrayView1<'_, f32>,
        artifact: &ArrayView1<'_, f32>,
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
