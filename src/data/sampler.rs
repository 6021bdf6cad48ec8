//! Where patches are cut: MONAI's `RandCropByPosNegLabeld` and `RandShiftIntensityd` as pure functions.
//!
//! A patch is a function of (seed, epoch, place in the epoch, number of the patch), so a resumed run needs no
//! generator state and threads need no order. The distribution is MONAI's; its MT19937 sequence is not.
//!
//! A volume smaller than the patch, which MONAI refuses, is taken to stand in zeros as the sliding window pads
//! it: half of what is missing, rounded down, in front of the volume. The volume itself, its lists of
//! candidates and its geometry stay as they are; only [`PatchSpec::start`] may be negative.

use half::f16;

use crate::config::Sampling;
use crate::rng::Philox;

/// Streams of random numbers.
const SHUFFLE: u64 = 0x5348_5546;
const CROP: u64 = 0x4352_4f50;
const SHIFT: u64 = 0x5348_4654;

/// A volume's shape and the flat C-order indices of its voxels that may be a patch's centre.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a> {
    /// Voxels (D, H, W).
    pub shape: [usize; 3],
    /// Voxels of the organ: label != 0.
    pub fg: &'a [u32],
    /// Voxels of the body without it: scaled intensity > 0 and label = 0.
    pub bg: &'a [u32],
}

/// One patch to cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PatchSpec {
    /// Index of the case.
    pub case: usize,
    /// First voxel (D, H, W) in the volume; negative where the volume is padded in front.
    pub start: [i64; 3],
    /// Added to every intensity.
    pub shift: f32,
}

/// Optimizer steps of an epoch over `cases` volumes: the last one takes what is left (drop_last False).
pub fn steps_per_epoch(cases: usize, sampling: &Sampling) -> usize {
    cases.div_ceil(sampling.volumes_per_step)
}

/// The patches of a step (0-based, of a 0-based epoch): volume 0's, then volume 1's, as MONAI stacks them.
///
/// Every epoch shuffles the cases anew. An empty list of candidates is replaced by the other one; a volume
/// without any candidate is drawn from everywhere ([`warnings`] tells).
pub fn draw(
    cases: &[Candidates<'_>],
    sampling: &Sampling,
    seed: u64,
    epoch: u64,
    step: usize,
) -> Vec<PatchSpec> {
    let mut order: Vec<usize> = (0..cases.len()).collect();
    Philox::keyed(seed, &[SHUFFLE, epoch]).shuffle(&mut order);
    let first = step * sampling.volumes_per_step;
    let places = first..(first + sampling.volumes_per_step).min(cases.len());
    places
        .flat_map(|place| (0..sampling.samples_per_volume).map(move |sample| (place, sample)))
        .map(|(place, sample)| {
            let case = order[place];
            let name = |purpose| [purpose, epoch, place as u64, sample as u64];
            PatchSpec {
                case,
                start: start(&cases[case], sampling, &mut Philox::keyed(seed, &name(CROP))),
                shift: shift(sampling, &mut Philox::keyed(seed, &name(SHIFT))),
            }
        })
        .collect()
}

/// What a user should know about the cases before training on them, one sentence each.
pub fn warnings<'a>(
    cases: impl IntoIterator<Item = (&'a str, Candidates<'a>)>,
    sampling: &Sampling,
) -> Vec<String> {
    let mut said = Vec::new();
    for (name, case) in cases {
        if (0..3).any(|a| case.shape[a] < sampling.patch[a]) {
            let ([d, h, w], [pd, ph, pw]) = (case.shape, sampling.patch);
            said.push(format!(
                "{name}: {d}x{h}x{w} voxels are padded with zeros to the patch of {pd}x{ph}x{pw}"
            ));
        }
        match (case.fg.is_empty(), case.bg.is_empty()) {
            (true, true) => said.push(format!("{name}: is empty; its patches are drawn from everywhere")),
            (true, false) => said.push(format!("{name}: has no spleen; all its patches are background")),
            (false, true) => said.push(format!("{name}: is all spleen; all its patches are foreground")),
            (false, false) => {}
        }
    }
    said
}

