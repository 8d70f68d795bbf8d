//! Every integration test, in one binary.

mod differential;
mod import;
mod runtime;
