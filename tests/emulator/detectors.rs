//! One planted bug for each detector. A bug is found when every schedule reports it, or when some schedule gives wrong
//! numbers where a test that compares numbers would see them.

use crate::{Data, Planted, device, kernel, launch};
use spleen_hpc::device::cuda::emulated::{Emulated, Options};
use spleen_hpc::device::cuda::{Cuda, Info, Kernel, Precision};
use std::sync::Arc;

const SEEDS: std::ops::Range<u64> = 0..6;

enum Found {
    /// In these words, under every schedule.
    Report(&'static str),
    /// By wrong or missing numbers, under the plain schedule or another one.
    Numbers,
}
use Found::{Numbers, Report};

/// A correct kernel and what finds its bugs.
struct Case {
    kernel: Kernel<Planted>,
    /// Blocks, threads, bytes of shared memory.
    shape: (u32, u32, u32),
    /// Values of x.
    len: usize,
    n: u32,
    /// The first values of y.
    want: fn(usize) -> Vec<f32>,
    /// For `bug` 1, 2, ..
    bugs: &'static [Found],
}

fn copied(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i + 1) as f32).collect()
}

/// The sum of x.
fn summed(len: usize) -> Vec<f32> {
    vec![(len * (len + 1) / 2) as f32]
}

/// What scripts/sanitize.sh expects its sanitizers to report: run there one by one.
#[test]
#[ignore = "has a bug that only a sanitizer reports"]
fn planted_for_a_sanitizer() {
    let name = std::env::var("PLANTED").expect("PLANTED names a kernel of planted.cu");
    let kernel = Kernel::new("planted.cu", Box::leak(name.into_boxed_str()));
    for seed in SEEDS {
        let cuda = device(seed);
        let data = Data::new(&cuda, 128).unwrap();
        cuda.launch(&kernel, launch(1, 32, 520), &data.args(130, 1)).unwrap();
        cuda.synchronize().unwrap();
    }
}

fn run(cuda: &Arc<Cuda>, case: &Case, bug: u32) -> Result<Vec<f32>, String> {
    let (blocks, threads, shared) = case.shape;
    let data = Data::new(cuda, case.len).map_err(|e| e.to_string())?;
    cuda.launch(&case.kernel, launch(blocks, threads, shared), &data.args(case.n, bug))
        .map_err(|e| e.to_string())?;
    data.y.download().map_err(|e| e.to_string())
}

fn check(name: &str, case: Case) {
    let want = (case.want)(case.len);
    let right = |got: &Result<Vec<f32>, String>| got.as_ref().is_ok_and(|y| y[..want.len()] == want[..]);
    for seed in SEEDS {
        let got = run(&device(seed), &case, 0);
        assert!(right(&got), "{name}, seed {seed}: the correct kernel gives {got:?}");
    }
    if cfg!(emulator_sanitized) {
        return; // A sanitizer ends the program at the first bug.
    }
    for (bug, found) in (1..).zip(case.bugs) {
        let results: Vec<_> = SEEDS.map(|seed| run(&device(seed), &case, bug)).collect();
        match found {
            Report(words) => {
                for (seed, got) in results.iter().enumerate() {
                    let text =
                        got.as_ref().expect_err(&format!("{name} {bug}, seed {seed}: nothing reported"));
                    assert!(text.contains(words), "{name} {bug}, seed {seed}: {text}");
                    assert!(text.starts_with("planted_"), "names the kernel: {text}");
                }
            }
            Numbers => {
                assert!(!results.iter().all(right), "{name} {bug}: right numbers under every schedule")
            }
        }
    }
}

