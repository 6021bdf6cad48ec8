//! From files to the network's grid: what is mended, what is refused, and that both name the file.

use std::path::{Path, PathBuf};

use spleen_hpc::config::{Config, Preprocess, Recipe};
use spleen_hpc::data::cache::{self, CacheParams};
use spleen_hpc::data::dataset::{Case, expand_inputs};
use spleen_hpc::data::preprocess::preprocess;
use spleen_hpc::data::volume::{Affine, Volume};
use spleen_hpc::data::{nifti, nifti_write, scan};
use spleen_hpc::rng::Philox;

const SHAPE: [usize; 3] = [12, 10, 9];
/// Off the network's 1.5 x 1.5 x 2 mm on every axis, so that everything is interpolated.
const AFFINE: Affine =
    [[-0.9, 0.0, 0.0, 10.0], [0.0, 1.1, 0.0, -4.0], [0.0, 0.0, 3.3, 0.0], [0.0, 0.0, 0.0, 1.0]];
const ODD: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

fn transform() -> Preprocess {
    Config::for_recipe(Recipe::V036).preprocess
}

/// HU within the window; every 50th voxel is one of `odd` by turns.
fn image(odd: [f32; 3]) -> Volume<f32> {
    let mut rng = Philox::new(5, 0);
    let hu = |i: usize| if i % 50 == 7 { odd[i / 50 % 3] } else { rng.range(-50.0, 150.0) as f32 };
    Volume { shape: SHAPE, data: (0..SHAPE.iter().product()).map(hu).collect(), affine: AFFINE }
}

/// A labelled case in `folder`.
fn case(folder: &Path, image: &Volume<f32>, label: &Volume<f32>) -> Case {
    let paths = ["ct.nii", "label.nii"].map(|name| folder.join(name));
    write_f32(&paths[0], image);
    write_f32(&paths[1], label);
    let [image, label] = paths;
    Case { name: "ct".into(), image, label }
}