/// First voxel of a random patch.
fn start(case: &Candidates<'_>, sampling: &Sampling, rng: &mut Philox) -> [i64; 3] {
    let u = rng.uniform();
    let list = pick(case, sampling.pos / (sampling.pos + sampling.neg), u);
    let flat = match list {
        [] => rng.below(case.shape.iter().product::<usize>() as u64) as usize,
        _ => list[rng.below(list.len() as u64) as usize] as usize,
    };
    let front: [usize; 3] = std::array::from_fn(|a| sampling.patch[a].saturating_sub(case.shape[a]) / 2);
    let padded = std::array::from_fn(|a| case.shape[a].max(sampling.patch[a]));
    let voxel = unravel(flat, case.shape);
    let centre = correct_centre(std::array::from_fn(|a| voxel[a] + front[a]), sampling.patch, padded);
    std::array::from_fn(|a| (centre[a] - sampling.patch[a] / 2) as i64 - front[a] as i64)
}

/// The list a centre is drawn from (MONAI `generate_pos_neg_label_crop_centers`): the foreground where
/// `u < pos_ratio`, u uniform in [0, 1); the other list where one is empty.
pub fn pick<'a>(case: &Candidates<'a>, pos_ratio: f64, u: f64) -> &'a [u32] {
    let foreground = match (case.fg.is_empty(), case.bg.is_empty()) {
        (true, _) => false,
        (_, true) => true,
        _ => u < pos_ratio,
    };
    if foreground { case.fg } else { case.bg }
}

/// (d, h, w) of a flat C-order index.
pub fn unravel(flat: usize, [_, h, w]: [usize; 3]) -> [usize; 3] {
    [flat / (h * w), flat / w % h, flat % w]
}

/// Moves a centre so that the patch of size `roi` around it lies in `shape` (MONAI `correct_crop_centers`);
/// no side of `shape` is below `roi`. The patch starts at centre - roi / 2, rounded down.
pub fn correct_centre(centre: [usize; 3], roi: [usize; 3], shape: [usize; 3]) -> [usize; 3] {
    std::array::from_fn(|a| {
        let low = roi[a] / 2;
        // floor(shape + 1 - roi / 2) with the exact half of an odd roi.
        let high = shape[a] + 1 - roi[a].div_ceil(2);
        let high = if low == high { high + 1 } else { high };
        centre[a].max(low).min(high - 1)
    })
}

/// `RandShiftIntensityd`: with probability `shift_prob` one offset, uniform in [-offset, offset).
fn shift(sampling: &Sampling, rng: &mut Philox) -> f32 {
    let offset = f64::from(sampling.shift_offset.abs());
    if rng.uniform() < sampling.shift_prob { rng.range(-offset, offset) as f32 } else { 0.0 }
}

/// A voxel's intensity as stored.
pub trait Intensity: Copy {
    /// As f32, exactly.
    fn to_f32(self) -> f32;
}

impl Intensity for f32 {
    fn to_f32(self) -> f32 {
        self
    }
}

impl Intensity for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

/// Copies the patch of size `patch` at `start` out of a volume of `shape`, zeros where it reaches outside, and
/// adds `shift` to every intensity. `image`, `label` and the outputs are in C order.
pub fn cut<T: Intensity>(
    (image, label): (&[T], &[u8]),
    shape: [usize; 3],
    (start, patch): ([i64; 3], [usize; 3]),
    shift: f32,
    image_out: &mut [f32],
    label_out: &mut [u8],
) {
    image_out.fill(shift);
    label_out.fill(0);
    // The part of the patch that lies in the volume, in patch voxels.
    let inside: [std::ops::Range<usize>; 3] = std::array::from_fn(|a| {
        let low = (-start[a]).clamp(0, patch[a] as i64);
        let high = (shape[a] as i64 - start[a]).clamp(low, patch[a] as i64);
        low as usize..high as usize
    });
    let width = inside[2].len();
    if width == 0 {
        return;
    }
    let at = |a: usize, p: usize| (start[a] + p as i64) as usize;
    for d in inside[0].clone() {
        for h in inside[1].clone() {
            let from = (at(0, d) * shape[1] + at(1, h)) * shape[2] + at(2, inside[2].start);
            let to = (d * patch[1] + h) * patch[2] + inside[2].start;
            for (out, v) in image_out[to..to + width].iter_mut().zip(&image[from..from + width]) {
                *out = v.to_f32() + shift;
            }
            label_out[to..to + width].copy_from_slice(&label[from..from + width]);
        }
    }
}
