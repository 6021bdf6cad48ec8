//! Prepares every case once and keeps it.
//!
//! A cache file is used if it is whole and was made by the same code path, with the same parameters, from the
//! same content. Content is known by its blake3 hash. Hashing gigabytes at every start would cost more than it
//! guards against, so a source whose size and modification time are those on record is taken to be unchanged,
//! except where it was modified within two seconds of the cache being written (clocks of file systems are that
//! coarse); any other source is hashed and its content decides. A copied or touched data set is therefore not
//! prepared again, and an edited one is.

use std::fs::{File, Metadata};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rayon::prelude::*;

use super::dataset::Case;
use super::{nifti, publish, scan};
use crate::error::{Error, Result};

pub use super::cache_file::{CacheParams, CachedCase, Image, Made, Source, candidates};

/// Raised when preprocessing computes other numbers from the same parameters.
const CHAIN: u32 = 1;
/// Cases prepared at once: one of 512 x 512 x 90 voxels was seen to need 400 MB.
const AT_ONCE: usize = 4;
/// Modification times closer than this are not told apart.
const CLOCK: Duration = Duration::from_secs(2);

/// Told after every case.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Cases done.
    pub done: usize,
    /// Cases in all.
    pub total: usize,
    /// The case.
    pub name: &'a str,
    /// Why it was prepared; `None`: its cache file was good.
    pub prepared: Option<&'a str>,
    /// What was mended while it was prepared, a sentence each.
    pub warnings: &'a [String],
}

/// Opens or prepares every case; the result is in the order of `cases`. `dir` is created.
///
/// Good files are opened in parallel, the rest is prepared in parallel, at most four at once.
pub fn build_all(
    cases: &[Case],
    params: &CacheParams,
    dir: &Path,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<Vec<CachedCase>> {
    publish::folder(dir)?;
    let done = AtomicUsize::new(0);
    let tell = |name: &str, prepared: Option<&str>, warnings: &[String]| {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        progress(Progress { done, total: cases.len(), name, prepared, warnings });
    };
    let mut built: Vec<Result<CachedCase, String>> = cases
        .par_iter()
        .map(|case| {
            let good = reuse(case, params, &file_of(case, params, dir));
            good.inspect(|_| tell(&case.name, None, &[]))
        })
        .collect();
    let mut missing: Vec<(&Case, &mut Result<CachedCase, String>)> =
        cases.iter().zip(&mut built).filter(|(_, b)| b.is_err()).collect();
    for some in missing.chunks_mut(AT_ONCE) {
        some.par_iter_mut().try_for_each(|(case, slot)| {
            let (fresh, warnings) = prepare(case, params, &file_of(case, params, dir))?;
            tell(&case.name, slot.as_ref().err().map(String::as_str), &warnings);
            **slot = Ok(fresh);
            Ok(())
        })?;
    }
    built.into_iter().map(|b| b.map_err(Error::Internal)).collect()
}

/// `<data>/.spleen-hpc-cache`, or, where that cannot be written, a folder of this data set in the user's cache.
pub fn default_dir(data: &Path) -> Result<PathBuf> {
    let beside = data.join(".spleen-hpc-cache");
    if std::fs::create_dir_all(&beside).is_ok() && tempfile::tempfile_in(&beside).is_ok() {
        return Ok(beside);
    }
    let user = user_folder().ok_or_else(|| {
        Error::file(&beside, "cannot be written and there is no home folder; name a --cache-dir")
    })?;
    let dir = user.join(short_hash(&[absolute(data).as_os_str().as_encoded_bytes()]));
    std::fs::create_dir_all(&dir).map_err(Error::io(&dir, "create"))?;
    Ok(dir)
}

/// This program's folder in the user's cache, if there is a home. It may not exist yet.
pub(crate) fn user_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let user = variable("XDG_CACHE_HOME")
        .or_else(|| variable("LOCALAPPDATA"))
        .or_else(|| variable("HOME").map(|home| home.join(".cache")))?;
    Some(user.join("spleen-hpc"))
}

/// One file a (case, parameters): other parameters or another data set never compete for it.
fn file_of(case: &Case, params: &CacheParams, dir: &Path) -> PathBuf {
    let params = serde_json::to_vec(params).expect("plain numbers become JSON");
    let paths = [&case.image, &case.label].map(|p| absolute(p));
    let hash = short_hash(&[
        &params,
        paths[0].as_os_str().as_encoded_bytes(),
        paths[1].as_os_str().as_encoded_bytes(),
    ]);
    dir.join(format!("{}-{hash}.cache", case.name))
}

fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn short_hash(parts: &[&[u8]]) -> String {
    let mut hash = blake3::Hasher::new();
    for part in parts {
        hash.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hash.finalize().to_hex()[..16].to_owned()
}

/// The cache file if it may be used, else why not.
fn reuse(case: &Case, params: &CacheParams, file: &Path) -> Result<CachedCase, String> {
    if !file.exists() {
        return Err("not cached yet".into());
    }
    let cached = CachedCase::open(file).map_err(|e| e.to_string())?;
    let made = cached.made();
    if made.chain != CHAIN || made.params != *params {
        return Err("made by another version or with other parameters".into());
    }
    let written = std::fs::metadata(file).and_then(|m| m.modified()).map_err(|e| e.to_string())?;
    let files = source_files(case);
    if files.len() != made.sources.len() {
        return Err("made from other files".into());
    }
    for (path, on_record) in files.iter().zip(&made.sources) {
        let now = Stat::of(path).map_err(|e| e.to_string())?;
        let unchanged = (now.bytes, now.modified) == (on_record.bytes, on_record.modified);
        if unchanged && UNIX_EPOCH + now.modified + CLOCK < written {
            continue;
        }
        if now.bytes != on_record.bytes || hash(path).map_err(|e| e.to_string())? != on_record.blake3 {
            return Err(format!("{} has changed", path.display()));
        }
    }
    Ok(cached)
}

/// Runs the chain on a case and writes its cache file; also returns what was mended.
fn prepare(case: &Case, params: &CacheParams, file: &Path) -> Result<(CachedCase, Vec<String>)> {
    // Before reading: what changes meanwhile differs from the record and is made again.
    let sources = source_files(case).iter().map(|path| Source::of(path)).collect::<Result<_>>()?;
    let (scan, _) = scan::read_labelled(case, params.label_value, &params.preprocess)?;
    let made = Made { chain: CHAIN, params: params.clone(), sources };
    Ok((CachedCase::write(file, &case.name, made, scan.header, &scan.prepared)?, scan.warnings))
}

/// The files behind a case: one a volume, two where header and voxels are a pair.
fn source_files(case: &Case) -> Vec<PathBuf> {
    [&case.image, &case.label].into_iter().flat_map(nifti::files_of).collect()
}

/// What the file system says of a file.
struct Stat {
    bytes: u64,
    modified: Duration,
}

impl Stat {
    fn of(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path, "read"))?;
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        Ok(Stat {
            bytes: Metadata::len(&metadata),
            modified: modified.duration_since(UNIX_EPOCH).unwrap_or_default(),
        })
    }
}

impl Source {
    fn of(path: &Path) -> Result<Self> {
        let Stat { bytes, modified } = Stat::of(path)?;
        Ok(Source { path: path.display().to_string(), bytes, modified, blake3: hash(path)? })
    }
}

fn hash(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(Error::io(path, "read"))?;
    let mut hash = blake3::Hasher::new();
    hash.update_reader(BufReader::new(file)).map_err(Error::io(path, "read"))?;
    Ok(hash.finalize().to_hex().to_string())
}
