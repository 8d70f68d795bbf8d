//! A routed transformer small enough to read, with faults that can be put into it.
//!
//! Three layers of one head, hidden size 4, vocabulary 32, weights from sines. It routes as `SkipGPT`
//! does: both decisions from the layer's input, keys and values of every token.

use ndarray::{Array1, Array2, Array3, Array4, ArrayView1, s};
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use crate::decoder::{CacheEntry, Decoder, Follow, Input, LayerOutput, Logits, Output, Routing};

pub(crate) const VOCAB: usize = 32;
pub(crate) const LAYERS: usize = 3;
const WIDTH: usize = 4;

/// What is wrong with it. `column` counts padding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// Adds to every logit of token 3 in that step.
    Logit { step: usize, by: f32 },
    /// Replaces a logit of that step.
    LogitIs { step: usize, value: f32 },
    /// Takes the other decision there.
    Flip { module: ModuleId, column: usize },
    /// Its router gives this margin there.
    Margin { module: ModuleId, column: usize, value: f32 },
    /// Adds to the key (or value) that it reports in its cache, not to what it computes with.
    Cache { layer: usize, value: bool, column: usize, by: f32 },
    /// Adds to what the MLP of that layer gives.
    Mlp { layer: usize, by: f32 },
    /// Attends to padding too.
    SeesPadding,
    /// Counts positions from the first column, padding included.
    CountsPadding,
    /// Each step of one token errs by that much more than the one before.
    Drift { by: f32 },
    /// A chunk after the first does not see the cache.
    ForgetsChunks,
    /// Adds to every logit of token 3 once it was reset more often than that.
    Resets { after: usize, by: f32 },
    /// Makes the second most likely token as likely as the first, and this much more.
    Gap { step: usize, by: f32 },
    /// Reports no decisions.
    Silent,
    /// Has no router: keeps everything and reports no module.
    Dense,
    /// Its cache lacks this layer.
    NoCache { layer: usize },
    /// Fails in that step.
    Fails { step: usize },
    /// Gives logits of too few tokens.
    Narrow,
    /// Every logit comes with noise of this size.
    Noise { size: f32 },
    /// Gives the last position's logits alone, and fails where others are asked for.
    LastOnly,
}

#[derive(Debug, thiserror::Error)]
#[error("the toy was told to fail")]
pub(crate) struct Failed;

/// The decoder.
#[derive(Debug, Clone, Default)]
pub(crate) struct Toy {
    pub(crate) faults: Vec<Fault>,
    /// By layer: keys and values `[batch][column]`.
    cache: Vec<[Vec<Vec<Array1<f32>>>; 2]>,
    outputs: Vec<Array3<f32>>,
    step: usize,
    decoded: usize,
    resets: usize,
}

impl Toy {
    pub(crate) fn with(faults: impl IntoIterator<Item = Fault>) -> Self {
        Self { faults: faults.into_iter().collect(), ..Self::default() }
    }

    fn has(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }

