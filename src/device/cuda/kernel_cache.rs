//! Compiled kernels on disk: one file a kernel file, precision and target.
//!
//! A file's name holds a hash of everything that changes the machine code: text of the kernel and of all headers,
//! options, NVRTC's version. It is renamed into place when whole, so that any number of processes may fill one folder,
//! and begins with a hash of its content: a damaged one is compiled again and replaced. Nothing that goes wrong with
//! the folder stops the work.

use super::driver::Precision;
use super::nvrtc::{Entry, Module, Nvrtc, Target, options};
use super::sources::Source;
use crate::data::cache::user_folder;
use crate::data::publish;
use crate::error::Result;
use std::io::Write;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// The variable that names another folder.
pub const VARIABLE: &str = "SPLEEN_KERNEL_CACHE";
/// How cached files end.
const EXTENSION: &str = "kernel";
/// ptxas recurses: deeper than the 2 MiB of a thread would allow.
const STACK: usize = 16 << 20;

/// A folder of compiled kernels, or none.
#[derive(Clone, Debug)]
pub struct KernelCache {
    folder: Option<PathBuf>,
}

/// A module and where it came from.
#[derive(Debug)]
pub struct Cached {
    /// The compiled kernels.
    pub module: Module,
    /// Whether it was read, not compiled.
    pub hit: bool,
    /// Why it could not be kept, if so.
    pub warning: Option<String>,
}

impl KernelCache {
    /// The folder `SPLEEN_KERNEL_CACHE` names, or else `kernels` in the user's cache.
    pub fn open() -> Self {
        let named = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        KernelCache { folder: named.or_else(|| user_folder().map(|cache| cache.join("kernels"))) }
    }

    /// This folder.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        KernelCache { folder: Some(folder.into()) }
    }

    /// No folder: everything is compiled.
    pub fn none() -> Self {
        KernelCache { folder: None }
    }

    /// Where it is. `None`: there is no home to keep it in.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Number and bytes of its files.
    pub fn size(&self) -> (usize, u64) {
        let entries = self.folder().and_then(|folder| std::fs::read_dir(folder).ok());
        let files = entries.into_iter().flatten().flatten();
        let files = files.filter(|file| file.path().extension().is_some_and(|e| e == EXTENSION));
        let sizes = files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len());
        sizes.fold((0, 0), |(files, bytes), more| (files + 1, bytes + more))
    }

    /// A kernel file's module, read if it is there and good, else compiled and kept.
    ///
    /// # Errors
    /// Those of [`Nvrtc::compile`].
    pub fn module(
        &self,
        nvrtc: &Nvrtc,
        source: &Source<'_>,
        precision: Precision,
        target: &Target,
    ) -> Result<Cached> {
        let key = key(nvrtc.version(), source, precision, target);
        let file = self.file(&key, source, precision, target);
        match file.and_then(|file| std::fs::read(file).ok()).and_then(|bytes| decode(&key, &bytes)) {
            Some(module) => Ok(Cached { module, hit: true, warning: None }),
            None => self.compile(nvrtc, source, precision, target),
        }
    }

    /// A kernel file's module, compiled even if it is there, and kept.
    ///
    /// # Errors
    /// Those of [`Nvrtc::compile`].
    pub fn compile(
        &self,
        nvrtc: &Nvrtc,
        source: &Source<'_>,
        precision: Precision,
        target: &Target,
    ) -> Result<Cached> {
        let key = key(nvrtc.version(), source, precision, target);
        let module = nvrtc.compile(source, precision, target)?;
        let file = self.file(&key, source, precision, target);
        let written = file.map_or(Ok(()), |file| keep(&file, &encode(&key, &module)));
        let warning = written.err().map(|err| format!("a compiled kernel is not kept: {err}"));
        Ok(Cached { module, hit: false, warning })
    }

    /// Where a module is kept.
    fn file(
        &self,
        key: &blake3::Hash,
        source: &Source<'_>,
        precision: Precision,
        target: &Target,
    ) -> Option<PathBuf> {
        let stem = source.file.trim_end_matches(".cu");
        let name = format!("{stem}{}-{target}-{}.{EXTENSION}", precision.suffix(), &key.to_hex()[..16]);
        Some(self.folder()?.join(name))
    }
}

fn keep(path: &Path, bytes: &[u8]) -> Result<()> {
    publish::folder(path.parent().unwrap_or(Path::new(".")))?;
    publish::publish(path, |file| file.write_all(bytes))
}

/// The hash of everything that changes the machine code.
fn key(version: (u32, u32), source: &Source<'_>, precision: Precision, target: &Target) -> blake3::Hash {
    let options = options(version, precision, target);
    let version = format!("NVRTC {}.{}", version.0, version.1);
    let headers = source.headers.iter().flat_map(|&(name, text)| [name, text]);
    let parts = [version.as_str(), source.file, source.text].into_iter();
    let mut hash = blake3::Hasher::new();
    for part in parts.chain(options.iter().map(String::as_str)).chain(headers) {
        hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hash.finalize()
}

/// A file: the hash of the key and of what follows, the length of the entries' JSON, that JSON, the image.
fn encode(key: &blake3::Hash, module: &Module) -> Vec<u8> {
    let entries = serde_json::to_vec(&module.entries).expect("names and numbers become JSON");
    let mut body = (entries.len() as u64).to_le_bytes().to_vec();
    body.extend_from_slice(&entries);
    body.extend_from_slice(&module.image);
    let mut file = blake3::keyed_hash(key.as_bytes(), &body).as_bytes().to_vec();
    file.extend_from_slice(&body);
    file
}

/// `None` for anything but what [`encode`] made of this key.
fn decode(key: &blake3::Hash, file: &[u8]) -> Option<Module> {
    let (hash, body) = file.split_first_chunk::<32>()?;
    if blake3::keyed_hash(key.as_bytes(), body) != *hash {
        return None;
    }
    let (len, rest) = body.split_first_chunk::<8>()?;
    let (entries, image) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    let entries: Vec<Entry> = serde_json::from_slice(entries).ok()?;
    Some(Module { image: image.to_vec(), entries })
}

/// Runs `job` on every item, on as many threads as the machine runs at once; the results are in the order of `items`.
pub fn in_parallel<T: Sync, R: Send>(items: &[T], job: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(items.len());
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let work = || {
        while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < items.len()) {
            let result = job(&items[i]);
            done.lock().expect("a job's panic ends the scope").push((i, result));
        }
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            let started = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
            started.expect("the machine can start a thread");
        }
    });
    let mut done = done.into_inner().expect("every job has ended");
    done.sort_by_key(|&(i, _)| i);
    done.into_iter().map(|(_, result)| result).collect()
}
