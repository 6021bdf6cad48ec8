//! The cache holds what the chain computes, is used only while that is true, and feeds the same batches to anyone.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use spleen_hpc::config::{CacheDtype, Preprocess, Sampling};
use spleen_hpc::data::cache::{CacheParams, CachedCase, Image, build_all, default_dir};
use spleen_hpc::data::dataset::{Case, training_cases};
use spleen_hpc::data::nifti;
use spleen_hpc::data::phantom::{PhantomConfig, generate};
use spleen_hpc::data::prefetch::{Batch, Prefetcher};
use spleen_hpc::data::preprocess::{Prepared, preprocess};

fn params() -> CacheParams {
    CacheParams {
        preprocess: Preprocess {
            spacing_mm: [1.5, 1.5, 2.0],
            hu_window: [-57.0, 164.0],
            crop_foreground: true,
        },
        label_value: None,
        dtype: CacheDtype::F16,
    }
}

fn sampling() -> Sampling {
    Sampling {
        patch: [32, 32, 32],
        pos: 1.0,
        neg: 1.0,
        samples_per_volume: 2,
        volumes_per_step: 2,
        shift_offset: 0.1,
        shift_prob: 0.5,
    }
}

/// A data set of `cases` phantoms in a folder that lives as long as the first value.
fn data(cases: usize) -> (tempfile::TempDir, Vec<Case>) {
    let dir = tempfile::tempdir().unwrap();
    let set = dir.path().join("set");
    generate(&set, &PhantomConfig { cases, test_cases: 0, seed: 4, full: false }, &|_, _| {}).unwrap();
    let cases = training_cases(&set).unwrap();
    (dir, cases)
}

/// Builds and says, a case in order of completion, why it was prepared.
fn build(cases: &[Case], params: &CacheParams, dir: &Path) -> (Vec<CachedCase>, Vec<Option<String>>) {
    let said = Mutex::new(Vec::new());
    let built = build_all(cases, params, dir, &|p| {
        let mut said = said.lock().unwrap();
        said.push(p.prepared.map(str::to_owned));
        assert_eq!((p.done <= p.total, p.total), (true, cases.len()));
    });
    (built.unwrap(), said.into_inner().unwrap())
}

fn chain(case: &Case, params: &CacheParams) -> Prepared {
    let label = nifti::read(&case.label).unwrap().volume;
    let label = nifti::label_from(&label, params.label_value, &case.label).unwrap();
    preprocess(&nifti::read(&case.image).unwrap().volume, Some(&label), &params.preprocess).unwrap()
}

#[test]
fn a_case_comes_back_as_it_was_prepared() {
    let (dir, cases) = data(2);
    let cache = dir.path().join("cache");
    for dtype in [CacheDtype::F16, CacheDtype::F32] {
        let params = CacheParams { dtype, ..params() };
        for (cached, case) in build(&cases, &params, &cache).0.iter().zip(&cases) {
            let want = chain(case, &params);
            let label = want.label.unwrap();
            assert_eq!((cached.name(), cached.shape()), (case.name.as_str(), want.image.shape));
            assert_eq!(cached.affine(), &want.image.affine);
            assert_eq!(cached.geometry(), &want.geometry);
            assert_eq!(cached.native(), &nifti::read(&case.image).unwrap().header);
            assert_eq!(cached.label(), label.data);
            match cached.image() {
                Image::F32(v) => assert_eq!(v, want.image.data),
                // Half a unit in the last of 11 binary places, below 1; f16 is exact at 0 and 1.
                Image::F16(v) => assert!(
                    v.iter()
                        .zip(&want.image.data)
                        .all(|(h, &f)| (h.to_f32() - f).abs() <= f32::powi(2.0, -12))
                ),
            }
            let lists = cached.candidates();
            let is = |fg: bool| {
                let keep = |&i: &usize| match label.data[i] {
                    0 => !fg && want.image.data[i] > 0.0,
                    _ => fg,
                };
                (0..label.len()).filter(keep).map(|i| i as u32).collect::<Vec<_>>()
            };
            assert_eq!((lists.fg, lists.bg), (&is(true)[..], &is(false)[..]));
            println!("{}: {:?}, {} bytes", cached.name(), cached.shape(), cached.bytes());
        }
    }
}

