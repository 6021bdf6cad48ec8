//! Whole files or none: written beside their place, synced, renamed.
//!
//! A process that is killed while it writes leaves a file `.writing-RANDOM` behind. Nothing reads such a file: it is
//! hidden, and has none of the endings that anything looks for. The next start that writes into the folder removes it
//! once it is too old to have a writer.

use std::ffi::OsStr;
use std::fs::{self, DirEntry, File};
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};

/// What names of unfinished files begin with.
const PREFIX: &str = ".writing-";
/// A writer never pauses, and the largest file takes minutes. Age, not a lock: locks do not reach across the nodes
/// that share a cluster's file system, and the cache is shared by them.
const DEAD: Duration = Duration::from_secs(3600);

/// Puts what `write` writes at `path` in one step: a crash leaves the old file, or none, never half of the new.
pub(crate) fn publish(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX);
    // Temporary files are private by default; a result is as readable as the user's umask says.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(Error::io(path, "create"))?;
    write(file.as_file_mut()).map_err(Error::io(path, "write"))?;
    file.as_file().sync_all().map_err(Error::io(path, "write"))?;
    file.persist(path).map_err(|e| Error::io(path, "create")(e.error))?;
    // The rename itself is in the folder: without this a power cut may undo it.
    #[cfg(unix)]
    File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io(folder, "write"))?;
    Ok(())
}

/// Makes the folder that results go to, and removes what killed processes were writing there.
pub(crate) fn folder(path: &Path) -> Result<()> {
    if path.is_file() {
        return Err(Error::file(path, "is a file where a folder is needed: name another one"));
    }
    fs::create_dir_all(path).map_err(Error::io(path, "create"))?;
    let entries = fs::read_dir(path).map_err(Error::io(path, "read"))?;
    for entry in entries.flatten().filter(|entry| is_unfinished(&entry.file_name()) && is_dead(entry)) {
        // Another process may have been faster.
        fs::remove_file(entry.path()).ok();
    }
    Ok(())
}

/// Whether [`publish`] gave a file this name until it was whole.
pub(crate) fn is_unfinished(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PREFIX.as_bytes())
}

fn is_dead(entry: &DirEntry) -> bool {
    let modified = entry.metadata().and_then(|m| m.modified());
    modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > DEAD))
}
