//! The text of every kernel, embedded when the program was built (build.rs).

use crate::error::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// A kernel file and the headers it may include, by the names that compile errors use.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// File in `kernels/`.
    pub file: &'a str,
    /// What it says.
    pub text: &'a str,
    /// Name and text of the headers.
    pub headers: &'a [(&'a str, &'a str)],
}

/// Every kernel file, sorted.
pub fn all() -> impl Iterator<Item = Source<'static>> {
    KERNELS.iter().map(|&(file, text)| Source { file, text, headers: HEADERS })
}

/// The kernel file of this name.
///
/// # Errors
/// [`Error::Internal`]: an op names a file that is not there.
pub fn find(file: &str) -> Result<Source<'static>> {
    let unknown = || Error::Internal(format!("kernels/{file} is not in this program"));
    all().find(|source| source.file == file).ok_or_else(unknown)
}
