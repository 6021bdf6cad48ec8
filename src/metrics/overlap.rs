//! Overlap of two masks: counts, Dice, volume.

use rayon::prelude::*;

use crate::data::volume::Affine;
use crate::error::{Error, Result};

/// Voxels of a predicted and a true mask; foreground is everything that is not 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// Predicted foreground voxels.
    pub pred: u64,
    /// True foreground voxels.
    pub truth: u64,
    /// Voxels that are foreground in both.
    pub both: u64,
}

impl Overlap {
    /// Counts the foreground of two masks of the same grid.
    ///
    /// # Errors
    /// Different lengths.
    pub fn count(pred: &[u8], truth: &[u8]) -> Result<Self> {
        if pred.len() != truth.len() {
            let (want, got) = (format!("{} voxels", truth.len()), format!("{}", pred.len()));
            return Err(Error::Shape { op: "overlap", want, got });
        }
        // Integer sums: any order of the chunks gives the same counts.
        Ok(pred
            .par_chunks(1 << 16)
            .zip(truth.par_chunks(1 << 16))
            .map(|(p, t)| {
                let mut n = [0u64; 3];
                for (&p, &t) in p.iter().zip(t) {
                    n[0] += u64::from(p != 0);
                    n[1] += u64::from(t != 0);
                    n[2] += u64::from(p != 0 && t != 0);
                }
                n
            })
            .reduce(|| [0; 3], |a, b| std::array::from_fn(|i| a[i] + b[i]))
            .into())
    }

    /// 2·|P∩T| / (|P| + |T|), rounded once to f32; NaN if the truth is empty, whatever the prediction
    /// (MONAI `DiceMetric(ignore_empty=True)`, the bundle's).
    pub fn dice(&self) -> f32 {
        if self.truth == 0 { f32::NAN } else { self.ratio() }
    }

    /// The same, but for an empty truth 1 if the prediction is empty too and else 0
    /// (MONAI `DiceMetric(ignore_empty=False)`).
    pub fn dice_counting_empty(&self) -> f32 {
        match (self.truth, self.pred) {
            (0, 0) => 1.0,
            (0, _) => 0.0,
            _ => self.ratio(),
        }
    }

    /// Predicted voxels that are not true.
    pub fn false_positives(&self) -> u64 {
        self.pred - self.both
    }

    /// True voxels that were not predicted.
    pub fn false_negatives(&self) -> u64 {
        self.truth - self.both
    }

    fn ratio(&self) -> f32 {
        (2.0 * self.both as f64 / (self.pred + self.truth) as f64) as f32
    }
}

impl From<[u64; 3]> for Overlap {
    fn from([pred, truth, both]: [u64; 3]) -> Self {
        Overlap { pred, truth, both }
    }
}

/// Mean of the values that are not NaN, and their number; 0 if there is none (MONAI `do_metric_reduction`, mean).
///
/// NaN counts as 0 in its place, and the sum has torch's order, so that the mean of a validation set has MONAI's digits.
pub fn mean_ignoring_nan(values: &[f32]) -> (f32, usize) {
    let zeroed: Vec<f32> = values.iter().map(|v| if v.is_nan() { 0.0 } else { *v }).collect();
    let count = values.iter().filter(|v| !v.is_nan()).count();
    (if count == 0 { 0.0 } else { torch_sum(&zeroed) / count as f32 }, count)
}

/// `torch.sum` of float32 numbers on a CPU with AVX2, below 512 of them (above, torch adds a cascade): eight lanes once
/// there are eight numbers, each lane four interleaved sums; what fills no row of lanes is summed first.
fn torch_sum(values: &[f32]) -> f32 {
    let width = if values.len() < 8 { 1 } else { 8 };
    let rows = values.chunks_exact(width);
    let (rest, in_blocks) = (rows.remainder(), rows.len() / 4 * 4);
    let mut sums = [[0.0f32; 4]; 8];
    for (at, row) in rows.enumerate() {
        let sum = if at < in_blocks { at % 4 } else { 0 };
        row.iter().zip(&mut sums).for_each(|(v, lane)| lane[sum] += v);
    }
    let lanes = sums[..width].iter().map(|lane| lane.iter().sum::<f32>());
    lanes.fold(rest.iter().sum(), |total, lane| total + lane)
}

