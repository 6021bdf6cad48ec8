//! Training patches cut on a CUDA device out of volumes that stay in its memory (kernels/patch.cu). What a patch is,
//! and the CPU's version, is `data::sampler`.

pub mod cuda;

use crate::data::sampler::{self, PatchSpec};
use crate::device::cuda::{Compared, Cuda, SelfTest, agree};
use crate::error::{Error, Result};
use crate::ops::self_test::{stored, uniform};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// One patch to cut: `Spec` of kernels/patch.cu.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Spec {
    /// Index of the case.
    case: u32,
    /// First voxel (D, H, W) in the volume; negative where the volume is padded in front.
    start: [i32; 3],
    /// Added to every intensity.
    shift: f32,
}

impl Spec {
    /// The same patch as the kernel takes it, out of `cases` volumes.
    ///
    /// # Errors
    /// [`Error::Internal`] for a case that there is not or a start beyond 2^30: a kernel cannot refuse them.
    pub fn new(spec: &PatchSpec, cases: usize) -> Result<Self> {
        if spec.case >= cases || spec.start.iter().any(|s| s.unsigned_abs() > 1 << 30) {
            return Err(Error::Internal(format!("{spec:?} is no patch of {cases} cases")));
        }
        Ok(Spec { case: spec.case as u32, start: spec.start.map(|s| s as i32), shift: spec.shift })
    }
}

/// See [`SelfTest`].
pub const SELF_TESTS: &[SelfTest] = &[SelfTest { name: "patch", run: self_test }];

/// A patch that reaches outside its volume.
fn self_test(cuda: &Arc<Cuda>) -> Result<String> {
    let (shape, patch, voxels) = ([9, 7, 10], [8, 8, 8], 512);
    let image = uniform(1, shape.iter().product());
    let label: Vec<u8> = image.iter().map(|&v| u8::from(v > 0.0)).collect();
    let spec = PatchSpec { case: 0, start: [2, -1, 1], shift: 0.25 };
    let (mut want, mut want_label) = (vec![0.0; voxels], vec![0; voxels]);
    let at = (spec.start, patch);
    sampler::cut((&image, &label), shape, at, spec.shift, &mut want, &mut want_label);

    let case = cuda::ResidentCase::new(cuda, &image, &label, shape)?;
    let cases = cuda::CaseTable::new(cuda, vec![case])?;
    let (image, label) = (cuda.act(voxels)?, cuda.buffer(voxels)?);
    cuda::cut(&cases, &cuda.upload(&[Spec::new(&spec, cases.len())?])?, 1, patch, &image, &label)?;
    let floats = |label: &[u8]| label.iter().map(|&l| f32::from(l)).collect();
    let (got, want_label) = (floats(&label.download()?), floats(&want_label));
    agree(&[
        Compared { name: "image", got: image.download()?, want, allowed: stored(cuda) },
        Compared { name: "label", got, want: want_label, allowed: 0.0 },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_that_no_case_has_are_refused() {
        let spec = PatchSpec { case: 2, start: [-3, 0, 1 << 30], shift: 0.5 };
        let kept = Spec { case: 2, start: [-3, 0, 1 << 30], shift: 0.5 };
        assert_eq!(Spec::new(&spec, 3).ok(), Some(kept));
        assert!(Spec::new(&spec, 2).is_err());
        assert!(Spec::new(&PatchSpec { start: [0, -(1 << 30) - 1, 0], ..spec }, 3).is_err());
    }
}
