//! The `spleen-hpc` binary.

fn main() {}