/// Volume of one voxel in ml: |det| of the affine's 3x3 part, mm³ / 1000.
pub fn voxel_ml(affine: &Affine) -> f64 {
    let [a, b, c] = [0, 1, 2].map(|r| [affine[r][0], affine[r][1], affine[r][2]]);
    let det = a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0])
        + a[2] * (b[0] * c[1] - b[1] * c[0]);
    det.abs() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dice_of_empty_masks() {
        let of = |pred, truth, both| Overlap { pred, truth, both };
        assert!(of(0, 0, 0).dice().is_nan() && of(5, 0, 0).dice().is_nan());
        assert_eq!([of(0, 0, 0), of(5, 0, 0), of(0, 5, 0)].map(|o| o.dice_counting_empty()), [1.0, 0.0, 0.0]);
        assert_eq!(of(0, 5, 0).dice(), 0.0);
        assert_eq!(of(3, 5, 2).dice(), 0.5);
    }

    #[test]
    fn counts_do_not_depend_on_values_or_chunks() {
        let pred: Vec<u8> = (0..200_003u32).map(|i| (i % 7) as u8).collect();
        let truth: Vec<u8> = (0..200_003u32).map(|i| (i % 3) as u8).collect();
        // Residues mod 21: 200,003 = 9523 * 21 + 20.
        let full = |f: fn(u32) -> bool| (0..200_003u32).filter(|&i| f(i)).count() as u64;
        let o = Overlap::count(&pred, &truth).expect("equal lengths");
        assert_eq!(o.pred, full(|i| i % 7 != 0));
        assert_eq!(o.truth, full(|i| i % 3 != 0));
        assert_eq!(o.both, full(|i| i % 7 != 0 && i % 3 != 0));
        assert_eq!(o.false_positives(), full(|i| i % 7 != 0 && i % 3 == 0));
        assert!(Overlap::count(&pred, &truth[1..]).is_err());
    }

    #[test]
    fn mean_skips_nan_and_is_zero_without_values() {
        assert_eq!(mean_ignoring_nan(&[0.5, f32::NAN, 1.0]), (0.75, 2));
        assert_eq!(mean_ignoring_nan(&[f32::NAN]), (0.0, 0));
    }

    /// Printed by torch 2.11 for (v³ mod 7919) / 7919, v = 1..=n, with AVX2.
    #[test]
    fn sums_have_torchs_digits() {
        for (n, want) in [
            (1, 0.00012627857),
            (3, 0.0045460286),
            (4, 0.012627857),
            (6, 0.055688843),
            (7, 0.0990024),
            (8, 0.16365702),
            (9, 0.25571412),
            (13, 1.045713),
            (16, 2.3356485),
            (20, 4.568885),
            (37, 13.408006),
            (41, 15.612957),
            (100, 42.419243),
            (257, 119.48036),
        ] {
            let values: Vec<f32> = (1..=n).map(|v: u64| (v * v * v % 7919) as f32 / 7919.0).collect();
            assert_eq!(torch_sum(&values), want, "{n} numbers");
        }
    }

    #[test]
    fn voxel_volume_of_an_oblique_grid() {
        let (s, c) = 0.3f64.sin_cos();
        let affine = [
            [0.8 * c, -0.9 * s, 0.0, 5.0],
            [0.8 * s, 0.9 * c, 0.0, -7.0],
            [0.0, 0.0, -5.0, 1.0],
            [0.0, 0.0, 0.0, 1.0],
        ];
        assert!((voxel_ml(&affine) - 0.8 * 0.9 * 5.0 / 1000.0).abs() < 1e-15);
    }
}
