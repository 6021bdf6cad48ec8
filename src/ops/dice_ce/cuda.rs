//! Dice + cross entropy on a CUDA device (kernels/dice_ce.cu).

use crate::config::Loss;
use crate::device::cuda::{Act, Buf, Elem, In, InOut, Info, Kernel, Launch, Out};
use crate::error::{Error, Result};
use crate::tensor::{Shape, View};
use bytemuck::{Pod, Zeroable};

/// The value of the loss and what its gradient needs.
#[derive(Clone, Debug)]
pub struct DeviceDiceCe {
    /// The loss; its Dice term and its cross entropy, unweighted (3).
    pub values: Buf<f32>,
    /// What d loss / dp is made of, for each group: factors of the label and of p, both of background and foreground
    /// (groups, 4).
    slopes: Buf<f32>,
}

/// `DiceCe` of kernels/dice_ce.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SumsArgs {
    logits: In<Elem>,
    labels: In<u8>,
    partials: InOut<f32>,
    ticket: InOut<u32>,
    values: Out<f32>,
    slopes: Out<f32>,
    lambda_dice: f64,
    lambda_ce: f64,
    smooth: f64,
    voxels: u32,
    voxels_per_block: u32,
    squared: u32,
    first_class: u32,
}

/// `DiceCeBackward` of kernels/dice_ce.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BackwardArgs {
    logits: In<Elem>,
    labels: In<u8>,
    slopes: In<f32>,
    scale: In<f32>,
    dlogits: Out<Elem>,
    ce_weight: f32,
    voxels: u32,
    squared: u32,
    unused: u32,
}

static SUMS: Kernel<SumsArgs> = Kernel::new("dice_ce.cu", "dice_ce_sums");
static SUMS_SCALAR: Kernel<SumsArgs> = Kernel::new("dice_ce.cu", "dice_ce_sums_scalar");
static BACKWARD: Kernel<BackwardArgs> = Kernel::new("dice_ce.cu", "dice_ce_backward");
static BACKWARD_SCALAR: Kernel<BackwardArgs> = Kernel::new("dice_ce.cu", "dice_ce_backward_scalar");

/// Threads of the forward kernel.
const THREADS: usize = 512;

/// Threads of the backward kernel.
const BACKWARD_THREADS: u32 = 256;

/// Blocks of the forward kernel a multiprocessor: what its 40 registers a thread allow.
const BLOCKS: usize = 3;

/// Sums of a block, `SUMS` of kernels/dice_ce.cu.
const SUM_COUNT: usize = 6;

/// Voxels a thread has at a time where a group is a multiple of them.
const VECTOR: usize = 4;

/// Voxels a block has at least: 2 vectors a thread.
const MIN_VOXELS: usize = 2 * VECTOR * THREADS;

/// How both kernels cut the voxels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    groups: usize,
    /// Voxels a group.
    voxels: usize,
    /// Voxels a thread has at a time.
    width: usize,
    /// Of the forward kernel.
    voxels_per_block: usize,
}

/// `batch`: all samples are one group. `address`: of the labels, which move as words where they can.
fn plan(shape: Shape, batch: bool, address: u64, info: &Info) -> Plan {
    let groups = if batch { 1 } else { shape.n };
    let voxels = shape.n * shape.voxels() / groups;
    let words = voxels.is_multiple_of(VECTOR) && address.is_multiple_of(VECTOR as u64);
    let share = (voxels * groups).div_ceil(info.multiprocessors as usize * BLOCKS);
    let voxels_per_block = share.max(MIN_VOXELS).next_multiple_of(VECTOR);
    Plan { groups, voxels, width: if words { VECTOR } else { 1 }, voxels_per_block }
}

/// Refuses what is not [N, D, H, W, 2] logits and a label for each voxel; the plan for the rest.
fn check(logits: &View, labels: &Buf<u8>, p: &Loss) -> Result<Plan> {
    let shape = logits.shape;
    if shape.c != 2 || shape.n * shape.voxels() != labels.len() || labels.is_empty() {
        return Err(Error::Shape {
            op: "dice_ce",
            want: format!("[N, D, H, W, 2] logits for {} labels", labels.len()),
            got: shape.to_string(),
        });
    }
    if logits.pending.is_some() {
        return Err(Error::Internal("dice_ce: logits still have a map pending".into()));
    }
    Ok(plan(shape, p.batch, labels.address(), logits.data.cuda().info()))
}

