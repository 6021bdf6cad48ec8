//! Which files make a data set, and which cases validate.
//!
//! Folders are laid out as in the Medical Segmentation Decathlon (imagesTr, labelsTr, imagesTs) and listed as the
//! MONAI bundle does: every image of imagesTr in lexicographic order of its path, dot-files skipped (archives
//! made on a Mac carry `._*` shadows). `dataset.json` is read only where imagesTr holds no image.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

/// An image and its label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The image's file name without folder and ending.
    pub name: String,
    /// The CT.
    pub image: PathBuf,
    /// The label map on the same grid.
    pub label: PathBuf,
}

/// Which cases validate; both rules go by position in the sorted list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The last `n` cases; `None` is the bundle's 9, but at most every fifth case (rounded up) and never all:
    /// 41 cases give 9, 16 give 4, 2 give 1, 1 gives none.
    Last(Option<usize>),
    /// Case i validates if i mod `folds` = `fold`, so every fold sees the whole length of the list.
    Fold {
        /// Number of folds, at least 2.
        folds: usize,
        /// The fold that validates, from 0.
        fold: usize,
    },
}

impl Split {
    /// Splits `n` cases: (training, validation) indices, both ascending. Refuses a split that trains on nothing.
    pub fn apply(&self, n: usize) -> Result<(Vec<usize>, Vec<usize>)> {
        let validates: Box<dyn Fn(usize) -> bool> = match *self {
            Split::Last(count) => {
                let count = count.unwrap_or(n.div_ceil(5).min(9).min(n.saturating_sub(1)));
                if count >= n {
                    return Err(Error::Usage(format!(
                        "{count} validation cases of {n} leave none to train on: lower --val-cases"
                    )));
                }
                Box::new(move |i| i >= n - count)
            }
            Split::Fold { folds, fold } => {
                if folds < 2 || fold >= folds || folds > n {
                    return Err(Error::Usage(format!(
                        "fold {fold} of {folds} cannot be taken of {n} cases: choose 2 <= folds <= {n} and fold < folds"
                    )));
                }
                Box::new(move |i| i % folds == fold)
            }
        };
        Ok((0..n).partition(|&i| !validates(i)))
    }
}

/// The labelled cases of a data set, in the bundle's order.
pub fn training_cases(dir: impl AsRef<Path>) -> Result<Vec<Case>> {
    let dir = dir.as_ref();
    must_be_folder(dir)?;
    let images = volumes_in(&dir.join("imagesTr"))?;
    if images.is_empty() {
        return listed_cases(dir);
    }
    pair(images, volumes_in(&dir.join("labelsTr"))?, &dir.join("labelsTr"))
}

/// Every volume that `inputs` name: files as they are, folders and globs by the `.nii`, `.nii.gz` and `.hdr`
/// (of a pair) they hold, dot-files skipped. Lexicographic order of the paths, each file once.
pub fn expand_inputs(inputs: &[String]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for input in inputs {
        // Without the `.` components, that one file has one place in the order.
        let path: PathBuf = Path::new(input).components().collect();
        if path.exists() {
            found.extend(volumes_at(&path)?);
            continue;
        }
        let options = glob::MatchOptions { require_literal_leading_dot: true, ..Default::default() };
        let matches = glob::glob_with(input, options)
            .map_err(|e| Error::Usage(format!("{input}: not a file, a folder or a valid glob ({e})")))?;
        let before = found.len();
        for path in matches {
            let path = path.map_err(|e| {
                let folder = e.path().to_owned();
                Error::io(folder, "read")(e.into())
            })?;
            // A match by accident, such as the JSON beside the volumes, is not an input.
            if path.is_dir() || volume_name(&path).is_some() {
                found.extend(volumes_at(&path)?);
            }
        }
        if found.len() == before {
            let what = match input.contains(['*', '?', '[']) {
                true => "matches no volume (.nii, .nii.gz or .hdr); check the pattern",
                false => "does not exist; check the path",
            };
            return Err(Error::file(input, what));
        }
    }
    sort(&mut found);
    let mut seen = BTreeSet::new();
    found.retain(|path| seen.insert(path.canonicalize().unwrap_or_else(|_| path.clone())));
    Ok(found)
}

/// A file is itself; a folder is the volumes in it, of which there must be one.
fn volumes_at(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let volumes = volumes_in(path)?;
    if volumes.is_empty() {
        return Err(Error::file(path, "holds no volume (.nii, .nii.gz or .hdr); name the folder that does"));
    }
    Ok(volumes)
}