#[test]
fn only_a_good_file_is_used_again() {
    let (dir, cases) = data(1);
    let cache = dir.path().join("cache");
    let first = build(&cases, &params(), &cache);
    let path = first.0[0].path().to_owned();
    assert!(first.1[0].is_some());
    let good = fs::read(&path).unwrap();
    let reused = || build(&cases, &params(), &cache).1[0].clone();
    assert_eq!(reused(), None);
    // Made the second time, the same bytes.
    fs::remove_file(&path).unwrap();
    assert!(reused().is_some());
    assert!(fs::read(&path).unwrap() == good);

    let mut bytes = good.clone();
    for (at, why) in [(3, "not a cache file"), (10, "damaged"), (70, "damaged"), (good.len() - 1, "damaged")]
    {
        bytes.clone_from(&good);
        bytes[at] ^= 0x10;
        fs::write(&path, &bytes).unwrap();
        let said = reused().unwrap();
        // A flipped bit in the length of the header shows in the header or in its length.
        assert!(said.contains(why) || at == 10 && said.contains("header"), "byte {at}: {said}");
    }
    for length in [0, 7, 63, 64, 200, good.len() - 1] {
        fs::write(&path, &good[..length]).unwrap();
        assert!(reused().is_some(), "{length} bytes of {} were used", good.len());
    }
    fs::write(&path, [&good[..], b"more"].concat()).unwrap();
    assert!(reused().unwrap().contains("cut off or has grown"));
    assert!(fs::read(&path).unwrap() == good, "not mended");
    // Nothing but cache files is left behind.
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 1);
}