/// A float32 file, which the product itself never writes: an i16 one with another type and other voxels.
fn write_f32(path: &Path, volume: &Volume<f32>) {
    let voxels = volume.len();
    let zeros = Volume { shape: volume.shape, data: vec![0i16; voxels], affine: volume.affine };
    nifti_write::write_volume(path, &zeros).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    bytes.truncate(bytes.len() - 2 * voxels);
    bytes[70..74].copy_from_slice(&[16i16, 32].map(i16::to_le_bytes).concat());
    let [ni, nj, nk] = volume.shape;
    for at in 0..voxels {
        let (i, j, k) = (at % ni, at / ni % nj, at / (ni * nj));
        bytes.extend(volume.data[(i * nj + j) * nk + k].to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

fn labels(inside: f32) -> Volume<f32> {
    let data = (0..SHAPE.iter().product()).map(|i| if i % 3 == 0 { inside } else { 0.0 }).collect();
    Volume { shape: SHAPE, data, affine: AFFINE }
}

#[test]
fn voxels_that_are_no_numbers_become_the_floor_of_the_window_before_anything_is_interpolated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ct.nii");
    let count = (0..SHAPE.iter().product()).filter(|i| i % 50 == 7).count();
    write_f32(&path, &image(ODD));
    let read = nifti::read(&path).unwrap();
    assert_eq!(read.not_finite, count);
    assert!(read.volume.data[7].is_nan() && read.volume.data[57] == f32::INFINITY, "values as nibabel's");
    let mended = scan::read(&path, &transform()).unwrap();
    let all = image(ODD).len();
    let text =
        format!("{}: {count} of its {all} voxels are NaN or infinite and count as -57 HU", path.display());
    assert_eq!(mended.warnings.len(), 1);
    assert!(mended.warnings[0].starts_with(&text), "{:?}", mended.warnings);

    write_f32(&path, &image([-57.0; 3]));
    let clean = scan::read(&path, &transform()).unwrap();
    assert!(clean.warnings.is_empty());
    assert_eq!(mended.prepared.image, clean.prepared.image);
}

#[test]
fn the_cache_warns_when_it_prepares() {
    let folder = tempfile::tempdir().unwrap();
    let case = case(folder.path(), &image(ODD), &labels(1.0));
    let params = CacheParams {
        preprocess: transform(),
        label_value: None,
        dtype: Config::for_recipe(Recipe::V036).run.cache_dtype,
    };
    let told = std::sync::Mutex::new(Vec::new());
    for _ in 0..2 {
        let tell = |step: cache::Progress| told.lock().unwrap().push(step.warnings.to_vec());
        cache::build_all(std::slice::from_ref(&case), &params, &folder.path().join("cache"), &tell).unwrap();
    }
    let told = told.into_inner().unwrap();
    assert!(told[0].len() == 1 && told[0][0].contains("NaN or infinite"), "{told:?}");
    assert!(told[1].is_empty(), "prepared twice");
}

#[test]
fn labels_are_numbers_and_of_the_values_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let hu = image([0.0; 3]);
    for (label, value, part) in [
        (labels(1.0), None, None),
        (labels(1.0), Some(1.0), None),
        (labels(7.0), Some(7.0), None),
        (labels(7.0), None, Some("holds 0, 7; name the spleen with --label-value")),
        (labels(f32::NAN), None, Some("360 of its 1080 voxels are NaN or infinite")),
        (labels(f32::NAN), Some(1.0), Some("360 of its 1080 voxels are NaN or infinite")),
    ] {
        let case = case(folder.path(), &hu, &label);
        match (scan::read_labelled(&case, value, &transform()), part) {
            (Ok((scan, truth)), None) => {
                assert_eq!(truth.data.iter().filter(|&&v| v == 1).count(), 360);
                assert!(scan.prepared.label.is_some());
            }
            (Err(error), Some(part)) => {
                let text = error.to_string();
                assert!(text.starts_with(&case.label.display().to_string()) && text.contains(part), "{text}");
            }
            (got, _) => panic!("{part:?}: {got:?}"),
        }
    }
}

#[test]
fn pairs_are_found_whatever_the_case_of_their_endings() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let volume = image([0.0; 3]);
    write_f32(&at("ct.nii"), &volume);
    let whole = std::fs::read(at("ct.nii")).unwrap();
    std::fs::remove_file(at("ct.nii")).unwrap();
    let mut header = whole[..352].to_vec();
    header[108..112].fill(0);
    header[344..348].copy_from_slice(b"ni1\0");
    for (hdr, img) in [("a.hdr", "a.img"), ("b.HDR", "b.IMG"), ("c.HDR", "c.img"), ("d.hdr", "d.IMG")] {
        std::fs::write(at(hdr), &header).unwrap();
        std::fs::write(at(img), &whole[352..]).unwrap();
        for name in [hdr, img] {
            assert_eq!(nifti::read(at(name)).unwrap().volume.data, volume.data, "{name}");
            assert_eq!(nifti::files_of(at(name)), [at(hdr), at(img)], "{name}");
        }
    }
    let found = expand_inputs(&[folder.path().display().to_string()]).unwrap();
    let names: Vec<PathBuf> = ["a.hdr", "b.HDR", "c.HDR", "d.hdr"].map(at).into();
    assert_eq!(found, names);
}