/// The loss of logits [N, D, H, W, 2] against labels (N, D, H, W), values 0 and 1.
///
/// # Errors
/// [`Error::Shape`] when logits have not two channels or labels another number of voxels; those of the device.
pub fn forward(logits: &View, labels: &Buf<u8>, p: &Loss) -> Result<DeviceDiceCe> {
    let plan = check(logits, labels, p)?;
    let cuda = logits.data.cuda();
    let blocks = plan.voxels.div_ceil(plan.voxels_per_block);
    let partials = cuda.buffer(plan.groups * SUM_COUNT * blocks)?;
    let ticket = cuda.buffer::<u32>(1)?;
    ticket.fill(0)?;
    let (values, slopes) = (cuda.buffer(3)?, cuda.buffer(plan.groups * 4)?);
    let args = SumsArgs {
        logits: logits.data.read(),
        labels: labels.read(),
        partials: partials.both(),
        ticket: ticket.both(),
        values: values.write(),
        slopes: slopes.write(),
        lambda_dice: p.lambda_dice,
        lambda_ce: p.lambda_ce,
        smooth: p.smooth,
        voxels: plan.voxels as u32,
        voxels_per_block: plan.voxels_per_block as u32,
        squared: p.squared_pred.into(),
        first_class: (!p.include_background).into(),
    };
    let (totals, warps) =
        (plan.groups * SUM_COUNT * size_of::<f64>(), THREADS / 32 * SUM_COUNT * size_of::<f32>());
    let launch = Launch {
        grid: [blocks as u32, plan.groups as u32, 1],
        threads: THREADS as u32,
        shared: (16 + totals + warps) as u32,
    };
    cuda.launch(if plan.width == 1 { &SUMS_SCALAR } else { &SUMS }, launch, &args)?;
    Ok(DeviceDiceCe { values, slopes })
}

/// d loss / d logits [N, D, H, W, 2], times the loss scale `scale` (1), rounded to the stored precision.
///
/// # Errors
/// Those of [`forward`].
pub fn backward(
    forward: &DeviceDiceCe,
    logits: &View,
    labels: &Buf<u8>,
    p: &Loss,
    scale: &Buf<f32>,
) -> Result<Act> {
    let plan = check(logits, labels, p)?;
    let cuda = logits.data.cuda();
    let dlogits = cuda.act(logits.shape.len())?;
    let args = BackwardArgs {
        logits: logits.data.read(),
        labels: labels.read(),
        slopes: forward.slopes.read(),
        scale: scale.read(),
        dlogits: dlogits.write(),
        ce_weight: (p.lambda_ce / labels.len() as f64) as f32,
        voxels: plan.voxels as u32,
        squared: p.squared_pred.into(),
        unused: 0,
    };
    let mut launch = Launch::over(plan.voxels / plan.width, BACKWARD_THREADS);
    launch.grid[1] = plan.groups as u32;
    cuda.launch(if plan.width == 1 { &BACKWARD_SCALAR } else { &BACKWARD }, launch, &args)?;
    Ok(dlogits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Info {
        Info {
            name: "GPU".into(),
            capability: (9, 0),
            multiprocessors: 132,
            memory: 80 << 30,
            shared_per_block: 99 << 10,
        }
    }

    #[test]
    fn blocks_cover_the_voxels_and_are_there_at_once() {
        for batch in [true, false] {
            for (n, side) in [(1, 3), (3, 5), (1, 96), (8, 96), (8, 160)] {
                let p = plan(Shape::new(n, [side; 3], 2), batch, 0, &machine());
                assert_eq!(p.groups * p.voxels, n * side.pow(3), "{p:?}");
                assert_eq!(p.voxels_per_block % VECTOR, 0, "blocks of whole vectors: {p:?}");
                assert_eq!(p.width == VECTOR, p.voxels.is_multiple_of(VECTOR), "{p:?}");
                let blocks = p.voxels.div_ceil(p.voxels_per_block) * p.groups;
                assert!(blocks <= 132 * BLOCKS + p.groups, "{blocks}: {p:?}");
            }
        }
        let odd = plan(Shape::new(1, [4; 3], 2), true, 0x1002, &machine());
        assert_eq!(odd.width, 1, "labels that are not words");
    }
}
