//! An artifact whose decisions are watched without having been exported as an output.
//!
//! Every router's margins are values of the main graph, whatever the dispatch. The model file is
//! loaded from memory with those values as further outputs; the weights are the artifact's own.

use std::path::PathBuf;

use ndarray::{Array3, ArrayD, Axis};
use skipgpt_passes::ir::DType;

use crate::artifact::{self, Artifact, names};
use crate::decoder::{CacheEntry, Decoder, Input, Logits, Output, Peek, Routing, Sequences};
use crate::onnx::graph::{Element, Value};
use crate::onnx::{self, RouterMargins, proto};
use crate::runtime::session::Provider;
use crate::runtime::{self, OnnxDecoder, Placement, Runtime, Session, session};

/// Why an artifact could not be watched or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model file is not the one that was exported.
    #[error(transparent)]
    Artifact(#[from] artifact::Error),
    /// The provider cannot compute in the artifact's dtype.
    #[error(
        "{}: ONNX Runtime's CPU provider has no bf16 MatMul; run it with --provider cuda, or export --dtype f16 or f32",
        .0.display()
    )]
    NoBf16(PathBuf),
    /// The model file could not be given further outputs.
    #[error(transparent)]
    Proto(#[from] proto::Error),
    /// ONNX Runtime does not load it.
    #[error(transparent)]
    Session(#[from] session::Error),
    /// ONNX Runtime does not run it.
    #[error(transparent)]
    Run(#[from] runtime::decoder::Error),
    /// A router's margins have another shape than its tokens and decisions ask for.
    #[error("{value}: expected margins of shape {expected:?}, found {found:?}")]
    Margins {
        /// The value in the graph.
        value: String,
        /// `[batch, sequence, decisions]`.
        expected: [usize; 3],
        /// What came out.
        found: Vec<usize>,
    },
}

/// A decoder that reports every decision.
#[derive(Debug)]
pub struct Watched {
    decoder: OnnxDecoder,
    routers: Vec<RouterMargins>,
}

impl Watched {
    /// Loads `artifact`; twice if [`session::Options::one_token_apart`].
    ///
    /// # Errors
    ///
    /// [`Error`] if a file was changed, or ONNX Runtime refuses the model.
    pub fn open(
        artifact: &Artifact,
        runtime: &Runtime,
        options: &session::Options,
    ) -> Result<Self, Error> {
        Self::load(artifact, &artifact.read(names::MODEL)?, runtime, options)
    }

    /// As [`Watched::open`], no product of which rounds activations, whatever the artifact allows:
    /// what its codes are compared by.
    ///
    /// # Errors
    ///
    /// As [`Watched::open`].
    pub fn open_exact(
        artifact: &Artifact,
        runtime: &Runtime,
        options: &session::Options,
    ) -> Result<Self, Error> {
        let model = proto::exact(&artifact.read(names::MODEL)?)?;
        Self::load(artifact, &model, runtime, options)
    }

    fn load(
        artifact: &Artifact,
        model: &[u8],
        runtime: &Runtime,
        options: &session::Options,
    ) -> Result<Self, Error> {
        if artifact.manifest.options.dtype == DType::BF16 && options.provider == Provider::Cpu {
            return Err(Error::NoBf16(artifact.directory.clone()));
        }
        let routers = artifact.manifest.routing.routers.iter();
        let routers: Vec<_> = routers.map(RouterMargins::from).collect();
        let outputs: Vec<Value> = routers
            .iter()
            .map(|router| Value {
                name: router.value.clone(),
                element: Element::Float(DType::F32),
                shape: onnx::every_token(router.columns()),
            })
            .collect();
        let bytes = proto::with_outputs(model, &outputs)?;
        let open = |options: &session::Options| {
            Session::from_bytes(runtime, &bytes, &artifact.directory, options)
        };
        let session = open(options)?;
        let one_token = options.one_token().as_ref().map(open).transpose()?;
        let manifest = &artifact.manifest;
        let emitted = manifest.options.emit_routing;
        let modules = if emitted { manifest.routing.routed.clone() } else { Vec::new() };
        let decoder = OnnxDecoder::new(session, modules)?.with_one_token(one_token);
        Ok(Self { decoder, routers })
    }

    /// Where its nodes ran; told after the first step, on another provider than the CPU's.
    pub fn placement(&self) -> Option<&Placement> {
        self.decoder.session().placement()
    }

    /// As [`OnnxDecoder::restore`].
    ///
    /// # Errors
    ///
    /// [`Error::Run`] if `entries` are no cache of this graph.
    pub fn restore(&mut self, entries: impl IntoIterator<Item = CacheEntry>) -> Result<(), Error> {
        Ok(self.decoder.restore(entries)?)
    }

    fn routing(&self, input: &Input, found: &[ArrayD<f32>]) -> Result<Routing, Error> {
        let shape = (input.batch(), input.sequence());
        let mut modules = Vec::new();
        let mut margins = Vec::new();
        for (router, found) in self.routers.iter().zip(found) {
            let (value, expected) = (router.value.clone(), [shape.0, shape.1, router.columns()]);
            if found.shape() != expected {
                return Err(Error::Margins { value, expected, found: found.shape().to_vec() });
            }
            modules.extend(&router.modules);
            let own = found.axis_iter(Axis(2)).take(router.modules.len());
            own.for_each(|column| margins.extend(column));
        }
        let shape = (modules.len(), shape.0, shape.1);
        // Every column above has an element a token.
        let margins = Array3::from_shape_vec(shape, margins).unwrap_or_default();
        Ok(Routing { modules, margins })
    }
}

impl Decoder for Watched {
    type Error = Error;

    fn reset(&mut self) {
        self.decoder.reset();
    }

    fn reserve(&mut self, tokens: usize) {
        self.decoder.reserve(tokens);
    }

    fn take_one_token_apart(&mut self, apart: bool) -> bool {
        self.decoder.take_one_token_apart(apart)
    }

    fn step(&mut self, input: &Input) -> Result<Output, Error> {
        let (output, margins) = self.decoder.step_with(input, &values(&self.routers))?;
        let routing = Some(self.routing(input, &margins)?);
        Ok(Output { routing, ..output })
    }

    fn cache(&self) -> Result<Vec<CacheEntry>, Error> {
        Ok(self.decoder.cache()?)
    }

    fn vocab_size(&self) -> usize {
        self.decoder.vocab_size()
    }

    fn gives(&self) -> Logits {
        self.decoder.gives()
    }

    fn takes(&self) -> Sequences {
        self.decoder.takes()
    }
}

impl Peek for Watched {
    fn peek(&mut self, input: &Input) -> Result<Output, Error> {
        let (output, margins) = self.decoder.peek_with(input, &values(&self.routers))?;
        let routing = Some(self.routing(input, &margins)?);
        Ok(Output { routing, ..output })
    }
}

/// The graph's values that hold the routers' margins.
fn values(routers: &[RouterMargins]) -> Vec<&str> {
    routers.iter().map(|router| router.value.as_str()).collect()
}