/// gzip ends such a stream with a warning, nibabel never looks there.
#[test]
fn bytes_behind_a_gzip_stream_are_ignored_and_members_joined() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ct.nii.gz");
    let unpacked = folder.path().join("ct.nii");
    write_f32(&unpacked, &image([0.0; 3]));
    let plain = std::fs::read(&unpacked).unwrap();
    let gzip = |bytes: &[u8]| {
        let mut zipped = Vec::new();
        let mut gz = flate2::read::GzEncoder::new(bytes, flate2::Compression::fast());
        std::io::Read::read_to_end(&mut gz, &mut zipped).unwrap();
        zipped
    };
    let want = image([0.0; 3]).data;
    for zipped in [
        [gzip(&plain), vec![0; 512]].concat(),
        [gzip(&plain), b"no gzip member".to_vec()].concat(),
        [gzip(&plain[..400]), gzip(&[]), gzip(&plain[400..])].concat(),
    ] {
        std::fs::write(&path, zipped).unwrap();
        assert_eq!(nifti::read(&path).unwrap().volume.data, want);
    }
}

#[test]
fn a_grid_that_cannot_be_resampled_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ct.nii");
    // 40 cm a voxel.
    let far = AFFINE.map(|row| row.map(|v| v * 400.0));
    write_f32(&path, &Volume { affine: far, ..image([0.0; 3]) });
    let error = scan::read(&path, &transform()).unwrap_err();
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    assert!(error.to_string().contains("check the spacing in the header and --spacing"), "{error}");
    assert_eq!(error.exit_code(), 2);
}

/// Planes are resampled while the next ones are read, the others after all are: the same bits in every order of axes,
/// from files that are plain, inflate to what a CT does, or to so much that memory is taken with care.
#[test]
fn what_is_resampled_while_it_is_read_is_what_is_resampled_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = Philox::new(8, 0);
    // Thick slices, and some so thin that most of them are between two of the result's.
    let grids = [([21, 26, 23], [0.7, 1.1, 3.3]), ([15, 12, 70], [1.3, 1.1, 0.1])];
    let axes = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let senses = (0..8).flat_map(|flips| axes.map(|axes| (axes, flips)));
    for ((shape, spacing), (axes, flips)) in
        grids.into_iter().flat_map(|g| senses.clone().map(move |s| (g, s)))
    {
        let mut affine = [[0.0; 4]; 4];
        affine[3][3] = 1.0;
        for a in 0..3 {
            affine[axes[a]][a] = if flips >> a & 1 == 1 { -spacing[a] } else { spacing[a] };
        }
        for (name, spread) in [("ct.nii", 300), ("ct.nii.gz", 300), ("flat.nii.gz", 1)] {
            let data: Vec<i16> = (0..shape.iter().product()).map(|_| rng.below(spread) as i16).collect();
            let path = folder.path().join(name);
            nifti_write::write_volume(&path, &Volume { shape, data, affine }).unwrap();
            for crop_foreground in [false, true] {
                let p = Preprocess { crop_foreground, ..transform() };
                let scan = scan::read(&path, &p).unwrap();
                let want = preprocess(&nifti::read(&path).unwrap().volume, None, &p).unwrap();
                assert!(
                    scan.prepared.image == want.image && scan.prepared.geometry == want.geometry,
                    "{affine:?}"
                );
            }
        }
    }
}

/// Of a stream that ends early, or whose checksum is wrong, nothing is used.
#[test]
fn damage_is_found_while_planes_are_resampled() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ct.nii.gz");
    let mut rng = Philox::new(9, 0);
    let shape = [40, 40, 30];
    let data: Vec<i16> = (0..shape.iter().product()).map(|_| rng.below(4000) as i16).collect();
    nifti_write::write_volume(&path, &Volume { shape, data, affine: AFFINE }).unwrap();
    let whole = std::fs::read(&path).unwrap();
    assert!(scan::read(&path, &transform()).is_ok());
    let mut wrong = whole.clone();
    let checksum = whole.len() - 8;
    wrong[checksum] ^= 1;
    for damaged in [&whole[..whole.len() / 2], &wrong] {
        std::fs::write(&path, damaged).unwrap();
        let error = scan::read(&path, &transform()).unwrap_err().to_string();
        assert!(error.starts_with(&path.display().to_string()), "{error}");
        assert!(error.contains("its gzip stream is damaged"), "{error}");
    }
}
