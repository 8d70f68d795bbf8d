//! Every integration test, in one binary.

mod artifact;
mod differential;
mod runtime;
