//! Every integration test, in one binary.

mod artifact;
mod bench;
mod calibrate;
mod cli;
mod differential;
mod end_to_end;
mod errors;
mod eval;
mod forms;
mod gpu;
mod import;
mod logits;
#[cfg(feature = "mpi")]
mod mpi;
mod oldest;
mod oracle;
mod precision;
mod runtime;
mod sequences;
mod train;
mod verification;
