//! Ctrl-C and SIGTERM: the first one asks the run to end between two units of work, the second ends it at once.

use std::sync::atomic::{AtomicBool, Ordering};

use super::tell;
use crate::{Error, Result};

static STOP: AtomicBool = AtomicBool::new(false);

/// Watches for signals from now on; the flag becomes true with the first one. `finishing` says on stderr what the
/// run does before it ends. Output files are renamed into place when whole, so ending at once leaves none by halves.
///
/// # Errors
/// [`Error::Internal`] when the system refuses a handler.
pub fn watch(finishing: &'static str) -> Result<&'static AtomicBool> {
    ctrlc::set_handler(move || {
        if STOP.swap(true, Ordering::SeqCst) {
            std::process::exit(super::INTERRUPTED.into());
        }
        tell(format_args!("\ninterrupted: {finishing}; once more ends at once"));
    })
    .map_err(|err| Error::Internal(format!("cannot watch for Ctrl-C: {err}")))?;
    Ok(&STOP)
}