macro_rules! cases {
    ($($(#[$doc:meta])* $name:ident: $kernel:literal, $shape:expr, $len:expr, $n:expr, $want:expr, $bugs:expr;)*) => {
        $(
            $(#[$doc])*
            #[test]
            fn $name() {
                let case =
                    Case { kernel: kernel($kernel), shape: $shape, len: $len, n: $n, want: $want, bugs: $bugs };
                check(stringify!($name), case);
            }
        )*
    };
}

cases! {
    missing_syncthreads: "planted_sync", (1, 128, 512), 128, 0,
        |len| (0..len).map(|i| ((i + 1) % len + 1) as f32).collect(), &[Numbers];
    write_after_read_in_a_buffer: "planted_double_buffer", (1, 128, 1024), 128, 0,
        |len| (0..len).map(|i| ((i + 4) % len + 1) as f32).collect(), &[Numbers];
    global_read_past_the_end: "planted_past_end", (1, 96, 0), 96, 0, copied,
        &[Report("load of 4 bytes at 0x")];
    global_read_before_the_start: "planted_halo", (1, 96, 0), 96, 0,
        |len| (0..len).map(|i| (2 * i + 1) as f32).collect(), &[Report("outside every live block (planted.cu:")];
    global_write_past_the_end: "planted_past_store", (1, 64, 0), 64, 0, |_| Vec::new(),
        &[Report("outside every live block")];
    /// Less than a multiple of 1024 bytes: seen at the end of the block.
    shared_memory_too_short: "planted_short_shared", (1, 96, 384), 96, 96, copied,
        &[Report("shared memory of 384 bytes was written at byte 384")];
    /// A multiple of 1024 bytes: the page after it faults.
    shared_memory_too_short_by_a_page: "planted_short_shared", (1, 256, 1024), 256, 256, copied,
        &[Report("shared memory of 1024 bytes was used at byte 1024")];
    weak_copy_wait: "planted_copy_wait", (1, 64, 1024), 256, 0,
        |_| (0..64).map(|t| ((4 * t + 5) % 256 + 1) as f32).collect(),
        &[Numbers, Report("ends with 1 copies (cp.async) it has not waited for")];
    divergent_barrier: "planted_barrier", (1, 64, 256), 64, 0, copied,
        &[Report("deadlock, threads wait for ever"), Report("wait at different barriers, others at planted.cu:")];
    divergent_collective: "planted_warp", (1, 64, 0), 64, 0,
        |len| (0..len).map(|i| ((i ^ 1) + 1) as f32).collect(),
        &[Report("deadlock, threads wait for ever"), Report("lanes of a warp disagree")];
    shuffle_from_an_inactive_lane: "planted_lane", (1, 32, 0), 32, 0,
        |len| (0..len).map(|i| (if i < 16 { 5 } else { i } + 1) as f32).collect(),
        &[Report("shuffle from lane 20, which takes no part (planted.cu:")];
    two_blocks_write_one_byte: "planted_two_writers", (4, 32, 0), 128, 0, copied,
        &[Report("race between blocks: writes the byte")];
    read_of_what_another_block_writes: "planted_cross_read", (4, 32, 0), 128, 0, copied,
        &[Report("and nothing orders the two")];
    write_of_what_other_blocks_read: "planted_late_write", (4, 32, 0), 128, 0, copied,
        &[Report("and nothing orders the two")];
    last_block_without_a_fence: "planted_last_block", (6, 64, 64), 384, 0, summed,
        &[Report("race between blocks"), Report("race between blocks"), Report("race between blocks")];
    last_block_of_last_blocks: "planted_two_levels", (8, 32, 4), 8, 0, summed, &[];
    misaligned_vector: "planted_misaligned", (1, 16, 0), 64, 0, copied,
        &[Report("misaligned load of 16 bytes at 0x")];
    grid_wide_waiting: "planted_spin", (3, 32, 0), 96, 0, copied,
        &[Report("blocks cannot wait for each other (planted.cu:")];
    shared_memory_that_nobody_wrote: "planted_uninitialised", (1, 64, 256), 64, 0, copied, &[Numbers];
}

#[test]
fn what_happened_before_is_transitive() {
    let case = Case {
        kernel: kernel("planted_two_levels"),
        shape: (8, 32, 4),
        len: 8,
        n: 0,
        want: summed,
        bugs: &[],
    };
    // `bug` 1 reads values of blocks that released to others than the reader: in order all the same.
    for seed in SEEDS {
        assert_eq!(run(&device(seed), &case, 1).unwrap()[0], 36.0, "seed {seed}");
    }
}

#[test]
fn races_are_reported_with_both_blocks_and_lines() {
    let cuda = device(0);
    let data = Data::new(&cuda, 64).unwrap();
    cuda.launch(&kernel("planted_two_writers"), launch(2, 32, 0), &data.args(0, 1)).unwrap();
    let text = cuda.synchronize().unwrap_err().to_string();
    let line = 1 + include_str!("planted.cu")
        .lines()
        .position(|l| l.contains("args.bytes.set(args.bug &&"))
        .unwrap();
    let words = [
        "planted_two_writers_f16: race between blocks: writes the byte at 0x".to_owned(),
        format!("that block 0,0,0 wrote (planted.cu:{line}), and nothing orders the two"),
        format!("(planted.cu:{line}) [block 1,0,0 thread 0]"),
    ];
    assert!(words.iter().all(|words| text.contains(words)), "{text}");
}

#[test]
fn blocks_race_on_several_host_threads_too() {
    for seed in SEEDS {
        let driver = Emulated::with_options(seed, Options { host_threads: Some(3), ..Options::default() });
        let cuda = Cuda::new(Arc::new(driver), Precision::Half);
        let data = Data::new(&cuda, 384).unwrap();
        let run = |bug| {
            cuda.launch(&kernel("planted_last_block"), launch(6, 64, 64), &data.args(0, bug)).unwrap();
            data.y.download()
        };
        for _ in 0..20 {
            assert_eq!(run(0).unwrap()[0], summed(384)[0]);
        }
        assert!(run(3).is_err());
    }
}

#[test]
fn memory_that_was_dropped_cannot_be_used() {
    for seed in SEEDS {
        let cuda = device(seed);
        let data = Data::new(&cuda, 64).unwrap();
        let scale = kernel("planted_scale");
        cuda.launch(&scale, launch(1, 64, 0), &data.args(2, 0)).unwrap();
        cuda.synchronize().unwrap();
        let args = Planted { x: cuda.upload(&[1.0f32; 64]).unwrap().read(), ..data.args(2, 0) };
        cuda.launch(&scale, launch(1, 64, 0), &args).unwrap();
        let text = cuda.synchronize().unwrap_err().to_string();
        assert!(text.contains("outside every live block (planted.cu:"), "{text}");
    }
}

#[test]
fn memory_may_be_dropped_and_taken_again_while_queued_work_uses_it() {
    for seed in SEEDS {
        let cuda = device(seed);
        let data = Data::new(&cuda, 64).unwrap();
        let mut results = Vec::new();
        for n in 1..5 {
            let y = cuda.buffer::<f32>(64).unwrap();
            let result = cuda.buffer::<f32>(64).unwrap();
            let scale = |x, y, n| Planted { x, y, ..data.args(n, 0) };
            let args = [scale(data.x.read(), y.both(), n), scale(y.read(), result.both(), 1)];
            args.iter()
                .for_each(|args| cuda.launch(&kernel("planted_scale"), launch(1, 64, 0), args).unwrap());
            results.push(result);
        }
        for (n, result) in (1..).zip(&results) {
            assert_eq!(result.download().unwrap()[9], (10 * n) as f32);
        }
    }
}

#[test]
fn memory_that_nobody_wrote_is_not_a_number() {
    let cuda = device(0);
    let first = cuda.upload(&[1.0f32; 64]).unwrap();
    let address = first.address();
    drop(first);
    let again = cuda.buffer::<f32>(60).unwrap();
    assert_eq!(again.address(), address, "the pool hands the block out again");
    assert!(again.download().unwrap().iter().all(|v| v.is_nan()));
}

#[test]
fn numbers_that_are_no_addresses_are_reported() {
    let cuda = device(0);
    let data = Data::new(&cuda, 64).unwrap();
    let args = Planted { x: bytemuck::cast(4096u64), ..data.args(1, 0) };
    cuda.launch(&kernel("planted_scale"), launch(1, 64, 0), &args).unwrap();
    let text = cuda.synchronize().unwrap_err().to_string();
    assert!(text.contains("load at 0x1000, which is no device memory"), "{text}");
}

#[test]
fn a_block_that_never_ends_is_reported() {
    let options = Options { block_seconds: 1, ..Options::default() };
    let cuda = Cuda::new(Arc::new(Emulated::with_options(0, options)), Precision::Half);
    let data = Data::new(&cuda, 64).unwrap();
    cuda.launch(&kernel("planted_forever"), launch(1, 64, 4), &data.args(0, 0)).unwrap();
    cuda.synchronize().unwrap();
    if cfg!(emulator_sanitized) {
        return; // The thread sanitizer holds signals back.
    }
    cuda.launch(&kernel("planted_forever"), launch(1, 64, 4), &data.args(0, 1)).unwrap();
    let text = cuda.synchronize().unwrap_err().to_string();
    assert!(text.contains("the block has run for 1 s"), "{text}");
}

#[test]
fn blocks_run_in_an_order_that_the_seed_draws() {
    let order = |seed| {
        let cuda = device(seed);
        let data = Data::new(&cuda, 64).unwrap();
        cuda.launch(&kernel("planted_order"), launch(24, 32, 0), &data.args(0, 0)).unwrap();
        data.y.download().unwrap()[..24].to_vec()
    };
    let plain: Vec<f32> = (0..24).map(|i| i as f32).collect();
    assert_eq!(order(0), plain);
    assert_ne!(order(1), plain);
    assert_ne!(order(1), order(2));
    assert_eq!(order(1), order(1), "a seed stands for one schedule");
}

#[test]
fn launches_that_no_device_would_take_are_refused() {
    let info = Info { shared_per_block: 99 << 10, ..Options::default().info };
    let cuda = Cuda::new(Arc::new(Emulated::with_info(0, info)), Precision::Half);
    let data = Data::new(&cuda, 64).unwrap();
    let scale = kernel("planted_scale");
    for (shape, words) in [
        (launch(1, 64, 100 << 10), "102400 bytes of shared memory, a block may have 101376"),
        (launch(1, 512, 0), "512 threads a block, it is for 1 to 256"),
        (launch(0, 64, 0), "a grid of [0, 1, 1] blocks"),
    ] {
        let text = cuda.launch(&scale, shape, &data.args(0, 0)).unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    }
    cuda.launch(&scale, launch(1, 64, 99 << 10), &data.args(2, 0)).unwrap();
    assert_eq!(data.y.download().unwrap()[3], 8.0, "a refused launch leaves the device as it was");
}
