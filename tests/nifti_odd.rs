//! Odd, foreign and broken files: every one is read right or refused in a sentence, and none can do harm.

use std::path::{Path, PathBuf};

use nifti::{NiftiObject, NiftiVolume, RandomAccessNiftiVolume};
use spleen_hpc::config::{Config, Recipe};
use spleen_hpc::data::nifti as ours;
use spleen_hpc::data::nifti_write::{write_mask, write_volume};
use spleen_hpc::data::preprocess::{Geometry, preprocess};
use spleen_hpc::data::scan;
use spleen_hpc::data::volume::Volume;
use spleen_hpc::rng::Philox;

/// What reading a file must give: as nibabel 5.4 and MONAI 1.6 have it, its shape, the CRC-32 of its voxels (float32,
/// little-endian, k fastest) and the position in mm of voxel (1, 10, 100), in which no two numbers of an affine can
/// change places unseen; or else a part of the sentence.
enum Want {
    Read([usize; 3], u32, [f64; 3]),
    Refuse(&'static str),
}
use Want::{Read, Refuse};

const TABLE: &[(&str, Want)] = &[
    (
        "example_mr_sm.nii.gz",
        Read([117, 91, 20], 0x354c94d5, [165.59963989257812, 136.35943603515625, 328.9896411895752]),
    ),
    ("nibabel/COPYING", Refuse("not a NIfTI file")),
    ("nibabel/analyze.hdr", Refuse("Analyze 7.5")),
    ("nibabel/anatomical.nii", Read([33, 41, 25], 0xced0183c, [30.0, -20.0, 184.0])),
    ("nibabel/example4d.nii.gz", Refuse("4-dimensional data (128x96x24x2)")),
    ("nibabel/example_nifti2.nii.gz", Refuse("4-dimensional data (32x20x12x2)")),
    ("nibabel/functional.nii", Refuse("4-dimensional data (17x21x3x20)")),
    ("nibabel/nifti1.hdr", Refuse("no .img file beside it")),
    ("nibabel/nifti2.hdr", Refuse("no .img file beside it")),
    (
        "nibabel/reoriented_anat_moved.nii",
        Read([21, 26, 22], 0xf0f2a836, [-31.297897338867188, -7.9775848388671875, 372.40059089660645]),
    ),
    ("nibabel/resampled_anat_moved.nii", Read([17, 21, 3], 0x2f64c2c6, [28.0, 0.0, 800.0])),
    ("nibabel/row_major.dconn.nii", Refuse("CIFTI")),
    ("nibabel/standard.nii.gz", Read([4, 5, 7], 0x5e60866e, [1.0, 30.0, 200.0])),
    ("nibabel/test.mgz", Refuse("FreeSurfer MGH")),
    ("nifti-rs/27_float32.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/27_float64.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/27_int16.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/27_int32.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/27_int64.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/27_int8.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/27_uint16.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/27_uint32.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/27_uint64.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/27_uint8.nii", Read([3, 3, 3], 0x98fe8412, [1.0, 10.0, 100.0])),
    ("nifti-rs/LICENSE-MIT", Refuse("not a NIfTI file")),
    ("nifti-rs/complex_complex32.nii", Refuse("complex")),
    ("nifti-rs/complex_complex64.nii", Refuse("complex")),
    ("nifti-rs/f32.nii.gz", Read([11, 11, 11], 0xbb871468, [1.0, 10.0, 100.0])),
    ("nifti-rs/fuzz_artifacts_crash-1.nii", Refuse("not a NIfTI file")),
    (
        "nifti-rs/fuzz_artifacts_crash-ed7d46344d7efb3b9f0c374d66d2e02f66cc447d.nii",
        Refuse("not a NIfTI file"),
    ),
    ("nifti-rs/minimal.hdr", Read([64, 64, 10], 0xd3fe2c61, [91.5, -64.5, 286.5])),
    ("nifti-rs/minimal.img", Read([64, 64, 10], 0xd3fe2c61, [91.5, -64.5, 286.5])),
    ("nifti-rs/minimal.img.gz", Read([64, 64, 10], 0xd3fe2c61, [91.5, -64.5, 286.5])),
    ("nifti-rs/minimal.nii", Read([64, 64, 10], 0xd3fe2c61, [91.5, -64.5, 286.5])),
    ("nifti-rs/minimal.nii.gz", Read([64, 64, 10], 0xd3fe2c61, [91.5, -64.5, 286.5])),
    ("nifti-rs/minimal2.hdr", Read([64, 64, 10], 0xd3fe2c61, [91.5, -64.5, 286.5])),
    ("nifti-rs/minimal2.img.gz", Read([64, 64, 10], 0xd3fe2c61, [91.5, -64.5, 286.5])),
    ("nifti-rs/minimal_extended_hdr.nii", Refuse("an image (8x8) and not a 3-D volume")),
    ("nifti-rs/rgb_3D.nii", Refuse("colours")),
    ("nifti-rs/rgb_4D.nii", Refuse("colours")),
    ("nifti-rs/rgba_4D.nii", Refuse("colours")),
    ("nifti-rs/zstat1.nii.gz", Read([64, 64, 21], 0x76ab50cd, [-4.0, 40.0, 600.0])),
    ("niivue/FLAIR.nrrd", Refuse("NRRD")),
    ("niivue/LICENSE", Refuse("not a NIfTI file")),
    ("niivue/complex.nii.gz", Refuse("complex")),
    ("niivue/ct_perfusion.nii.gz", Refuse("colours")),
    (
        "niivue/draw.nii.gz",
        Read([79, 67, 64], 0xcd017c7d, [-164.0161256790161, -108.37278127670288, 60.76069688796997]),
    ),
    ("niivue/hippo.nii.gz", Read([91, 109, 91], 0x24267107, [88.0, -106.0, 128.0])),
    ("niivue/labels256.nii.gz", Read([256, 256, 256], 0xeec57c8e, [126.0, -45.149993896484375, 137.0])),
    (
        "niivue/ras.hdr",
        Read([62, 41, 34], 0xef72952c, [-70.99207186698914, -41.459670066833496, 205.1163625717163]),
    ),
    (
        "niivue/ras.img",
        Read([62, 41, 34], 0xef72952c, [-70.99207186698914, -41.459670066833496, 205.1163625717163]),
    ),
];

fn odd_folder() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/odd");
    let there = folder.is_dir();
    if !there {
        println!("skipped: {} is not there", folder.display());
    }
    there.then_some(folder)
}