#[test]
fn processes_that_build_together_agree() {
    let (dir, cases) = data(1);
    let cache = dir.path().join("cache");
    let built: Vec<Vec<u8>> = std::thread::scope(|s| {
        let work = || fs::read(build(&cases, &params(), &cache).0[0].path()).unwrap();
        let threads: Vec<_> = (0..4).map(|_| s.spawn(work)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(built.iter().all(|b| *b == built[0]));
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 1);
}

#[test]
fn changed_content_or_parameters_are_prepared_anew() {
    let (dir, cases) = data(2);
    let cache = dir.path().join("cache");
    build(&cases, &params(), &cache);
    let prepared =
        |params: &CacheParams| build(&cases, params, &cache).1.iter().filter(|p| p.is_some()).count();

    let mut others = vec![params(); 5];
    others[0].dtype = CacheDtype::F32;
    others[1].preprocess.crop_foreground = false;
    others[2].preprocess.hu_window[1] = 165.0;
    others[3].preprocess.spacing_mm[0] = 1.6;
    others[4].label_value = Some(1.0);
    for other in &others {
        assert_eq!(prepared(other), 2, "{other:?}");
        assert_eq!(prepared(other), 0, "{other:?}");
    }
    // The first file is still there and still good: parameters do not compete.
    assert_eq!(prepared(&params()), 0);

    // A touched or copied file is the same content; an edited one of the same length is not.
    let age = |path: &PathBuf, seconds: u64| {
        let time = SystemTime::now() - Duration::from_secs(seconds);
        fs::File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
    };
    age(&cases[0].image, 500);
    assert_eq!(prepared(&params()), 0);
    let swap = |a: &PathBuf, b: &PathBuf| {
        let (x, y) = (fs::read(a).unwrap(), fs::read(b).unwrap());
        fs::write(a, y).unwrap();
        fs::write(b, x).unwrap();
    };
    swap(&cases[0].image, &cases[1].image);
    swap(&cases[0].label, &cases[1].label);
    age(&cases[0].image, 400);
    assert_eq!(prepared(&params()), 2);
    assert_eq!(prepared(&params()), 0);

    // The same length: bytes 4 to 7 of a gzip file are a time that nobody reads.
    let edit = |path: &PathBuf| {
        let mut bytes = fs::read(path).unwrap();
        bytes[4] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    edit(&cases[0].image);
    age(&cases[0].image, 300);
    assert_eq!(prepared(&params()), 1);
    // Edited within the clock's tick of being cached: even size and time are the same.
    let soon = SystemTime::now() + Duration::from_secs(3600);
    let tick =
        |path: &PathBuf| fs::File::options().append(true).open(path).unwrap().set_modified(soon).unwrap();
    edit(&cases[0].image);
    tick(&cases[0].image);
    assert_eq!(prepared(&params()), 1);
    edit(&cases[0].image);
    tick(&cases[0].image);
    assert_eq!(prepared(&params()), 1);
    assert_eq!(prepared(&params()), 0);
}

#[test]
fn bad_sources_are_named_and_leave_nothing() {
    let (dir, cases) = data(2);
    let cache = dir.path().join("cache");
    let mut mixed = cases.clone();
    mixed[0].label.clone_from(&cases[1].label);
    let e = build_all(&mixed, &params(), &cache, &|_| {}).unwrap_err();
    assert!(e.to_string().contains("spleen_02") && e.exit_code() == 2, "{e}");
    fs::write(&cases[1].image, b"no volume").unwrap();
    let e = build_all(&cases[1..], &params(), &cache, &|_| {}).unwrap_err();
    assert!(e.to_string().contains("spleen_02") && e.exit_code() == 2, "{e}");
    let left: Vec<_> = fs::read_dir(&cache).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| n.to_string_lossy().ends_with(".cache")), "{left:?}");
    assert_eq!(default_dir(dir.path()).unwrap(), dir.path().join(".spleen-hpc-cache"));
}

#[test]
fn threads_and_restarts_do_not_change_batches() {
    let (dir, cases) = data(3);
    let cases = Arc::new(build(&cases, &params(), &dir.path().join("cache")).0);
    let start = |at, threads| Prefetcher::new(Arc::clone(&cases), &sampling(), 8, at, threads).unwrap();
    let take = |mut from: Prefetcher, n: usize| -> Vec<Batch> {
        (0..n).map(|_| from.next_batch().unwrap()).collect()
    };
    let one = take(start((0, 0), 1), 6);
    // Three volumes, two a step: steps of 4 and 2 patches.
    let names: Vec<_> = one.iter().map(|b| (b.epoch, b.step, b.specs.len())).collect();
    assert_eq!(names, [(0, 0, 4), (0, 1, 2), (1, 0, 4), (1, 1, 2), (2, 0, 4), (2, 1, 2)]);
    assert!(one == take(start((0, 0), 3), 6), "the number of threads shows");
    assert!(one[3..] == take(start((1, 1), 2), 3), "a resumed run sees other patches");
    let voxels = 32 * 32 * 32;
    for batch in &one {
        assert!(*batch == Batch::new(&cases, &sampling(), 8, batch.epoch, batch.step));
        for (i, spec) in batch.specs.iter().enumerate() {
            // Any corner of the patch, straight from the volume.
            let case = &cases[spec.case];
            let [_, h, w] = case.shape();
            let at = |d: i64, e: i64, f: i64| {
                (((spec.start[0] + d) * h as i64 + spec.start[1] + e) * w as i64 + spec.start[2] + f) as usize
            };
            let image = case.image_f32();
            assert_eq!(batch.image[i * voxels], image[at(0, 0, 0)] + spec.shift);
            assert_eq!(batch.image[(i + 1) * voxels - 1], image[at(31, 31, 31)] + spec.shift);
            assert_eq!(batch.label[i * voxels + 32 * 5 + 7], case.label()[at(0, 5, 7)]);
        }
    }
    let none = Prefetcher::new(Arc::default(), &sampling(), 8, (0, 0), 1);
    assert_eq!(none.unwrap_err().exit_code(), 2);
}