    fn run(&mut self, input: &Input, followed: Option<&Routing>) -> Result<Output, Failed> {
        if self.has(Fault::Fails { step: self.step }) {
            return Err(Failed);
        }
        if input.logits == Logits::All && input.sequence() > 1 && self.gives() == Logits::Last {
            return Err(Failed);
        }
        let (batch, sequence, past) = (input.batch(), input.sequence(), input.past());
        self.cache.resize(LAYERS, <[Vec<Vec<_>>; 2]>::default());
        let mut mask = input.mask.clone();
        if self.has(Fault::SeesPadding) {
            mask.fill(1);
        }
        if self.has(Fault::ForgetsChunks) && sequence > 1 && past > 0 {
            mask.slice_mut(s![.., ..past]).fill(0);
        }
        let mut x = Array3::zeros((batch, sequence, WIDTH));
        for ((b, s), token) in input.ids.indexed_iter() {
            let row = Array1::from_shape_fn(WIDTH, |i| weight(0, *token as usize, i) * 2.0);
            x.slice_mut(s![b, s, ..]).assign(&row);
        }
        let modules: Vec<_> = (0..LAYERS)
            .flat_map(|layer| {
                [ModuleKind::Attention, ModuleKind::Mlp].map(|kind| ModuleId { layer, kind })
            })
            .collect();
        let mut margins = Array3::zeros((modules.len(), batch, sequence));
        self.outputs.clear();
        for layer in 0..LAYERS {
            let before = x.clone();
            for [b, s] in grid(batch, sequence) {
                let position = if self.has(Fault::CountsPadding) {
                    (past + s) as i64
                } else {
                    input.positions[[b, s]]
                };
                let input = before.slice(s![b, s, ..]);
                let key = turn(&times(10 * layer + 1, &input), position as f32);
                let value = times(10 * layer + 2, &input);
                for (part, vector) in [key, value].into_iter().enumerate() {
                    let rows = &mut self.cache[layer][part];
                    rows.resize(batch.max(rows.len()), Vec::new());
                    rows[b].push(vector);
                }
            }
            for [b, s] in grid(batch, sequence) {
                let input_state = before.slice(s![b, s, ..]);
                let position = if self.has(Fault::CountsPadding) {
                    (past + s) as f32
                } else {
                    input.positions[[b, s]] as f32
                };
                let keeps = [0, 1].map(|kind| {
                    let m = 2 * layer + kind;
                    let (own, keep) = self.decide(modules[m], m, past + s, &input_state);
                    margins[[m, b, s]] = own;
                    let told = followed.and_then(|routing| {
                        let index = routing.modules.iter().position(|id| *id == modules[m])?;
                        Some(routing.keeps(index, b, s))
                    });
                    self.has(Fault::Dense) || told.unwrap_or(keep)
                });
                let mut h = input_state.to_owned();
                if keeps[0] {
                    let query = turn(&times(10 * layer + 3, &input_state), position);
                    h += &self.attend(layer, b, &query, &mask, past + s);
                }
                if keeps[1] {
                    let wrong = self.faults.iter().find_map(|fault| match fault {
                        Fault::Mlp { layer: l, by } if *l == layer => Some(*by),
                        _ => None,
                    });
                    h += &(times(10 * layer + 4, &h.view()).mapv(f32::tanh) + wrong.unwrap_or(0.0));
                }
                x.slice_mut(s![b, s, ..]).assign(&h);
            }
            self.outputs.push(x.clone());
        }
        let logits = self.logits(input, &x);
        self.step += 1;
        self.decoded += usize::from(sequence == 1 && past > 0);
        let silent = self.has(Fault::Silent);
        let routing = if self.has(Fault::Dense) {
            Routing { modules: Vec::new(), margins: Array3::zeros((0, batch, sequence)) }
        } else {
            flipped(&self.faults, past, Routing { modules, margins })
        };
        Ok(Output { logits, routing: (!silent).then_some(routing) })
    }

    /// A router's margin, and the decision taken.
    fn decide(
        &self,
        id: ModuleId,
        m: usize,
        column: usize,
        x: &ArrayView1<'_, f32>,
    ) -> (f32, bool) {
        let mut margin: f32 = (0..WIDTH).map(|i| weight(100 + m, i, 0) * x[i]).sum::<f32>() + 0.2;
        let mut flip = false;
        for fault in &self.faults {
            match fault {
                Fault::Margin { module, column: c, value } if (*module, *c) == (id, column) => {
                    margin = *value;
                }
                Fault::Flip { module, column: c } if (*module, *c) == (id, column) => flip = true,
                _ => {}
            }
        }
        (margin, (margin >= 0.0) != flip)
    }

    fn attend(
        &self,
        layer: usize,
        b: usize,
        query: &Array1<f32>,
        mask: &Array2<i64>,
        last: usize,
    ) -> Array1<f32> {
        let [keys, values] = &self.cache[layer];
        let mut sum = Array1::zeros(WIDTH);
        let mut total = f32::MIN_POSITIVE;
        for column in (0..=last).filter(|c| mask[[b, *c]] == 1) {
            let share = (query.dot(&keys[b][column]) * 0.5).exp();
            sum.scaled_add(share, &values[b][column]);
            total += share;
        }
        sum / total
    }

    fn logits(&self, input: &Input, x: &Array3<f32>) -> Array3<f32> {
        let sequence = input.sequence();
        let first = if input.logits == Logits::All { 0 } else { sequence - 1 };
        let width = if self.has(Fault::Narrow) { VOCAB - 1 } else { VOCAB };
        let shape = (input.batch(), sequence - first, width);
        let mut logits = Array3::from_shape_fn(shape, |(b, s, token)| {
            (0..WIDTH).map(|i| weight(0, token, i) * x[[b, first + s, i]]).sum::<f32>() * 3.0
        });
        for fault in &self.faults {
            match *fault {
                Fault::Logit { step, by } if step == self.step => {
                    logits.slice_mut(s![.., .., 3]).mapv_inplace(|l| l + by);
                }
                Fault::Resets { after, by } if self.resets > after => {
                    logits.slice_mut(s![.., .., 3]).mapv_inplace(|l| l + by);
                }
                Fault::LogitIs { step, value } if step == self.step => {
                    logits.slice_mut(s![0, -1, 5]).fill(value);
                }
                Fault::Drift { by } if sequence == 1 && input.past() > 0 => {
                    logits += by * (self.decoded + 1) as f32;
                }
                Fault::Noise { size } => {
                    logits.indexed_iter_mut().for_each(|((b, s, t), l)| {
                        *l += size * weight(self.step, 100 * b + s, t);
                    });
                }
                Fault::Gap { step, by } if step == self.step => {
                    for mut row in logits.slice_mut(s![.., -1, ..]).rows_mut() {
                        let best = crate::logits::top(&row.view(), 2);
                        row[best[1].0 as usize] = row[best[0].0 as usize] + by;
                    }
                }
                _ => {}
            }
        }
        logits
    }
}

