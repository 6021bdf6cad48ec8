//! The one error type of the library.
//!
//! What the world did (files, arguments, numbers) is an [`Error`]; a panic means a bug in this program.
//! Every message is one sentence that names the thing, what is wrong with it and, where there is one, the cure.

use std::path::{Path, PathBuf};

/// What went wrong, with everything needed to say it in one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file whose content cannot be used. `what` says what is wrong with it and what to do.
    #[error("{}: {what}", path.display())]
    File {
        /// The offending file.
        path: PathBuf,
        /// What is wrong and what to do about it.
        what: String,
    },
    /// The operating system refused a file operation.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a verb: "read", "write", "create".
        action: &'static str,
        /// The system's own reason.
        source: std::io::Error,
    },
    /// A flag, key or combination of them that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Tensors that do not fit an op.
    #[error("{op}: expected {want}, got {got}")]
    Shape {
        /// The op that refused.
        op: &'static str,
        /// What it needs.
        want: String,
        /// What it was given.
        got: String,
    },
    /// A kernel that the CUDA compiler refuses.
    #[error("{file} does not compile for {arch}:\n{log}")]
    Nvrtc {
        /// File in `kernels/`.
        file: String,
        /// What it was compiled for.
        arch: String,
        /// The compiler's own words, which name our files and lines.
        log: String,
    },
    /// The CUDA driver, its compiler or the device does not do what it should.
    #[error("{0}")]
    Gpu(String),
    /// Device memory is used up.
    #[error(
        "the GPU has no room for {} more{}{} ({} of {} are free): {cure}",
        mib(*.bytes), if .by.is_empty() { "" } else { ", wanted by " }, .by, mib(*.free), mib(*.total)
    )]
    OutOfMemory {
        /// What was under way: step, module, op.
        by: String,
        /// What was asked for.
        bytes: u64,
        /// What the device had left.
        free: u64,
        /// All it has.
        total: u64,
        /// What to do.
        cure: String,
    },
    /// The loss left the numbers.
    #[error("step {step}: the loss is {loss}; {cure}")]
    Diverged {
        /// 1-based optimizer step.
        step: u64,
        /// The loss of that step.
        loss: f32,
        /// Names the last good checkpoint and what to do.
        cure: String,
    },
    /// The user asked to stop before the work was done.
    #[error("interrupted")]
    Interrupted,
    /// Something inside failed that the user did not cause.
    #[error("{0}")]
    Internal(String),
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A file that cannot be used, and why.
    pub fn file(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Error::File { path: path.as_ref().to_owned(), what: what.into() }
    }

    /// Wraps an I/O error with its path: `.map_err(Error::io(path, "read"))`.
    pub fn io(path: impl AsRef<Path>, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { path, action, source }
    }

    /// Names the file that a message about its content ([`Error::Usage`]) does not name; others stay as they are.
    pub fn in_file(self, path: impl AsRef<Path>) -> Self {
        match self {
            Error::Usage(what) => Error::file(path, what),
            other => other,
        }
    }

    /// The process exit code: 2 for what the user can mend (input, flags), 1 for what went wrong inside,
    /// 130 as a shell has it for a command that was interrupted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::File { .. } | Error::Io { .. } | Error::Usage(_) => 2,
            Error::Interrupted => 130,
            Error::Shape { .. }
            | Error::Nvrtc { .. }
            | Error::Gpu(_)
            | Error::OutOfMemory { .. }
            | Error::Diverged { .. }
            | Error::Internal(_) => 1,
        }
    }
}

/// A size for people, at least 1 MiB where there is anything.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
