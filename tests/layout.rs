//! The house rules that a compiler does not check: modules use only those above them, files stay small.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules in the order in which data flows.
const FLOW: &[&str] = &[
    "error", "rng", "config", "data", "device", "tensor", "ops", "nn", "metrics", "infer", "report", "train",
    "bench", "cli",
];

/// A file this long is probably two things.
const MAX_LINES: usize = 500;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(under: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(under).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Modules of this crate named in `text` as `crate::module`.
fn uses(text: &str) -> impl Iterator<Item = &str> {
    text.split("crate::").skip(1).map(|rest| {
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        &rest[..end]
    })
}

#[test]
fn modules_use_only_those_above_them() {
    let src = root().join("src");
    let mut seen = 0;
    for path in files(&src, "rs") {
        let relative = path.strip_prefix(&src).expect("below src");
        let module = relative.iter().next().and_then(|m| m.to_str()).expect("a name").trim_end_matches(".rs");
        if matches!(module, "lib" | "main") {
            continue;
        }
        let rank = |m: &str| FLOW.iter().position(|f| *f == m);
        let own = rank(module).unwrap_or_else(|| panic!("{} is in no module of FLOW", path.display()));
        for used in uses(&fs::read_to_string(&path).expect("readable")) {
            if let Some(other) = rank(used) {
                assert!(other <= own, "{} may not use {used}", relative.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 50, "the scan found only {seen} uses: it no longer reads the sources");
}

#[test]
fn files_stay_small() {
    for folder in ["src", "tests", "benches", "kernels"] {
        for path in files(&root().join(folder), "rs").into_iter().chain(files(&root().join(folder), "cu")) {
            let lines = fs::read_to_string(&path).expect("readable").lines().count();
            assert!(lines <= MAX_LINES, "{} has {lines} lines: is it two things?", path.display());
        }
    }
}

#[test]
fn every_kernel_belongs_to_an_op() {
    for kernel in files(&root().join("kernels"), "cu") {
        let stem = kernel.file_stem().and_then(|s| s.to_str()).expect("a name");
        // Named after its op, or after an op and one of its passes or parts: conv3d.cu, conv3d_wgrad.cu.
        let ops = root().join("src/ops");
        let op = |name: &str| ops.join(name).with_extension("rs").exists() || ops.join(name).is_dir();
        let pass = stem.rsplit_once('_').is_some_and(|(name, _)| op(name));
        assert!(op(stem) || pass, "{} has no op", kernel.display());
    }
}

#[test]
fn unsafe_code_says_what_must_hold() {
    for path in files(&root().join("src"), "rs") {
        let text = fs::read_to_string(&path).expect("readable");
        let mut safety = None;
        for (number, line) in text.lines().enumerate() {
            if line.contains("SAFETY") || line.contains("# Safety") {
                safety = Some(number);
            }
            // A note may stand above a group of one-line methods, as in device/lanes.rs.
            let reach = if path.ends_with("device/lanes.rs") { 40 } else { 8 };
            let code = line.split("//").next().unwrap_or("");
            if code.contains("unsafe {") || code.contains("unsafe impl") {
                let near = safety.is_some_and(|s| number - s <= reach);
                assert!(near, "{}:{} has no SAFETY note", path.display(), number + 1);
            }
        }
    }
}
