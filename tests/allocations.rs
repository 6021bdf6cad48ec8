//! What a training step takes from the allocator: lists of what is to be done, as many whatever the size of the patches.
//! Activations, gradients, packed weights and scratch are those of the step before.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx_emulator;

use spleen_hpc::config::{Config, Net, Recipe};
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

/// Steps after the first two, which take what later ones use again. Threads that never met before in a pass may need more
/// scratch: the fewest of some steps are counted.
const STEPS: usize = 6;

/// Calls and bytes of a step of the bundle's network on `n` patches of `side`^3.
fn of_a_step(operands: Operands, n: usize, side: usize) -> (usize, usize) {
    let config = Config::for_recipe(Recipe::V036);
    let net = Net { channels: vec![16, 32, 64], ..config.net };
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
    let counts: Vec<_> = (0..STEPS).map(|_| step(&mut trainer)).collect();
    let fewest = counts.iter().map(|c| c.0).min();
    (fewest.expect("some steps"), counts.iter().map(|c| c.1).min().expect("some steps"))
}

#[test]
fn a_step_allocates_lists_and_no_values() {
    use_simd(Simd::Avx512);
    check("f32", Operands::Single, [(1, 32), (2, 64)]);
    check("bf16", Operands::Bf16, [(1, 32), (2, 64)]);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        amx_emulator::turn_on();
        // Products in software: fewer of them.
        check("bf16 on AMX", Operands::Bf16, [(1, 16), (2, 32)]);
    }
}

/// Steps on one small patch and on larger ones, (number, side).
fn check(what: &str, operands: Operands, [small, large]: [(usize, usize); 2]) {
    let (few, _) = of_a_step(operands, small.0, small.1);
    let (many, bytes) = of_a_step(operands, large.0, large.1);
    println!("{what}: {few} allocations on {small:?}, {many} on {large:?}, of {bytes} bytes");
    // Many times the voxels. Nothing that grows with them is allocated; other slabs and splits of sums may be chosen.
    assert!(many <= few + few / 20, "{what}: {few} allocations on {small:?}, {many} on {large:?}");
    // The network's weights alone are 4 MB, the activations of two patches of 64^3 100 MB.
    assert!(bytes < 1 << 19, "{what}: {bytes} bytes");
}
