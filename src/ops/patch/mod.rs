//! Training patches cut on a CUDA device out of volumes that stay in its memory (kernels/patch.cu). What a patch is,
//! and the CPU's version, is `data::sampler`.

pub mod cuda;

use crate::data::sampler::PatchSpec;
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};

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
