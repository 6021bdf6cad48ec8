//! Whole runs of a small network on a few phantoms: stopping and resuming anywhere leaves the same bytes, training
//! lowers the loss, and a loss that is not a number stops with the last good checkpoint named.

use spleen_hpc::config::{Amp, CacheDtype, Config, Net, Norm, Recipe};
use spleen_hpc::data::cache::{CacheParams, build_all};
use spleen_hpc::data::cache_file::CachedCase;
use spleen_hpc::data::dataset::training_cases;
use spleen_hpc::data::phantom::{PhantomConfig, generate};
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::nn::checkpoint;
use spleen_hpc::train::run::{BEST, Event, HISTORY, LAST, Place, Run, Summary};
use spleen_hpc::train::trainer::Trainer;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn config() -> Config {
    let mut c = Config::for_recipe(Recipe::Seed);
    c.net.channels = vec![4, 6, 8];
    c.sampling.patch = [16, 20, 24];
    c.window.roi = [48; 3];
    c.optim.lr = 3e-3;
    c.run.epochs = 4;
    c.run.val_interval = 2;
    c.seed = 5;
    c
}

/// Cached phantoms, all in one temporary folder: (folder, training cases, validation cases).
fn cases(dtype: CacheDtype) -> (tempfile::TempDir, Vec<CachedCase>, Vec<CachedCase>) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("data");
    generate(&data, &PhantomConfig { cases: 4, test_cases: 0, seed: 3, full: false }, &|_, _| {})
        .expect("phantoms");
    let found = training_cases(&data).expect("cases");
    let params = CacheParams { preprocess: config().preprocess, label_value: None, dtype };
    let mut train = build_all(&found, &params, &dir.path().join("cache"), &|_| {}).expect("a cache");
    let val = train.split_off(3);
    (dir, train, val)
}

/// Runs in `dir`, resuming if it holds a checkpoint, until `steps` optimizer steps of this call are done.
fn run(
    c: &Config,
    dir: &Path,
    train: &Arc<Vec<CachedCase>>,
    val: &[CachedCase],
    steps: usize,
) -> (Summary, Vec<f64>) {
    std::fs::create_dir_all(dir).expect("a run folder");
    let last = dir.join(LAST);
    let resume = last.exists().then(|| checkpoint::load(&last).expect("a checkpoint"));
    let stop = AtomicBool::new(false);
    let mut losses = vec![];
    let run = Run {
        config: c,
        dir,
        train: Arc::clone(train),
        val,
        resume,
        stop: &stop,
        place: Place::Cpu(c.amp.into()),
        between_checkpoints: Duration::ZERO,
    };
    let summary = run.train(&mut |event| {
        if let Event::Step { loss, .. } = event {
            losses.push(*loss);
            stop.store(losses.len() >= steps, Ordering::Relaxed);
        }
    });
    (summary.expect("a run"), losses)
}

#[test]
fn a_run_stopped_anywhere_resumes_to_the_same_bytes() {
    let (dir, train, val) = cases(CacheDtype::F16);
    let (c, train) = (config(), Arc::new(train));
    let whole = dir.path().join("whole");
    let (summary, losses) = run(&c, &whole, &train, &val, usize::MAX);
    assert!(summary.finished);
    assert_eq!((summary.step, losses.len()), (8, 8), "4 epochs of 3 cases, 2 a step");
    let read = |dir: &Path, name: &str| std::fs::read(dir.join(name)).expect(name);
    for at in [1, 2, 3, 4, 5] {
        let parts = dir.path().join(format!("stopped at {at}"));
        let (first, mut seen) = run(&c, &parts, &train, &val, at);
        assert!(!first.finished && first.step == at as u64);
        loop {
            let (summary, losses) = run(&c, &parts, &train, &val, 2);
            seen.extend(losses);
            if summary.finished {
                break;
            }
        }
        assert_eq!(seen, losses, "stopped at {at}: losses");
        for name in [LAST, BEST, HISTORY] {
            assert!(read(&parts, name) == read(&whole, name), "stopped at {at}: {name} differs");
        }
    }
}

