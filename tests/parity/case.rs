//! A golden case's NIfTI files, and voxels that a tie decides.

use std::path::PathBuf;

use spleen_hpc::data::nifti::{self, Nifti, label_from};
use spleen_hpc::data::resample::Resampling;
use spleen_hpc::data::volume::Volume;

use crate::Outcome;
use crate::golden::Golden;
use crate::tolerance::TIE;

/// Image and label of `nifti/<case>_img.*` and `nifti/<case>_lab.*`.
pub struct Case {
    pub image: Nifti,
    pub label: Option<Volume<u8>>,
}

impl Case {
    pub fn read(golden: &Golden, case: &str) -> Outcome<Self> {
        let image_path =
            find(golden, &format!("{case}_img"))?.ok_or_else(|| format!("no nifti/{case}_img.*"))?;
        let image = nifti::read(&image_path)?;
        let label = match find(golden, &format!("{case}_lab"))? {
            Some(path) => Some(label_from(&nifti::read(&path)?.volume, None, &path)?),
            None => None,
        };
        Ok(Case { image, label })
    }
}

/// The file of this stem in `nifti/`, whatever its suffix; of a pair, the header (it sorts first).
fn find(golden: &Golden, stem: &str) -> Outcome<Option<PathBuf>> {
    let dir = glob::Pattern::escape(&golden.dir.to_string_lossy());
    Ok(glob::glob(&format!("{dir}/nifti/{stem}.*"))?.next().transpose()?)
}

/// Output voxels (C order) whose source coordinate, clamped to the border, lies half way between two voxels: there
/// rounding noise decides the nearest neighbour, in MONAI too.
pub fn ties(r: &Resampling) -> Vec<u8> {
    let [n0, n1, n2] = r.out_shape;
    let mut tie = vec![0; n0 * n1 * n2];
    if r.identity {
        return tie;
    }
    for (at, tie) in tie.iter_mut().enumerate() {
        let o = [at / (n1 * n2), at / n2 % n1, at % n2].map(|v| v as f64);
        *tie = u8::from((0..3).any(|a| {
            let x = (0..3).map(|b| r.xform[a][b] * o[b]).sum::<f64>() + r.xform[a][3];
            let x = x.clamp(0.0, r.in_shape[a] as f64 - 1.0);
            (x - x.floor() - 0.5).abs() < TIE
        }));
    }
    tie
}