/// Reported decisions are those taken.
fn flipped(faults: &[Fault], past: usize, mut routing: Routing) -> Routing {
    for fault in faults {
        let Fault::Flip { module, column } = fault else { continue };
        let Some(m) = routing.modules.iter().position(|id| id == module) else { continue };
        let (_, batch, sequence) = routing.margins.dim();
        if (past..past + sequence).contains(column) {
            for b in 0..batch {
                let margin = &mut routing.margins[[m, b, column - past]];
                *margin = if *margin >= 0.0 { -margin.abs() - 1e-3 } else { margin.abs() };
            }
        }
    }
    routing
}

fn grid(batch: usize, sequence: usize) -> impl Iterator<Item = [usize; 2]> {
    (0..batch).flat_map(move |b| (0..sequence).map(move |s| [b, s]))
}

fn weight(matrix: usize, row: usize, column: usize) -> f32 {
    ((1 + matrix * 37 + row * 11 + column * 5) as f32 * 1.37).sin()
}

fn times(matrix: usize, x: &ArrayView1<'_, f32>) -> Array1<f32> {
    Array1::from_shape_fn(WIDTH, |o| {
        (0..WIDTH).map(|i| weight(matrix, o, i) * x[i]).sum::<f32>() * 0.5
    })
}

/// Rotates pairs `(0, 2)` and `(1, 3)` by the position.
fn turn(x: &Array1<f32>, position: f32) -> Array1<f32> {
    let mut out = x.clone();
    for i in 0..WIDTH / 2 {
        let (sin, cos) = (position * 0.3_f32.powi(i as i32)).sin_cos();
        let (a, b) = (x[i], x[i + WIDTH / 2]);
        out[i] = a * cos - b * sin;
        out[i + WIDTH / 2] = b * cos + a * sin;
    }
    out
}

impl Decoder for Toy {
    type Error = Failed;

    fn reset(&mut self) {
        self.step = 0;
        self.decoded = 0;
        self.resets += 1;
        self.cache.clear();
    }

    fn step(&mut self, input: &Input) -> Result<Output, Failed> {
        self.run(input, None)
    }

    fn cache(&self) -> Result<Vec<CacheEntry>, Failed> {
        let mut entries: Vec<_> = self
            .cache
            .iter()
            .enumerate()
            .map(|(layer, parts)| {
                let [key, value] = parts.each_ref().map(|rows| {
                    let shape = (rows.len(), 1, rows[0].len(), WIDTH);
                    Array4::from_shape_fn(shape, |(b, _, c, i)| rows[b][c][i])
                });
                CacheEntry { layer, key, value }
            })
            .collect();
        for fault in &self.faults {
            match *fault {
                Fault::Cache { layer, value, column, by } => {
                    let entry = &mut entries[layer];
                    let tensor = if value { &mut entry.value } else { &mut entry.key };
                    if column < tensor.dim().2 {
                        tensor[[0, 0, column, 1]] += by;
                    }
                }
                Fault::NoCache { layer } => entries.retain(|entry| entry.layer != layer),
                _ => {}
            }
        }
        Ok(entries)
    }

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn gives(&self) -> Logits {
        if self.has(Fault::LastOnly) { Logits::Last } else { Logits::All }
    }

    fn layer_outputs(&self) -> Result<Option<Vec<LayerOutput>>, Failed> {
        let output =
            |(layer, hidden): (usize, &Array3<f32>)| LayerOutput { layer, hidden: hidden.clone() };
        Ok(Some(self.outputs.iter().enumerate().map(output).collect()))
    }
}

impl Follow for Toy {
    fn follow(&mut self, input: &Input, routing: &Routing) -> Result<Output, Failed> {
        self.run(input, Some(routing))
    }
}
