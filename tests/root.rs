//! Every integration test, in one binary.

mod artifact;
mod cli;
mod differential;
mod end_to_end;
mod errors;
mod import;
mod oracle;
mod precision;
mod runtime;
mod verification;
