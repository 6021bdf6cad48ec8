//! Scores as CSV: the bundle's three files as MONAI's `MetricsSaver` writes them, and one of ours.
//!
//! MONAI prints NumPy and Python numbers, so this module prints as they do: shortest digits that read back to the
//! same float, exponents below 1e-4, `nan`. Statistics are computed in float64; NumPy's are float32, which shows in the
//! fourth decimal only where a value lies within 1e-7 of half a unit of it.

use std::fmt::{Display, LowerExp, Write as _};
use std::io::Write as _;
use std::path::Path;

use crate::data::publish::publish;
use crate::error::Result;
use crate::infer::evaluate::CaseScores;
use crate::metrics::overlap::mean_ignoring_nan;

/// The name of the bundle's key metric and of its files.
const METRIC: &str = "val_mean_dice";

/// Columns of the bundle's summary (MONAI `MetricsSaver(summary_ops="*")`).
const SUMMARY: &str = "class,mean,median,max,min,90percentile,std,notnans";

/// Columns of our table; lengths in mm, volumes in ml, Dice and NSD as fractions.
const COLUMNS: &str = "case,dice_bundle,dice_native,dice_grid,hd95_mm,hd_mm,assd_mm,nsd,nsd_tolerance_mm,\
    volume_pred_ml,volume_true_ml,voxels_pred,voxels_true,false_positive_voxels,false_negative_voxels,image";

/// Writes `metrics.csv`, `val_mean_dice_raw.csv` and `val_mean_dice_summary.csv` into `folder`, as the bundle's
/// evaluate.json does, for cases of (path of the image, Dice). NaN is a case with an empty label.
///
/// # Errors
/// A file that cannot be written; each file is replaced whole or not at all.
pub fn write_bundle(folder: &Path, cases: &[(String, f32)]) -> Result<()> {
    let dice: Vec<f32> = cases.iter().map(|c| c.1).collect();
    let mean = f64::from(mean_ignoring_nan(&dice).0);
    write(&folder.join("metrics.csv"), &format!("{METRIC},{}\n", python(mean)))?;
    write(&folder.join(format!("{METRIC}_raw.csv")), &raw(cases))?;
    write(&folder.join(format!("{METRIC}_summary.csv")), &summary(&dice))
}

/// Writes `cases.csv` into `folder`: one line a case with all scores.
///
/// # Errors
/// A file that cannot be written; it is replaced whole or not at all.
pub fn write_cases(folder: &Path, cases: &[&CaseScores], nsd_tolerance_mm: f64) -> Result<()> {
    let mut text = format!("{COLUMNS}\n");
    for case in cases {
        let s = &case.native;
        let numbers = [case.dice_bundle, s.dice, case.dice_grid, s.hd95_mm, s.hd_mm, s.assd_mm, s.nsd];
        let numbers = numbers.map(python).join(",");
        let volumes = [nsd_tolerance_mm, s.pred_ml, s.truth_ml].map(python).join(",");
        let o = &s.overlap;
        let (fp, fneg) = (o.false_positives(), o.false_negatives());
        let image = case.image.display().to_string();
        let (name, image) = (quoted(&case.name), quoted(&image));
        let _ = writeln!(text, "{name},{numbers},{volumes},{},{},{fp},{fneg},{image}", o.pred, o.truth);
    }
    write(&folder.join("cases.csv"), &text)
}

/// Bundle names are not quoted, because MONAI's are not.
fn raw(cases: &[(String, f32)]) -> String {
    // The mean over classes of one class is that class.
    let lines = cases.iter().map(|(path, dice)| format!("{path},{0},{0}\n", python(*dice)));
    std::iter::once("filename,class0,mean\n".to_owned()).chain(lines).collect()
}

fn summary(dice: &[f32]) -> String {
    let statistics = statistics(dice).map(fixed).join(",");
    format!("{SUMMARY}\nclass0,{statistics}\nmean,{statistics}\n")
}

/// Mean, median, max, min, 90th percentile, population standard deviation and number of the values that are not NaN.
fn statistics(values: &[f32]) -> [f64; 7] {
    let mut v: Vec<f64> = values.iter().filter(|v| !v.is_nan()).map(|&v| f64::from(v)).collect();
    v.sort_unstable_by(f64::total_cmp);
    let n = v.len() as f64;
    let (Some(&min), Some(&max)) = (v.first(), v.last()) else {
        let mut none = [f64::NAN; 7];
        none[6] = 0.0;
        return none;
    };
    let mean = v.iter().sum::<f64>() / n;
    let std = (v.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n).sqrt();
    [mean, percentile(&v, 0.5), max, min, percentile(&v, 0.9), std, n]
}

/// Linear interpolation between the sorted values around rank q · (n - 1).
fn percentile(sorted: &[f64], q: f64) -> f64 {
    let rank = q * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    low + (high - low) * (rank - rank.floor())
}

/// `%.4f`.
fn fixed(v: f64) -> String {
    if v.is_nan() { "nan".into() } else { format!("{v:.4}") }
}

