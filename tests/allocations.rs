//! A training step takes nothing from the allocator: activations, gradients, packed weights, scratch, lists of what is to be done
//! and the tape's closures lie where those of the step before lay. (Called from a thread outside the pool, as the program does,
//! rayon's queue needs a block for every 63; and where inference has packed weights, the next step moves them away.)

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx_emulator;

use spleen_hpc::config::{Config, Net, Norm, Recipe};
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu::{Simd, use_simd};
use spleen_hpc::train::trainer::Trainer;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, which counts for threads of a pool.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this is a thread of a pool: the test's own process has others.
    static COUNTS: Cell<bool> = const { Cell::new(false) };
}

fn count(bytes: usize) {
    if !COUNTS.get() {
        return;
    }
    CALLS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(bytes, Ordering::Relaxed);
}

// SAFETY: all is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(old, layout, bytes) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Steps that are counted, after the first two: these take what later ones use again.
const STEPS: usize = 6;

/// A network of these channels, what it computes with, and patches of (N, D, H, W).
struct Case {
    name: &'static str,
    channels: &'static [usize],
    recipe: Recipe,
    norm: Norm,
    batch: bool,
    operands: Operands,
    shape: [usize; 4],
}

/// The bundle's network on patches of 32^3.
const BUNDLE: Case = Case {
    name: "bundle",
    channels: &[16, 32, 64, 128, 256],
    recipe: Recipe::V036,
    norm: Norm::Batch,
    batch: true,
    operands: Operands::Single,
    shape: [2, 32, 32, 32],
};

const CASES: &[Case] = &[
    BUNDLE,
    Case { name: "bundle, bf16", operands: Operands::Bf16, ..BUNDLE },
    Case { name: "instance norm, Novograd", norm: Norm::Instance, recipe: Recipe::V059, ..BUNDLE },
    Case { name: "larger patches", channels: &[16, 32, 64], shape: [2, 48, 48, 48], ..BUNDLE },
    Case {
        name: "larger patches, bf16",
        channels: &[16, 32, 64],
        operands: Operands::Bf16,
        norm: Norm::Instance,
        shape: [2, 48, 48, 48],
        ..BUNDLE
    },
    // Thin layers, channels that fill no vector, a loss of each sample.
    Case { name: "odd channels", channels: &[2, 5, 24], batch: false, shape: [2, 20, 12, 28], ..BUNDLE },
    // No convolution in the bottom's shortcut.
    Case {
        name: "identity, bf16",
        channels: &[16, 40, 40],
        operands: Operands::Bf16,
        shape: [1, 24, 36, 20],
        ..BUNDLE
    },
];

impl Case {
    /// Calls of the allocator, and bytes, of every step that is counted.
    fn steps(&self) -> Vec<(usize, usize)> {
        let mut config = Config::for_recipe(self.recipe);
        let net = Net { channels: self.channels.to_vec(), norm: self.norm };
        config.loss.batch = self.batch;
        let mut trainer = Trainer::new(&net, config.loss, config.optim, 1).expect("a valid network");
        trainer.net.set_operands(self.operands);
        let voxels = self.shape.iter().product();
        let images: Vec<f32> = (0..voxels).map(|i| (i % 101) as f32 / 101.0).collect();
        let labels: Vec<u8> = images.iter().map(|&v| u8::from(v > 0.8)).collect();
        let mut step = || {
            let before = (CALLS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
            trainer.step(&images, &labels, self.shape).expect("a finite loss");
            (CALLS.load(Ordering::Relaxed) - before.0, BYTES.load(Ordering::Relaxed) - before.1)
        };
        let _ = [step(), step()];
        (0..STEPS).map(|_| step()).collect()
    }
}

/// What is emulated takes its time: fewer products.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const ON_AMX: &[Case] = &[
    Case { name: "bundle, AMX", operands: Operands::Bf16, shape: [1, 16, 16, 16], ..BUNDLE },
    Case {
        name: "larger patches, AMX",
        channels: &[16, 32, 64],
        operands: Operands::Bf16,
        shape: [1, 32, 32, 32],
        ..BUNDLE
    },
];

#[test]
fn a_step_allocates_nothing() {
    for (simd, cases, threads) in [
        (Simd::Avx512, CASES, &[1, 2, 4][..]),
        (Simd::Avx2, CASES, &[1]),
        // Slow: the bundle's layers alone.
        (Simd::Portable, &CASES[..2], &[1]),
    ] {
        let unit = use_simd(simd).to_string();
        cases.iter().for_each(|case| check(case, &unit, threads));
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        amx_emulator::turn_on();
        ON_AMX.iter().for_each(|case| check(case, "AMX", &[1]));
    }
}

fn check(case: &Case, unit: &str, threads: &[usize]) {
    for &threads in threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(|_| COUNTS.set(true));
        let pool = pool.build().expect("threads");
        let steps = pool.install(|| case.steps());
        // Threads that never met before in a pass may need more scratch than any step before.
        let nothing =
            if threads == 1 { steps.iter().all(|s| s.0 == 0) } else { steps.iter().any(|s| s.0 == 0) };
        assert!(nothing, "{}, {unit}, {threads} threads: (calls, bytes) of steps {steps:?}", case.name);
    }
}
