//! Patches cut on the device against `data::sampler::cut`, which the parity tests hold against MONAI.

use crate::harness::{on_every_device, stored, uniform};
use half::f16;
use spleen_hpc::data::sampler::{self, Intensity, PatchSpec};
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::ops::patch::Spec;
use spleen_hpc::ops::patch::cuda::{CaseTable, ResidentCase, cut};
use spleen_hpc::rng::Philox;
use std::sync::Arc;

/// A volume as the host has it.
struct Volume<T> {
    image: Vec<T>,
    label: Vec<u8>,
    shape: [usize; 3],
}

impl<T: Intensity + bytemuck::Pod> Volume<T> {
    fn new(name: u64, shape: [usize; 3], from: impl Fn(f32) -> T) -> Self {
        let len = shape.iter().product();
        let mut rng = Philox::new(name, 1);
        let image = uniform(Precision::Single, name, len).into_iter().map(from).collect();
        Volume { image, label: (0..len).map(|_| rng.below(2) as u8 + 1).collect(), shape }
    }

    fn resident(&self, cuda: &Arc<Cuda>) -> ResidentCase {
        ResidentCase::new(cuda, &self.image, &self.label, self.shape).unwrap()
    }

    fn cut(&self, spec: &PatchSpec, patch: [usize; 3]) -> (Vec<f32>, Vec<u8>) {
        let len = patch.iter().product();
        let (mut image, mut label) = (vec![f32::NAN; len], vec![u8::MAX; len]);
        let at = (spec.start, patch);
        sampler::cut((&self.image, &self.label), self.shape, at, spec.shift, &mut image, &mut label);
        (image, label)
    }
}

/// Patches inside, over each face, over edges and corners, larger than the volume, and wholly outside.
fn specs(shapes: &[[usize; 3]], patch: [usize; 3]) -> Vec<PatchSpec> {
    let mut specs = Vec::new();
    for (case, shape) in shapes.iter().enumerate() {
        let ends = |a: usize| shape[a] as i64 - patch[a] as i64;
        let starts = [
            [0, 0, 0],
            [0, 1, 2],
            [ends(0), ends(1), ends(2)],
            [ends(0) + 2, 1, -1],
            [-1, ends(1) + 3, ends(2) + 1],
            [-2, -3, -5],
            [1, 0, -(patch[2] as i64)],
            [shape[0] as i64, 0, 0],
            [0, -(patch[1] as i64), 0],
            [0, 0, shape[2] as i64],
        ];
        specs.extend(starts.into_iter().enumerate().map(|(i, start)| PatchSpec {
            case,
            start,
            shift: [0.0, 0.0625, -0.3][i % 3],
        }));
    }
    specs
}

#[test]
fn patches_are_the_samplers() {
    let halves = Volume::new(1, [9, 7, 21], f16::from_f32);
    let floats = Volume::new(2, [5, 12, 10], |v| v);
    on_every_device(|cuda| {
        let table = CaseTable::new(cuda, vec![halves.resident(cuda), floats.resident(cuda)]).unwrap();
        // Widths of whole and of broken groups of 4; more and fewer voxels than a block has threads.
        for patch in [[8, 8, 8], [4, 6, 12], [3, 5, 7], [1, 1, 1], [2, 3, 130], [16, 16, 16]] {
            let drawn = specs(&[halves.shape, floats.shape], patch);
            let queued: Vec<Spec> = drawn.iter().map(|s| Spec::new(s, table.len()).unwrap()).collect();
            let queued = cuda.upload(&queued).unwrap();
            let voxels: usize = patch.iter().product();
            let patches = drawn.len() - 1;
            let image = cuda.act(patches * voxels).unwrap();
            let label = cuda.buffer(patches * voxels).unwrap();
            cut(&table, &queued, patches, patch, &image, &label).unwrap();
            let (image, label) = (image.download().unwrap(), label.download().unwrap());
            for (n, spec) in drawn[..patches].iter().enumerate() {
                let (want, want_label) = match spec.case {
                    0 => halves.cut(spec, patch),
                    _ => floats.cut(spec, patch),
                };
                let want: Vec<f32> = want.into_iter().map(|v| stored(cuda.precision(), v)).collect();
                let range = n * voxels..(n + 1) * voxels;
                assert_eq!(image[range.clone()], want, "image of {spec:?}, {patch:?}");
                assert_eq!(label[range], want_label, "label of {spec:?}, {patch:?}");
            }
        }
    });
}

/// What a captured launch relies on: the same arguments cut other patches once the specs have changed.
#[test]
fn specs_are_read_when_the_launch_runs() {
    let volume = Volume::new(3, [6, 6, 9], |v| v);
    let patch = [4, 4, 4];
    on_every_device(|cuda| {
        let table = CaseTable::new(cuda, vec![volume.resident(cuda)]).unwrap();
        let queued = cuda.buffer::<Spec>(1).unwrap();
        let (image, label) = (cuda.act(64).unwrap(), cuda.buffer(64).unwrap());
        for start in [[0, 1, 2], [2, 2, 5]] {
            let spec = PatchSpec { case: 0, start, shift: 0.25 };
            queued.upload(&[Spec::new(&spec, 1).unwrap()]).unwrap();
            cut(&table, &queued, 1, patch, &image, &label).unwrap();
            let want: Vec<f32> =
                volume.cut(&spec, patch).0.into_iter().map(|v| stored(cuda.precision(), v)).collect();
            assert_eq!(image.download().unwrap(), want);
        }
    });
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    on_every_device(|cuda| {
        let volume = Volume::new(4, [3, 3, 3], |v| v);
        assert!(ResidentCase::new(cuda, &volume.image, &volume.label, [3, 3, 4]).is_err());
        let table = CaseTable::new(cuda, vec![volume.resident(cuda)]).unwrap();
        let specs = cuda.buffer::<Spec>(2).unwrap();
        for (patches, image, label) in [(3, 3, 3), (2, 1, 2), (2, 2, 3), (0, 0, 0)] {
            let (image, label) = (cuda.act(8 * image).unwrap(), cuda.buffer(8 * label).unwrap());
            let refused = cut(&table, &specs, patches, [2, 2, 2], &image, &label).unwrap_err().to_string();
            assert!(refused.starts_with("patch: expected"), "{refused}");
        }
    });
}