/// `repr` of a Python float or `str` of a NumPy float32 below 1e6: shortest digits that read back to the same number,
/// scientific below 1e-4 and from 1e16 on.
fn python<T: Copy + Into<f64> + Display + LowerExp>(v: T) -> String {
    let wide: f64 = v.into();
    let size = wide.abs();
    if wide.is_nan() {
        "nan".into()
    } else if wide.is_infinite() {
        if wide > 0.0 { "inf".into() } else { "-inf".into() }
    } else if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{v:e}");
        let (digits, exponent) = text.split_once('e').expect("LowerExp writes an exponent");
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
        format!("{digits}e{sign}{exponent:0>2}")
    } else {
        let text = v.to_string();
        if text.contains('.') { text } else { text + ".0" }
    }
}

/// A field that may hold separators (RFC 4180).
fn quoted(field: &str) -> String {
    match field.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.to_owned(),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    publish(path, |file| file.write_all(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Printed by Python 3.11 and NumPy 2.4.
    #[test]
    fn numbers_as_python_prints_them() {
        for (v, want) in [
            (0.24977432191371918, "0.24977432191371918"),
            (1e-7, "1e-07"),
            (1.0, "1.0"),
            (0.0, "0.0"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (123456789.125, "123456789.125"),
            (9.999e-5, "9.999e-05"),
            (1e-4, "0.0001"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(python(v), want);
        }
        for (v, want) in [
            (0.249_774_32f32, "0.24977432"),
            (0.9731, "0.9731"),
            (1e-7, "1e-07"),
            (1e-4, "1e-04"),
            (0.0, "0.0"),
        ] {
            assert_eq!(python(v), want);
        }
    }

    /// Files that MONAI 1.6.1 wrote: an evaluator with `MeanDice(include_background=False)` and `MetricsSaver` over six
    /// random cases of 31/67+96, 24/59+94, (empty label), 30/62+80, 31/67+91 and 23/58+81 voxels.
    #[test]
    fn the_bundle_files_are_monais() {
        let counts = [[96, 67, 31], [94, 59, 24], [87, 0, 0], [80, 62, 30], [91, 67, 31], [81, 58, 23]];
        let cases: Vec<(String, f32)> = counts
            .iter()
            .enumerate()
            .map(|(i, &n)| {
                (format!("/data/case{i}.nii.gz"), crate::metrics::overlap::Overlap::from(n).dice())
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        write_bundle(folder.path(), &cases).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(read("metrics.csv"), "val_mean_dice,0.3679938018321991\n");
        assert_eq!(
            read("val_mean_dice_raw.csv"),
            "filename,class0,mean\n\
             /data/case0.nii.gz,0.38036808,0.38036808\n\
             /data/case1.nii.gz,0.3137255,0.3137255\n\
             /data/case2.nii.gz,nan,nan\n\
             /data/case3.nii.gz,0.4225352,0.4225352\n\
             /data/case4.nii.gz,0.39240506,0.39240506\n\
             /data/case5.nii.gz,0.33093524,0.33093524\n"
        );
        assert_eq!(
            read("val_mean_dice_summary.csv"),
            "class,mean,median,max,min,90percentile,std,notnans\n\
             class0,0.3680,0.3804,0.4225,0.3137,0.4105,0.0401,5.0000\n\
             mean,0.3680,0.3804,0.4225,0.3137,0.4105,0.0401,5.0000\n"
        );
    }

    #[test]
    fn a_summary_without_numbers_is_numpys() {
        let nan = "nan,nan,nan,nan,nan,nan,0.0000";
        assert_eq!(summary(&[f32::NAN]), format!("{SUMMARY}\nclass0,{nan}\nmean,{nan}\n"));
    }

    #[test]
    fn a_line_a_case_under_its_columns() {
        let overlap = crate::metrics::overlap::Overlap { pred: 10, truth: 8, both: 6 };
        let native = crate::metrics::Scores {
            overlap,
            dice: overlap.dice(),
            hd95_mm: f32::NAN,
            hd_mm: f32::INFINITY,
            assd_mm: 1.5,
            nsd: 0.0,
            pred_ml: 0.05,
            truth_ml: 0.04,
        };
        let case = CaseScores {
            name: "a".into(),
            image: "in/a, b.nii".into(),
            dice_grid: 0.5,
            dice_bundle: 0.25,
            native,
            warnings: Vec::new(),
            network_s: 1.0,
        };
        let folder = tempfile::tempdir().unwrap();
        write_cases(folder.path(), &[&case], 2.0).unwrap();
        let text = std::fs::read_to_string(folder.path().join("cases.csv")).unwrap();
        let line = "a,0.25,0.6666667,0.5,nan,inf,1.5,0.0,2.0,0.05,0.04,10,8,4,2,\"in/a, b.nii\"";
        assert_eq!(text, format!("{COLUMNS}\n{line}\n"));
        assert_eq!(COLUMNS.split(',').count(), 16);
        assert!(write_cases(&folder.path().join("missing"), &[&case], 2.0).is_err());
    }

    #[test]
    fn names_with_separators_are_quoted() {
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
        assert_eq!(quoted("spleen_2"), "spleen_2");
    }
}