fn crc32(voxels: &[f32]) -> u32 {
    let mut crc = flate2::Crc::new();
    voxels.iter().for_each(|v| crc.update(&v.to_le_bytes()));
    crc.sum()
}

#[test]
fn every_odd_file_is_read_right_or_refused_in_a_sentence() {
    let Some(folder) = odd_folder() else { return };
    for (name, want) in TABLE {
        let path = folder.join(name);
        match (ours::read(&path), want) {
            (Ok(file), Read(shape, crc, place)) => {
                assert_eq!(file.volume.shape, *shape, "{name}");
                assert_eq!(crc32(&file.volume.data), *crc, "{name}: other voxels than nibabel's");
                for (row, want) in file.volume.affine.iter().zip(place) {
                    let got = row[0] + 10.0 * row[1] + 100.0 * row[2] + row[3];
                    // Three float64 products and sums of hundreds of mm, in another order.
                    assert!((got - want).abs() < 1e-9, "{name}: {got} mm, want {want} mm");
                }
            }
            (Err(error), Refuse(part)) => {
                let sentence = error.to_string();
                assert!(sentence.contains(part), "{name}: {sentence}");
                assert!(sentence.contains(&folder.display().to_string()), "names no file: {sentence}");
                assert!(!sentence.contains('\n'), "more than a sentence: {sentence}");
                assert_eq!(error.exit_code(), 2, "{name}");
            }
            (Ok(_), Refuse(part)) => panic!("{name} was read; wanted a refusal with {part:?}"),
            (Err(error), Read(..)) => panic!("{error}"),
        }
    }
}

/// The folder may grow: what the table does not know must still be read or refused without a panic.
#[test]
fn files_that_the_table_does_not_know_do_no_harm() {
    let Some(folder) = odd_folder() else { return };
    let mut folders = vec![folder.clone()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).expect("readable").flatten() {
            let path = entry.path();
            let name = path.strip_prefix(&folder).expect("below it").to_string_lossy().into_owned();
            if path.is_dir() {
                folders.push(path);
            } else if TABLE.iter().all(|(known, _)| *known != name) {
                match ours::read(&path) {
                    Ok(file) => println!("not in the table: {name} was read, {:?}", file.volume.shape),
                    Err(error) => println!("not in the table: {error}"),
                }
            }
        }
    }
}

