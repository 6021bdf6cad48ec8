//! A training step takes nothing from the allocator: activations, gradients, packed weights, scratch, lists of what is to be done
//! and the tape's closures lie where those of the step before lay.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx_emulator;

use spleen_hpc::config::{Config, Net, Norm, Recipe};
use spleen_hpc::device::bf16::Operands;
use spleen_hpc::device::cpu::{Simd, use_simd};
use spleen_hpc::train::trainer::Trainer;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, which counts.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
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

/// Steps that are counted after the first two, which take what later ones use again. Threads that never met before in a pass may
/// need more scratch than any step before: the fewest of some steps are looked at.
const STEPS: usize = 6;

/// Calls and bytes of a step of a network on `n` patches of `side`^3.
fn of_a_step(config: &Config, operands: Operands, n: usize, side: usize) -> (usize, usize) {
    let net = Net { channels: vec![16, 32, 64], ..config.net.clone() };
    let mut trainer = Trainer::new(&net, config.loss, config.optim, 1).expect("a valid network");
    trainer.net.set_operands(operands);
    let voxels = n * side.pow(3);
    let images: Vec<f32> = (0..voxels).map(|i| (i % 101) as f32 / 101.0).collect();
    let labels: Vec<u8> = images.iter().map(|&v| u8::from(v > 0.8)).collect();
    let step = |trainer: &mut Trainer| {
        let before = (CALLS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
        trainer.step(&images, &labels, [n, side, side, side]).expect("a finite loss");
        (CALLS.load(Ordering::Relaxed) - before.0, BYTES.load(Ordering::Relaxed) - before.1)
    };
    let _ = [step(&mut trainer), step(&mut trainer)];
    (0..STEPS).map(|_| step(&mut trainer)).min().expect("some steps")
}

#[test]
fn a_step_allocates_nothing() {
    use_simd(Simd::Avx512);
    check(
        "vectors",
        &[1, 2, 4],
        &[(Operands::Single, 1, 32), (Operands::Single, 2, 48), (Operands::Bf16, 2, 48)],
    );
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        amx_emulator::turn_on();
        // Products in software: fewer of them.
        check("AMX", &[2], &[(Operands::Bf16, 1, 32)]);
    }
}

/// Steps of both optimizers and norms on patches, (operands, number, side).
fn check(what: &str, threads: &[usize], patches: &[(Operands, usize, usize)]) {
    for &threads in threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        for (recipe, norm) in [(Recipe::V036, Norm::Batch), (Recipe::V059, Norm::Instance)] {
            let mut config = Config::for_recipe(recipe);
            config.net.norm = norm;
            for &(operands, n, side) in patches {
                let (calls, bytes) = pool.install(|| of_a_step(&config, operands, n, side));
                let case = format!("{what}, {recipe:?}, {operands:?}, {n} x {side}^3, {threads} threads");
                assert_eq!(calls, 0, "{case}: {bytes} bytes");
            }
        }
    }
}
