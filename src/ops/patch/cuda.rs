//! Volumes in device memory, and the launch that cuts patches out of them.

use super::Spec;
use crate::data::sampler::Intensity;
use crate::device::cuda::{Act, Buf, Cuda, Elem, In, Kernel, Launch, Out};
use crate::device::nvtx::range;
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// `Case` of kernels/patch.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct CaseArgs {
    image: In<u8>,
    label: In<u8>,
    shape: [u32; 3],
    image_bytes: u32,
}

/// `Cut` of kernels/patch.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct CutArgs {
    cases: In<CaseArgs>,
    specs: In<Spec>,
    image: Out<Elem>,
    label: Out<u8>,
    patch: [u32; 3],
    unused: u32,
}

static CUT_4: Kernel<CutArgs> = Kernel::new("patch.cu", "patch_cut_4");
static CUT_1: Kernel<CutArgs> = Kernel::new("patch.cu", "patch_cut_1");

/// `THREADS` of kernels/patch.cu.
const THREADS: u32 = 256;
/// Blocks along y, one a patch, that CUDA allows.
const MAX_PATCHES: usize = 65_535;

/// A preprocessed volume and its label in device memory.
#[derive(Clone, Debug)]
pub struct ResidentCase {
    image: Buf<u8>,
    image_bytes: u32,
    label: Buf<u8>,
    shape: [u32; 3],
}

impl ResidentCase {
    /// Copies a case in: scaled intensities as they are cached and 0/1 labels, both of `shape` (D, H, W), C order.
    ///
    /// # Errors
    /// [`Error::Shape`] when lengths and shape disagree or there are 2^32 voxels, and those of the device.
    pub fn new<T: Intensity + Pod>(
        cuda: &Arc<Cuda>,
        image: &[T],
        label: &[u8],
        shape: [usize; 3],
    ) -> Result<Self> {
        let voxels: usize = shape.iter().product();
        if image.len() != voxels || label.len() != voxels || u32::try_from(voxels).is_err() {
            return Err(Error::Shape {
                op: "resident case",
                want: format!("image and label of {shape:?} voxels, fewer than 2^32"),
                got: format!("{} and {}", image.len(), label.len()),
            });
        }
        Ok(ResidentCase {
            image: cuda.upload(bytemuck::cast_slice(image))?,
            image_bytes: size_of::<T>() as u32,
            label: cuda.upload(label)?,
            shape: shape.map(|side| side as u32),
        })
    }
}

/// Cases that patches are cut from, as the kernel finds them.
#[derive(Debug)]
pub struct CaseTable {
    table: Buf<CaseArgs>,
    /// What the table points at.
    cases: Vec<ResidentCase>,
}

impl CaseTable {
    /// A table of `cases`; a [`Spec`] counts them from 0.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn new(cuda: &Arc<Cuda>, cases: Vec<ResidentCase>) -> Result<Self> {
        let args = |case: &ResidentCase| CaseArgs {
            image: case.image.read(),
            label: case.label.read(),
            shape: case.shape,
            image_bytes: case.image_bytes,
        };
        let table = cuda.upload(&cases.iter().map(args).collect::<Vec<_>>())?;
        Ok(CaseTable { table, cases })
    }

    /// Number of cases.
    pub fn len(&self) -> usize {
        self.cases.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.cases.is_empty()
    }
}

/// Queues the cutting of the first `patches` of `specs`, each of `patch` (D, H, W) voxels, into `image`
/// (N, D, H, W, 1) and `label` (N, D, H, W). The specs are read when the launch runs, and again when it is replayed.
///
/// # Errors
/// [`Error::Shape`] when the outputs are of other sizes, and those of the device.
pub fn cut(
    cases: &CaseTable,
    specs: &Buf<Spec>,
    patches: usize,
    patch: [usize; 3],
    image: &Act,
    label: &Buf<u8>,
) -> Result<()> {
    let voxels = patches * patch.iter().product::<usize>();
    if image.len() != voxels
        || label.len() != voxels
        || !(1..=specs.len().min(MAX_PATCHES)).contains(&patches)
    {
        return Err(Error::Shape {
            op: "patch",
            want: format!("{patches} specs, images and labels of {patch:?} voxels"),
            got: format!("{} specs, {} and {} voxels", specs.len(), image.len(), label.len()),
        });
    }
    let _range = range("patch");
    let args = CutArgs {
        cases: cases.table.read(),
        specs: specs.read(),
        image: image.write(),
        label: label.write(),
        patch: patch.map(|side| side as u32),
        unused: 0,
    };
    let (kernel, launch) = plan(patches, patch);
    image.cuda().launch(kernel, launch, &args)
}

/// 4 voxels of a row a thread where they divide the row, and one patch along y.
fn plan(patches: usize, patch: [usize; 3]) -> (&'static Kernel<CutArgs>, Launch) {
    let (kernel, width) = if patch[2].is_multiple_of(4) { (&CUT_4, 4) } else { (&CUT_1, 1) };
    let mut launch = Launch::over(patch.iter().product::<usize>() / width, THREADS);
    launch.grid[1] = patches as u32;
    (kernel, launch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_cuts_four_voxels_where_they_divide_a_row() {
        let bundle = plan(8, [96; 3]);
        assert!(std::ptr::eq(bundle.0, &CUT_4));
        assert_eq!(bundle.1, Launch { grid: [864, 8, 1], threads: 256, shared: 0 });
        let odd = plan(3, [4, 4, 17]);
        assert!(std::ptr::eq(odd.0, &CUT_1));
        assert_eq!(odd.1.grid, [2, 3, 1]);
    }
}