#[test]
fn the_ten_scalar_types_hold_0_to_26() {
    let Some(folder) = odd_folder() else { return };
    for name in
        ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64"]
    {
        let volume = ours::read(folder.join(format!("nifti-rs/27_{name}.nii"))).expect(name).volume;
        // They count with k fastest, which is our order and not the file's.
        let want: Vec<f32> = (0..27).map(|v| v as f32).collect();
        assert_eq!(volume.data, want, "{name}");
    }
}

/// The `nifti` crate as a second opinion on every voxel of the files that it can read.
#[test]
fn voxels_agree_with_an_independent_reader() {
    let Some(folder) = odd_folder() else { return };
    let mut compared = 0;
    for (name, want) in TABLE {
        let (Read(..), Ok(theirs)) = (want, nifti::ReaderOptions::new().read_file(folder.join(name))) else {
            continue;
        };
        let mine = ours::read(folder.join(name)).expect(name).volume;
        let theirs = theirs.into_volume();
        let [ni, nj, nk] = mine.shape;
        assert_eq!(theirs.dim(), [ni as u16, nj as u16, nk as u16], "{name}");
        // Their access is slow: up to 5000 voxels spread over the volume.
        let stride = (mine.len() / 5000).max(1);
        for at in (0..mine.len()).step_by(stride) {
            let voxel = [(at / (nj * nk)) as u16, (at / nk % nj) as u16, (at % nk) as u16];
            let want = theirs.get_f64(&voxel).expect("inside") as f32;
            // They scale in the stored type; none of these files is scaled, so equality is exact.
            assert!(mine.data[at] == want || mine.data[at].is_nan() && want.is_nan(), "{name} at {voxel:?}");
        }
        compared += 1;
    }
    assert!(compared >= 15, "only {compared} files compared");
}

/// A small valid file of either version, as bytes.
fn specimen(folder: &Path, version: u8) -> Vec<u8> {
    let affine = [[0.0, -2.0, 0.0, 10.0], [1.5, 0.0, 0.0, -20.0], [0.0, 0.0, 3.0, 5.0], [0.0, 0.0, 0.0, 1.0]];
    let volume = Volume { shape: [3, 4, 5], data: (0..60).collect::<Vec<i16>>(), affine };
    let path = folder.join("specimen.nii");
    write_volume(&path, &volume).expect("written");
    if version == 2 {
        let mut header = ours::read_header(&path).expect("own file");
        header.version = 2;
        write_mask(&path, &header, &[1; 60]).expect("written");
    }
    std::fs::read(&path).expect("own file")
}

/// Reading must not panic, and must give the same twice.
fn read_twice(path: &Path, bytes: &[u8]) -> Result<ours::Nifti, String> {
    std::fs::write(path, bytes).expect("a temporary file");
    let read = || ours::read(path).map_err(|e| e.to_string());
    let (a, b) = (read(), read());
    assert_eq!(format!("{a:?}"), format!("{b:?}"));
    if let Ok(file) = &a {
        assert_eq!(file.volume.len(), file.volume.shape.iter().product::<usize>());
        assert_eq!(file.volume.data.iter().filter(|v| !v.is_finite()).count(), file.not_finite);
    }
    streams_alike(path, &a);
    a
}

/// Streaming must fail where reading does or where the geometry cannot be resampled, and only there; else header, defects
/// and every bit of the result must be those of a file that was read first.
fn streams_alike(path: &Path, whole: &Result<ours::Nifti, String>) {
    let transform = Config::for_recipe(Recipe::V036).preprocess;
    match (scan::read(path, &transform), whole) {
        (Ok(scan), Ok(file)) => {
            assert_eq!(format!("{:?}", scan.header), format!("{:?}", file.header));
            assert_eq!(scan.warnings.is_empty(), file.not_finite == 0, "{:?}", scan.warnings);
            let mut volume = file.volume.clone();
            let numbers = |v: &mut f32| {
                if !v.is_finite() {
                    *v = transform.hu_window[0]
                }
            };
            volume.data.iter_mut().for_each(numbers);
            let read_first = preprocess(&volume, None, &transform).expect("as it was streamed");
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&scan.prepared.image.data), bits(&read_first.image.data));
        }
        (Ok(_), Err(err)) => panic!("streamed, but reading says: {err}"),
        (Err(err), Ok(file)) => {
            let plan = Geometry::plan(file.header.shape, &file.header.affine, transform.spacing_mm);
            assert!(plan.is_err(), "read, but streaming says: {err}");
        }
        (Err(_), Err(_)) => {}
    }
}