/// The volumes directly in a folder, sorted; none if there is no such folder.
fn volumes_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(folder, "read")(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io(folder, "read"))?.path();
        if volume_name(&path).is_some() && !path.is_dir() {
            found.push(path);
        }
    }
    sort(&mut found);
    Ok(found)
}

/// File name without the ending of a volume, whatever its case; `None` for other files and dot-files.
fn volume_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_string_lossy();
    let lower = name.to_ascii_lowercase();
    let stem = [".nii.gz", ".nii", ".hdr"].iter().find_map(|ending| lower.strip_suffix(ending))?;
    let stem = &name[..stem.len()];
    (!stem.is_empty() && !stem.starts_with('.')).then(|| stem.to_owned())
}

/// Python's order of path strings: by character, not by path component.
fn sort(paths: &mut [PathBuf]) {
    paths.sort_by(|a, b| OsStr::cmp(a.as_os_str(), b.as_os_str()));
}

/// Pairs images with the labels of the same name; `labels_dir` is for the sentence.
fn pair(images: Vec<PathBuf>, labels: Vec<PathBuf>, labels_dir: &Path) -> Result<Vec<Case>> {
    let mut by_name = index(labels)?;
    let cases = index(images)?
        .into_values()
        .map(|image| {
            let name = volume_name(&image).unwrap_or_default();
            let label = by_name.remove(&name).ok_or_else(|| {
                Error::file(
                    &image,
                    format!(
                        "has no label {name}.nii.gz in {}; add it or move the image away",
                        labels_dir.display()
                    ),
                )
            })?;
            Ok(Case { name, image, label })
        })
        .collect::<Result<Vec<_>>>();
    let mut cases = cases?;
    if let Some(label) = by_name.into_values().next() {
        return Err(Error::file(&label, "labels no image of imagesTr; add the image or move the label away"));
    }
    cases.sort_by(|a, b| OsStr::cmp(a.image.as_os_str(), b.image.as_os_str()));
    Ok(cases)
}

fn index(paths: Vec<PathBuf>) -> Result<BTreeMap<String, PathBuf>> {
    let mut by_name = BTreeMap::new();
    for path in paths {
        let name = volume_name(&path).unwrap_or_default();
        if let Some(other) = by_name.insert(name, path.clone()) {
            let what = format!("is the same case as {}; keep one of the two", other.display());
            return Err(Error::file(&path, what));
        }
    }
    Ok(by_name)
}

/// What is used of a `dataset.json`; paths are relative to its folder.
#[derive(Deserialize)]
struct Contents {
    #[serde(default)]
    training: Vec<Pair>,
}

#[derive(Deserialize)]
struct Pair {
    image: String,
    label: String,
}

fn read_contents(listed: &Path) -> Result<Contents> {
    let text = std::fs::read(listed).map_err(Error::io(listed, "read"))?;
    serde_json::from_slice(&text).map_err(|e| {
        Error::file(
            listed,
            format!("is not a Decathlon dataset.json ({e}); mend it or use imagesTr and labelsTr"),
        )
    })
}

fn existing(listed: &Path, path: PathBuf) -> Result<PathBuf> {
    // "./imagesTr/a.nii.gz" and "imagesTr/a.nii.gz" are one path.
    let path: PathBuf = path.components().collect();
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::file(
        listed,
        format!("lists {}, which does not exist; add the file or mend the list", path.display()),
    ))
}

fn listed_cases(dir: &Path) -> Result<Vec<Case>> {
    let listed = dir.join("dataset.json");
    if !listed.is_file() {
        let what = "holds neither imagesTr/*.nii.gz with labelsTr/*.nii.gz nor a dataset.json; name a Decathlon folder";
        return Err(Error::file(dir, what));
    }
    let contents = read_contents(&listed)?;
    let mut cases = contents
        .training
        .iter()
        .map(|pair| {
            let image = existing(&listed, dir.join(&pair.image))?;
            let label = existing(&listed, dir.join(&pair.label))?;
            let name = volume_name(&image).ok_or_else(|| {
                Error::file(&image, "is no volume (.nii, .nii.gz or .hdr); mend dataset.json")
            })?;
            Ok(Case { name, image, label })
        })
        .collect::<Result<Vec<_>>>()?;
    if cases.is_empty() {
        return Err(Error::file(
            &listed,
            "lists no training case; fill \"training\" or add imagesTr and labelsTr",
        ));
    }
    cases.sort_by(|a, b| OsStr::cmp(a.image.as_os_str(), b.image.as_os_str()));
    Ok(cases)
}

fn must_be_folder(dir: &Path) -> Result<()> {
    match dir.is_dir() {
        true => Ok(()),
        false => Err(Error::file(dir, "is not a folder; name one with imagesTr and labelsTr")),
    }
}
