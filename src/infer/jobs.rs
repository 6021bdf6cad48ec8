//! Which file a segmentation goes to, decided and checked for all inputs before the first one is read.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Endings that a scan's name may have, longest first.
const ENDINGS: [&str; 6] = [".nii.gz", ".img.gz", ".hdr.gz", ".nii", ".hdr", ".img"];

/// How masks are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `OUT/STEM.nii.gz`, u8, with the source's affine, codes and units.
    Mask,
    /// `OUT/STEM/STEM_trans.nii.gz`, float32, both codes 1: what the bundle's `SaveImaged` leaves.
    Bundle,
}

/// One scan to segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The scan.
    pub input: PathBuf,
    /// Where its mask goes.
    pub output: PathBuf,
}

/// Name of a scan without folder and ending: `a/spleen_2.nii.gz` is `spleen_2`.
pub fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let ending = ENDINGS.iter().find(|ending| name.to_ascii_lowercase().ends_with(**ending));
    name[..name.len() - ending.map_or(0, |ending| ending.len())].to_owned()
}

/// Names the output of every input by its stem, or by its whole name where the stem is another's, too: `a.nii` beside
/// `a.nii.gz` becomes `a.nii.nii.gz` beside `a.nii.gz.nii.gz`.
///
/// # Errors
/// [`Error::Usage`] when two inputs would share an output, or an output would replace an input.
pub fn jobs(inputs: &[PathBuf], out: &Path, style: Style) -> Result<Vec<Job>> {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let sources: HashMap<PathBuf, &PathBuf> = inputs.iter().map(|input| (real(input), input)).collect();
    let mut sharing: HashMap<String, usize> = HashMap::new();
    inputs.iter().for_each(|input| *sharing.entry(stem(input)).or_default() += 1);
    let mut taken: HashMap<String, &PathBuf> = HashMap::new();
    inputs
        .iter()
        .map(|input| {
            let stem = match stem(input) {
                shared if sharing[&shared] > 1 => {
                    input.file_name().unwrap_or_default().to_string_lossy().into_owned()
                }
                own => own,
            };
            if let Some(other) = taken.insert(stem.clone(), input) {
                return Err(Error::Usage(format!(
                    "{} and {} would both be written as `{stem}`: give them to two runs with different --out",
                    other.display(),
                    input.display()
                )));
            }
            let output = match style {
                Style::Mask => out.join(format!("{stem}.nii.gz")),
                Style::Bundle => out.join(&stem).join(format!("{stem}_trans.nii.gz")),
            };
            match sources.get(&real(&output)) {
                Some(source) => Err(Error::Usage(format!(
                    "the mask of {} would overwrite the scan {}: choose another --out",
                    input.display(),
                    source.display()
                ))),
                None => Ok(Job { input: input.clone(), output }),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stems_lose_folder_and_ending() {
        for (path, want) in [
            ("a/spleen_2.nii.gz", "spleen_2"),
            ("b.c/x.y.NII", "x.y"),
            ("pair.hdr", "pair"),
            ("no_ending", "no_ending"),
            ("Grüße.nii", "Grüße"),
        ] {
            assert_eq!(stem(Path::new(path)), want);
        }
    }

    #[test]
    fn outputs_never_collide_with_each_other_or_an_input() {
        let dir = tempfile::tempdir().unwrap();
        let scan = dir.path().join("a.nii.gz");
        std::fs::write(&scan, b"scan").unwrap();
        let err = jobs(std::slice::from_ref(&scan), dir.path(), Style::Mask).unwrap_err().to_string();
        assert!(err.contains("would overwrite the scan"), "{err}");
        let fine = jobs(std::slice::from_ref(&scan), dir.path(), Style::Bundle).unwrap();
        assert_eq!(fine[0].output, dir.path().join("a/a_trans.nii.gz"));
        let err = jobs(&["x/a.nii".into(), "y/a.nii".into()], Path::new("out"), Style::Mask).unwrap_err();
        assert!(err.to_string().starts_with("x/a.nii and y/a.nii would both be written as `a.nii`"), "{err}");
        let told_apart = jobs(&["a.nii".into(), "a.hdr".into()], Path::new("out"), Style::Mask).unwrap();
        let outputs: Vec<_> = told_apart.iter().map(|job| job.output.to_str().unwrap()).collect();
        assert_eq!(outputs, ["out/a.nii.nii.gz", "out/a.hdr.nii.gz"]);
    }
}