#[test]
fn mutated_files_never_panic() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut read = 0;
    for version in [1, 2] {
        let good = specimen(folder.path(), version);
        let mut zipped = Vec::new();
        let mut gz = flate2::read::GzEncoder::new(&good[..], flate2::Compression::fast());
        std::io::Read::read_to_end(&mut gz, &mut zipped).expect("in memory");
        for (kind, whole) in [(0, &good), (1, &zipped)] {
            let mut rng = Philox::keyed(11, &[u64::from(version), kind]);
            for name in ["m.nii", "m.img"].iter().cycle().take(400) {
                let mut bytes = whole.clone();
                for _ in 0..=rng.below(3) {
                    let at = rng.below(bytes.len() as u64) as usize;
                    bytes[at] = match rng.below(4) {
                        0 => 0,
                        1 => 0xff,
                        2 => bytes[at] ^ 1 << rng.below(8),
                        _ => rng.next_u32() as u8,
                    };
                }
                if rng.below(4) == 0 {
                    bytes.truncate(rng.below(bytes.len() as u64) as usize);
                }
                // An .img needs its .hdr: here the mutant serves as both.
                if *name == "m.img" {
                    std::fs::write(folder.path().join("m.hdr"), &bytes).expect("a temporary file");
                }
                read += usize::from(read_twice(&folder.path().join(name), &bytes).is_ok());
            }
        }
    }
    // Many mutations hit voxels or unused fields: if none were read, the test would prove nothing.
    assert!(read > 200, "only {read} mutants were readable");
}

#[test]
fn lying_headers_are_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("liar.nii");
    let good = specimen(folder.path(), 1);
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    let dims = |d: [i16; 4]| with(40, &d.map(i16::to_le_bytes).concat());
    let one_way = [1.5f32, 2.0, 3.0].map(f32::to_le_bytes).concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (dims([3, 32767, 32767, 32767]), "but the file has"),
        (dims([3, 0, 4, 5]), "at least 1"),
        (dims([3, -3, 4, 5]), "at least 1"),
        (dims([0, 3, 4, 5]), "counts 0 dimensions"),
        (dims([9, 3, 4, 5]), "counts 9 dimensions"),
        (dims([2, 3, 4, 5]), "an image (3x4)"),
        (with(72, &8i16.to_le_bytes()), "8 bits to voxels of type I16"),
        (with(108, &100f32.to_le_bytes()), "vox_offset is 100"),
        (with(108, &f32::NAN.to_le_bytes()), "vox_offset is NaN"),
        (with(108, &1e30f32.to_le_bytes()), "vox_offset is 1"),
        (with(280, &f32::NAN.to_le_bytes()), "sform holds numbers that are not finite"),
        // Three columns of the right length in one direction.
        (with(280, &[&one_way[..], &[0; 36]].concat()), "singular"),
        (with(112, &[2f32, f32::INFINITY].map(f32::to_le_bytes).concat()), "scl_inter is inf"),
        (with(344, b"ni1\0"), "no .img file beside it"),
        (good[..good.len() - 1].to_vec(), "cut off"),
        (good[..300].to_vec(), "ends inside its 348-byte header"),
        (good[..3].to_vec(), "too short"),
        (Vec::new(), "too short"),
    ];
    for (bytes, part) in cases {
        let error = read_twice(&path, &bytes).expect_err(part);
        assert!(error.contains(part), "wanted {part:?}: {error}");
    }

    // Compressed, the size of the voxels is unknown; the claim is held against the most that deflate can do.
    let mut zipped = Vec::new();
    let liar = dims([3, 32767, 32767, 32767]);
    let mut gz = flate2::read::GzEncoder::new(&liar[..], flate2::Compression::fast());
    std::io::Read::read_to_end(&mut gz, &mut zipped).expect("in memory");
    let error = read_twice(&path, &zipped).expect_err("a lie");
    assert!(error.contains("can hold compressed"), "{error}");
    // One flipped bit of the checksum.
    let mut gz = flate2::read::GzEncoder::new(&good[..], flate2::Compression::fast());
    zipped.clear();
    std::io::Read::read_to_end(&mut gz, &mut zipped).expect("in memory");
    let crc = zipped.len() - 8;
    zipped[crc] ^= 1;
    let error = read_twice(&path, &zipped).expect_err("a wrong checksum");
    assert!(error.contains("gzip stream is damaged"), "{error}");
}
