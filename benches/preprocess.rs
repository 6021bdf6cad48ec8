//! From a full-size CT's .nii.gz to the network's grid: read and inflate, RAS, spacing, scaling.
//!
//! `cargo bench --bench preprocess`. The file is case 0 of `spleen-hpc phantom --full`, so that another program can
//! be timed on the same one.

use criterion::{Criterion, criterion_group, criterion_main};
use spleen_hpc::config::{Config, Recipe};
use spleen_hpc::data::phantom::{PhantomConfig, case};
use spleen_hpc::data::preprocess::preprocess;
use spleen_hpc::data::{nifti, nifti_write, scan};
use std::hint::black_box;

fn full_ct(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("ct.nii.gz");
    let (image, _) = case(&PhantomConfig { full: true, ..PhantomConfig::default() }, 0);
    nifti_write::write_volume(&path, &image).expect("written");
    let config = Config::for_recipe(Recipe::V036).preprocess;
    let mut group = c.benchmark_group("512x512x90");
    group.sample_size(10);
    group.bench_function("read", |b| b.iter(|| black_box(nifti::read(&path).expect("own file"))));
    let volume = nifti::read(&path).expect("own file").volume;
    group.bench_function("preprocess", |b| {
        b.iter(|| black_box(preprocess(&volume, None, &config).expect("sound")))
    });
    drop(volume);
    group.bench_function("read and preprocess", |b| {
        b.iter(|| black_box(scan::read(&path, &config).expect("own file")))
    });
    group.finish();
}

criterion_group!(benches, full_ct);
criterion_main!(benches);
