//! Whole files or none: written beside their place, synced, renamed.

use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};

/// Puts `bytes` at `path` in one step: a crash leaves the old file, or none, never half of the new one.
pub(super) fn publish(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".writing-");
    // Temporary files are private by default; a result is as readable as the user's umask says.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(Error::io(path, "create"))?;
    file.write_all(bytes).map_err(Error::io(path, "write"))?;
    file.as_file().sync_all().map_err(Error::io(path, "write"))?;
    file.persist(path).map_err(|e| Error::io(path, "create")(e.error))?;
    // The rename itself is in the folder: without this a power cut may undo it.
    #[cfg(unix)]
    std::fs::File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io(folder, "write"))?;
    Ok(())
}
