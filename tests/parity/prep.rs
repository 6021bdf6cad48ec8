//! The deterministic chain, stage after stage: load, RAS, spacing, intensity, foreground crop.

use spleen_hpc::config::Preprocess;
use spleen_hpc::data::interpolate::{resample_linear, resample_nearest};
use spleen_hpc::data::orientation::to_ras;
use spleen_hpc::data::preprocess::{CropBox, crop, foreground_box, preprocess};
use spleen_hpc::data::resample::SpacingPlan;
use spleen_hpc::data::volume::Volume;

use crate::Outcome;
use crate::case::{Case, ties};
use crate::golden::{File, Golden, numbers};
use crate::ledger::Ledger;
use crate::tensor::{Elem, Tensor};
use crate::tolerance::{EXACT, GEOMETRY, RESAMPLED, SCALED};

pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "prep_*", |file, ledger| {
        let case = Case::read(golden, file.name.trim_start_matches("prep_"))?;
        let settings = settings(file);
        load_and_orient(file, &case, ledger)?;
        spacing(file, &case, settings.spacing_mm, ledger)?;
        let scaled = preprocess(&case.image.volume, None, &settings)?.image;
        ledger.compare(file, "scale.image", &one_channel(&scaled), SCALED);
        foreground(file, &case, &settings, &scaled, ledger)
    });
    Ok(())
}

/// Spacing and window as the folder's descriptions state them; the bundle's where they do not.
pub fn settings(file: &File) -> Preprocess {
    let spacing = numbers(&file.text, "pixdim=").and_then(|n| n.try_into().ok());
    let window = numbers(file.about("scale.image"), "ScaleIntensityRanged");
    let window = window.filter(|w| w.len() >= 2).map(|w| [w[0] as f32, w[1] as f32]);
    Preprocess {
        spacing_mm: spacing.unwrap_or([1.5, 1.5, 2.0]),
        hu_window: window.unwrap_or([-57.0, 164.0]),
        crop_foreground: false,
    }
}

fn load_and_orient(file: &File, case: &Case, ledger: &mut Ledger) -> Outcome<()> {
    let image = &case.image.volume;
    ledger.compare(file, "load.shape", &Tensor::ints(&[3], &image.shape), EXACT);
    // Loaded volumes have no channel yet, but only their digest is stored; the values are in the same order.
    ledger.compare(file, "load.image", &Tensor::new(&image.shape, &image.data), EXACT);
    ledger.compare(file, "load.affine", &Tensor::affine(&image.affine), GEOMETRY);
    let ras = to_ras(image)?.0;
    ledger.compare(file, "orient.image", &one_channel(&ras), EXACT);
    ledger.compare(file, "orient.affine", &Tensor::affine(&ras.affine), GEOMETRY);
    ledger.compare(file, "orient.shape", &channel_shape(&ras), EXACT);
    if let Some(label) = &case.label {
        let label = to_ras(label)?.0;
        let values: Vec<f32> = label.data.iter().map(|&v| f32::from(v)).collect();
        let label = Volume { shape: label.shape, data: values, affine: label.affine };
        ledger.compare(file, "orient.label", &one_channel(&label), EXACT);
    }
    Ok(())
}

fn spacing(file: &File, case: &Case, spacing_mm: [f64; 3], ledger: &mut Ledger) -> Outcome<()> {
    let ras = to_ras(&case.image.volume)?.0;
    let plan = SpacingPlan::new(ras.shape, &ras.affine, spacing_mm)?;
    let r = &plan.resampling;
    let image = resample_linear(&ras, r);
    ledger.compare(file, "spacing.image", &one_channel(&image), RESAMPLED);
    ledger.compare(file, "spacing.affine", &Tensor::affine(&image.affine), GEOMETRY);
    ledger.compare(file, "spacing.shape", &channel_shape(&image), EXACT);
    ledger.compare(file, "spacing.in_spacing", &Tensor::new(&[3], &plan.in_spacing), GEOMETRY);
    ledger.compare(file, "spacing.used_pixdim", &Tensor::new(&[3], &plan.used_pixdim), GEOMETRY);
    ledger.compare(file, "spacing.zoom_affine", &Tensor::affine(&plan.zoom_affine), GEOMETRY);
    ledger.compare(file, "spacing.out_shape", &Tensor::ints(&[3], &r.out_shape), EXACT);
    ledger.compare(file, "spacing.offset", &Tensor::new(&[3], &plan.offset), GEOMETRY);
    ledger.compare(file, "spacing.xform", &Tensor::affine(&r.xform), GEOMETRY);
    ledger.compare(file, "spacing.theta", &Tensor::affine(&r.theta), GEOMETRY);
    for axis in 0..3 {
        let x = r.src_coord_axis(axis);
        ledger.compare(
            file,
            &format!("spacing.src_coord_axis{axis}"),
            &Tensor::new(&[x.len()], &x),
            GEOMETRY,
        );
    }
    ledger.compare(file, "spacing.near_tie_count", &Tensor::ints(&[1], &[r.near_ties()]), EXACT);
    if let Some(label) = &case.label {
        let ras = to_ras(label)?.0;
        let r = SpacingPlan::new(ras.shape, &ras.affine, spacing_mm)?.resampling;
        let tie = ties(&r);
        let got = one_channel(&resample_nearest(&ras, &r));
        ledger.compare_except(file, "spacing.label", &got, EXACT, |i| tie[i] != 0);
    }
    Ok(())
}

/// `cropfg.*` (source: the image) by the product's whole chain; `cropfg_label_m<margin>.*` (source: the label, padding
/// outside) by its parts.
fn foreground(
    file: &File,
    case: &Case,
    settings: &Preprocess,
    scaled: &Volume<f32>,
    ledger: &mut Ledger,
) -> Outcome<()> {
    let cropping = Preprocess { crop_foreground: true, ..settings.clone() };
    let cropped = preprocess(&case.image.volume, None, &cropping)?;
    if let Some(b) = cropped.geometry.crop {
        compare_box(file, "cropfg", &b, &cropped.image, ledger);
    }
    let Some(label) = &case.label else { return Ok(()) };
    let label = preprocess(&case.image.volume, Some(label), settings)?.label.ok_or("the label was lost")?;
    let margins: Vec<&str> = file.stems(".start").filter(|s| s.starts_with("cropfg_label_m")).collect();
    for name in margins {
        let margin = name.trim_start_matches("cropfg_label_m").parse()?;
        if let Some(b) = foreground_box(&label, |l| l > 0, margin, false) {
            compare_box(file, name, &b, &crop(scaled, &b, 0.0), ledger);
        }
    }
    Ok(())
}

fn compare_box(file: &File, name: &str, b: &CropBox, image: &Volume<f32>, ledger: &mut Ledger) {
    ledger.compare(file, &format!("{name}.start"), &Tensor::new(&[3], &b.start), EXACT);
    ledger.compare(file, &format!("{name}.end"), &Tensor::new(&[3], &b.end), EXACT);
    ledger.compare(file, &format!("{name}.image"), &one_channel(image), SCALED);
    ledger.compare(file, &format!("{name}.affine"), &Tensor::affine(&image.affine), GEOMETRY);
}

/// (1, i, j, k).
fn one_channel<T: Elem>(v: &Volume<T>) -> Tensor {
    Tensor::new(&[1, v.shape[0], v.shape[1], v.shape[2]], &v.data)
}

fn channel_shape<T>(v: &Volume<T>) -> Tensor {
    Tensor::ints(&[4], &[1, v.shape[0], v.shape[1], v.shape[2]])
}
