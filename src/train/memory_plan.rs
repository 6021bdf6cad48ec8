//! What training needs of a CUDA device's memory, before anything is allocated, and whether the data set fits beside it.
//!
//! The figures are upper bounds, so that a data set taken to fit does fit; a step that is estimated not to fit may
//! still do. Buffers come from a pool that keeps every size it ever gave out, so nothing is counted as reused:
//! * weights: the f32 master, its gradient and Adam's two moments (Novograd has one), and two packed copies in the
//!   activations' precision, for the forward pass and for the gradient of the input;
//! * activations: each level writes at most four tensors on its way down (two convolutions, the shortcut, their sum)
//!   and four on its way up (transposed convolution, its activated copy, convolution, sum). The backward pass adds at
//!   most three gradients of their sizes at a time: of an op's output, of its input, and of the shortcut, which waits. An
//!   eighth on top is for the norms' statistics of each tile and for rounding up; `WORKSPACE` for partial sums;
//! * the data set: an image as it is cached and a label byte for each voxel.
//!
//! The windows of validation are not in it.

use std::fmt;

use crate::config::{CacheDtype, Net, Sampling};
use crate::device::cuda::Precision;
use crate::infer::predict::CLASSES;
use crate::nn::state_dict::names;

/// Bytes for partial sums of weight gradients over the whole network: the bound that the kernels' plans keep.
const WORKSPACE: u64 = 120 << 20;
/// Floats a parameter: value, gradient, two moments.
const FLOATS: u64 = 4;
/// Tensors of a level's size on its way down, and again on its way up: four activations, three gradients.
const TENSORS: u64 = 7;

/// Bytes by what they are for. Printed, it is a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, gradients, moments, packed weights.
    pub network_bytes: u64,
    /// Everything that a step computes and its batch.
    pub activations_bytes: u64,
    /// All training cases.
    pub dataset_bytes: u64,
    /// What the device has to give.
    pub free_bytes: u64,
    /// Whether the data set is to live on the device. If not, batches are cut by the host and copied in.
    pub resident: bool,
}

impl MemoryPlan {
    /// The plan for training `net` on cases of the given `shapes` (D, H, W) with images cached as `dtype`, on a device
    /// that has `free_bytes`.
    pub fn new(
        net: &Net,
        sampling: &Sampling,
        precision: Precision,
        (shapes, dtype): (&[[usize; 3]], CacheDtype),
        free_bytes: u64,
    ) -> Self {
        let elem = precision.bytes() as u64;
        let parameters: u64 = names(net).iter().map(|(_, shape)| product(shape)).sum();
        let network_bytes = parameters * (FLOATS * 4 + 2 * elem);
        let patches = sampling.samples_per_volume * sampling.volumes_per_step.min(shapes.len());
        let patches = patches as u64;
        let stored = patches * TENSORS * level_elements(net, sampling.patch) * elem;
        // Image and label; two of them, so that one can be filled while the other is used.
        let batch = 2 * patches * product(&sampling.patch) * (elem + 1);
        let activations_bytes = stored + stored / 8 + batch + WORKSPACE;
        let image = match dtype {
            CacheDtype::F16 => 2,
            CacheDtype::F32 => 4,
        };
        let dataset_bytes = shapes.iter().map(|shape| product(shape) * (image + 1)).sum();
        let resident = network_bytes + activations_bytes + dataset_bytes <= free_bytes;
        MemoryPlan { network_bytes, activations_bytes, dataset_bytes, free_bytes, resident }
    }
}

/// Elements of one tensor of each level, down and up, of one patch.
fn level_elements(net: &Net, patch: [usize; 3]) -> u64 {
    let voxels = |level: usize| product(&patch.map(|side| side.div_ceil(1 << level)));
    let last = net.channels.len() - 1;
    let tensor = |(level, &channels): (usize, &usize)| {
        let above = if level == 0 { CLASSES } else { net.channels[level - 1] };
        // The bottom keeps the resolution of the level above it and has no way up.
        match level == last {
            true => channels as u64 * voxels(last),
            false => channels as u64 * voxels(level + 1) + above as u64 * voxels(level),
        }
    };
    net.channels.iter().enumerate().map(tensor).sum::<u64>()
}

fn product(sides: &[usize]) -> u64 {
    sides.iter().map(|&side| side as u64).product()
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.resident { "on the device" } else { "staged: batches are cut by the host" };
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        writeln!(f, "device memory, MiB (at most)")?;
        writeln!(f, "  weights and optimizer  {:>10.1}", mib(self.network_bytes))?;
        writeln!(f, "  activations of a step  {:>10.1}", mib(self.activations_bytes))?;
        writeln!(f, "  data set               {:>10.1}  {place}", mib(self.dataset_bytes))?;
        write!(f, "  free                   {:>10.1}", mib(self.free_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Norm, Recipe};

    #[test]
    fn a_small_net_is_counted_by_hand() {
        let net = Net { norm: Norm::Instance, channels: vec![4, 8] };
        // Down to 4^3: 4 x 64 each; up to 8^3: 2 x 512; bottom at 4^3: 8 x 64.
        assert_eq!(level_elements(&net, [8; 3]), 4 * 64 + 2 * 512 + 8 * 64);
        let sampling = Sampling {
            patch: [8; 3],
            samples_per_volume: 2,
            volumes_per_step: 3,
            ..Config::for_recipe(Recipe::Seed).sampling
        };
        let shapes = [[10, 10, 10], [2, 3, 4]];
        let plan = |free| MemoryPlan::new(&net, &sampling, Precision::Half, (&shapes, CacheDtype::F16), free);
        // Two volumes only, so four patches.
        let stored = 4 * 7 * 1792 * 2;
        let tight = plan(0);
        assert_eq!(tight.activations_bytes, stored + stored / 8 + 2 * 4 * 512 * 3 + (120 << 20));
        assert_eq!(tight.dataset_bytes, 3 * 1024);
        let needed = tight.network_bytes + tight.activations_bytes + tight.dataset_bytes;
        assert!(!tight.resident && !plan(needed - 1).resident && plan(needed).resident);
        let single = MemoryPlan::new(&net, &sampling, Precision::Single, (&shapes, CacheDtype::F32), 0);
        assert_eq!(single.dataset_bytes, 5 * 1024);
        assert!(single.activations_bytes > tight.activations_bytes);
        // 16 bytes of f32 and two packed copies.
        assert_eq!(single.network_bytes / 24, tight.network_bytes / 20);
    }

    /// The bundle's step on 8 patches with 32 cases of its usual grid needs a few GiB: resident on any data-centre GPU,
    /// staged on a small one.
    #[test]
    fn the_bundle_is_resident_on_a_large_device() {
        let config = Config::for_recipe(Recipe::Seed);
        let sampling =
            Sampling { volumes_per_step: 2, samples_per_volume: 4, patch: [96; 3], ..config.sampling };
        let shapes = [[270, 270, 224]; 32];
        let plan =
            |free| MemoryPlan::new(&config.net, &sampling, Precision::Half, (&shapes, CacheDtype::F16), free);
        let large = plan(80_000_000_000);
        assert!(large.resident);
        let gib = f64::from(1 << 30);
        // 4.8 M parameters of 20 bytes; 7.2 elements a voxel, seven tensors.
        assert!((0.08..0.10).contains(&(large.network_bytes as f64 / gib)), "{large}");
        assert!((0.8..1.1).contains(&(large.activations_bytes as f64 / gib)), "{large}");
        assert!(!plan(2 << 30).resident);
        let text = large.to_string();
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(text.contains("on the device") && plan(0).to_string().contains("staged"), "{text}");
    }
}
