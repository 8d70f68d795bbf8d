//! The integration tests: one binary.

mod runtime;