/// However rarely it saves, a run leaves the same files; while it lasts, the checkpoint is that of its start.
#[test]
fn checkpoints_are_as_rare_as_was_asked_and_change_nothing() {
    let (dir, train, val) = cases(CacheDtype::F16);
    let (c, train) = (config(), Arc::new(train));
    let folder = |name: &str| dir.path().join(name);
    let mut seen = Vec::new();
    for (name, between_checkpoints) in [("often", Duration::ZERO), ("rarely", Duration::MAX)] {
        std::fs::create_dir_all(folder(name)).expect("a run folder");
        let stop = AtomicBool::new(false);
        let run = Run {
            config: &c,
            dir: &folder(name),
            train: Arc::clone(&train),
            val: &val,
            resume: None,
            stop: &stop,
            place: Place::Cpu(c.amp.into()),
            between_checkpoints,
        };
        let mut steps = Vec::new();
        run.train(&mut |event| {
            if let Event::Epoch { .. } = event {
                steps.push(checkpoint::load(&folder(name).join(LAST)).expect("a checkpoint").meta.step);
            }
        })
        .expect("a run");
        seen.push(steps);
    }
    assert_eq!(seen, [[2, 4, 6, 8], [0, 0, 0, 8]]);
    let read = |name: &str, file: &str| std::fs::read(folder(name).join(file)).expect(file);
    for file in [LAST, BEST, HISTORY] {
        assert!(read("often", file) == read("rarely", file), "{file} differs");
    }
}

/// `--amp on` on the CPU: other bits than f32, near it, and the same ones from a run that was stopped.
#[test]
fn a_run_in_bfloat16_is_near_f32_and_resumes_to_the_same_bytes() {
    let (dir, train, val) = cases(CacheDtype::F16);
    let (single, train) = (config(), Arc::new(train));
    let mixed = Config { amp: Amp::On, ..single.clone() };
    let folder = |name: &str| dir.path().join(name);
    let (_, want) = run(&single, &folder("f32"), &train, &val, usize::MAX);
    let (_, whole) = run(&mixed, &folder("whole"), &train, &val, usize::MAX);
    let (_, mut seen) = run(&mixed, &folder("parts"), &train, &val, 3);
    seen.extend(run(&mixed, &folder("parts"), &train, &val, usize::MAX).1);
    assert_eq!(seen, whole);
    let last = |name: &str| std::fs::read(folder(name).join(LAST)).expect("a checkpoint");
    assert!(last("parts") == last("whole"));
    assert_ne!(want[0], whole[0]);
    // An operand is off by 2^-9 of itself at most: a loss of order 1 by a few 1e-3 in the first step.
    assert!((want[0] - whole[0]).abs() < 5e-3, "{} in f32, {} in bfloat16", want[0], whole[0]);
}

#[test]
fn training_lowers_the_loss_and_f16_images_do_not_matter() {
    let mut c = config();
    c.run.epochs = 20;
    c.sampling.shift_prob = 0.0;
    let mut ends = vec![];
    for dtype in [CacheDtype::F16, CacheDtype::F32] {
        let (dir, train, val) = cases(dtype);
        let (summary, losses) = run(&c, &dir.path().join("run"), &Arc::new(train), &val, usize::MAX);
        let mean = |l: &[f64]| l.iter().sum::<f64>() / l.len() as f64;
        let (start, end) = (mean(&losses[..5]), mean(&losses[35..]));
        assert!(end < 0.8 * start, "{dtype:?}: loss {start} at first, {end} at the end");
        ends.push((losses[0], end, summary.best.expect("a validated run").0));
    }
    let ((first16, end16, dice16), (first32, end32, dice32)) = (ends[0], ends[1]);
    // Rounding a [0, 1] image to f16 moves a voxel by at most 2^-12: the first loss moves by about as much. Later
    // the two runs are as two seeds would be, only closer.
    assert!((first16 - first32).abs() < 2.5e-4, "first losses {first16} and {first32}");
    assert!((end16 - end32).abs() < 0.1 * end32, "last losses {end16} and {end32}");
    assert!((dice16 - dice32).abs() < 0.1, "Dice {dice16} and {dice32}");
}

