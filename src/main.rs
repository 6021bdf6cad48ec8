//! The `spleen-hpc` binary.

fn main() -> std::process::ExitCode {
    spleen_hpc::cli::run()
}