#[test]
fn a_loss_that_is_not_a_number_names_the_last_good_checkpoint() {
    let (dir, train, val) = cases(CacheDtype::F32);
    let (mut c, train) = (config(), Arc::new(train));
    let folder = dir.path().join("run");
    run(&c, &folder, &train, &val, 2);
    let good = std::fs::read(folder.join(LAST)).expect("a checkpoint");
    c.optim.lr = f64::INFINITY;
    let stop = AtomicBool::new(false);
    let resume = Some(checkpoint::load(&folder.join(LAST)).expect("a checkpoint"));
    let run = Run {
        config: &c,
        dir: &folder,
        train: Arc::clone(&train),
        val: &val,
        resume,
        stop: &stop,
        place: Place::Cpu(Operands::Single),
        between_checkpoints: Duration::ZERO,
    };
    let error = run.train(&mut |_| {}).expect_err("weights that are infinite").to_string();
    assert!(error.contains("the loss is NaN") && error.contains("last.safetensors"), "{error}");
    assert!(std::fs::read(folder.join(LAST)).expect("still there") == good, "the checkpoint was overwritten");
}

#[test]
fn an_image_that_is_not_a_number_changes_no_weight() {
    let recipe = Config::for_recipe(Recipe::Seed);
    let net = Net { norm: Norm::Batch, channels: vec![4, 8] };
    let mut trainer = Trainer::new(&net, recipe.loss, recipe.optim, 1).expect("a valid network");
    let shape = [1, 8, 8, 8];
    let mut image: Vec<f32> = (0..512).map(|i| (i as f32).sin()).collect();
    let labels: Vec<u8> = image.iter().map(|&v| u8::from(v > 0.3)).collect();
    trainer.step(&image, &labels, shape).expect("finite");
    let before = trainer.net.state_dict();
    image[5] = f32::NAN;
    let error = trainer.step(&image, &labels, shape).expect_err("no number").to_string();
    assert!(error.starts_with("step 2: the loss is NaN"), "{error}");
    let after = trainer.net.state_dict();
    assert!(before.iter().eq(after.iter()), "weights and running statistics stay");
}

#[test]
fn weights_that_left_the_numbers_are_never_saved() {
    let (dir, train, val) = cases(CacheDtype::F32);
    let (mut c, train) = (config(), Arc::new(train));
    let folder = dir.path().join("run");
    // The step itself overflows: its loss, taken before, is fine.
    (c.optim.lr, c.run.epochs, c.run.val_interval) = (1e38, 1, 1);
    std::fs::create_dir_all(&folder).expect("a run folder");
    let stop = AtomicBool::new(false);
    let run = Run {
        config: &c,
        dir: &folder,
        train: Arc::clone(&train),
        val: &val,
        resume: None,
        stop: &stop,
        place: Place::Cpu(Operands::Single),
        between_checkpoints: Duration::ZERO,
    };
    let error = run.train(&mut |_| {}).expect_err("weights beyond f32").to_string();
    assert!(error.contains("last good checkpoint is"), "{error}");
    let last = checkpoint::load(&folder.join(LAST)).expect("the checkpoint before the first step");
    assert_eq!(last.meta.step, 0);
    let finite = |v: &Vec<f32>| v.iter().all(|v| v.is_finite());
    assert!(last.moments.exp_avg.iter().all(|(_, v)| finite(v)) && !folder.join(BEST).exists());
}
