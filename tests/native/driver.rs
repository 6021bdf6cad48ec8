//! The engine through libcuda's functions.

use crate::with_fake;
use spleen_hpc::Error;
use spleen_hpc::device::cuda::driver::Launch;
use spleen_hpc::device::cuda::native::Native;
use spleen_hpc::device::cuda::{Cuda, Kernel, Precision};
use spleen_hpc::ops;
use std::sync::Arc;

const PRECISIONS: [Precision; 2] = [Precision::Half, Precision::Single];

fn gpu(precision: Precision) -> Arc<Cuda> {
    Cuda::new(Arc::new(Native::new(0).expect("the fake driver works")), precision)
}

/// Zeros, more than any kernel takes arguments.
type Zeros = [u64; 64];

/// Every op's small case agrees with the CPU: kernels are compiled, loaded, found and given their arguments.
#[test]
fn ops_agree_with_the_cpu() {
    with_fake("driver::ops_agree_with_the_cpu", "", || {
        for precision in PRECISIONS {
            let cuda = gpu(precision);
            for test in ops::self_tests() {
                let agreement = (test.run)(&cuda).unwrap_or_else(|err| panic!("{}: {err}", test.name));
                println!("{} {precision:?}: {agreement}", test.name);
            }
        }
    });
}

/// A chip that NVRTC does not know gets PTX.
#[test]
fn an_unknown_chip_gets_ptx() {
    with_fake("driver::an_unknown_chip_gets_ptx", "capability=13.0", || {
        let cuda = gpu(Precision::Half);
        (ops::self_tests()[0].run)(&cuda).unwrap();
        let cache = std::env::var_os("SPLEEN_KERNEL_CACHE").unwrap();
        let file = std::fs::read_dir(cache).unwrap().next().unwrap().unwrap().file_name();
        assert!(file.to_str().unwrap().contains("compute_80"), "{file:?}");
    });
}

#[test]
fn kernels_are_prepared_once_and_kept() {
    with_fake("driver::kernels_are_prepared_once_and_kept", "", || {
        let cuda = gpu(Precision::Half);
        let first = cuda.prepare(&["residual.cu"]).unwrap();
        assert_eq!((first.compiled, first.cached, first.warning), (1, 0, None));
        let again = cuda.prepare(&["residual.cu"]).unwrap();
        assert_eq!((again.compiled, again.cached), (0, 0), "it is loaded already");
        let other = gpu(Precision::Half).prepare(&["residual.cu"]).unwrap();
        assert_eq!((other.compiled, other.cached), (0, 1));
        assert!(cuda.prepare(&["none.cu"]).is_err());
    });
}

/// A graph keeps copies, fills and launches, among them one whose kernel is loaded and whose memory is allocated while
/// it is kept; replayed, it works on what is in memory then.
#[test]
fn a_graph_is_replayed() {
    with_fake("driver::a_graph_is_replayed", "", || {
        let cuda = gpu(Precision::Single);
        let shape = spleen_hpc::tensor::Shape::new(1, [2, 2, 2], 4);
        let act = cuda.act(shape.len()).unwrap();
        let view = spleen_hpc::tensor::View::plain(act.clone(), shape);
        let (driver, stream) = (cuda.driver(), cuda.stream());
        driver.begin_capture(stream).unwrap();
        let sum = ops::residual::cuda::add(&view, Some(&view)).unwrap();
        let zero = cuda.buffer::<u32>(8).unwrap();
        zero.fill(0x11).unwrap();
        let graph = driver.end_capture(stream).unwrap();
        for round in 1..4 {
            act.upload(&vec![round as f32; shape.len()]).unwrap();
            zero.upload(&[0; 8]).unwrap();
            // SAFETY: `act`, `sum` and `zero` live.
            unsafe { driver.replay(stream, graph).unwrap() };
            assert_eq!(sum.download().unwrap(), vec![2.0 * round as f32; shape.len()]);
            assert_eq!(zero.download().unwrap(), [0x1111_1111; 8]);
        }
    });
}

/// Two streams, ordered by more events than a stream has: every value is copied before the next overwrites it.
#[test]
fn streams_wait_for_each_other() {
    with_fake("driver::streams_wait_for_each_other", "seed=1", || {
        const ROUNDS: usize = 200;
        let cuda = gpu(Precision::Single);
        let (driver, first) = (cuda.driver(), cuda.stream());
        let second = driver.new_stream().unwrap();
        let (value, history) = (cuda.upload(&[0u8; 1]).unwrap(), cuda.upload(&[0u8; ROUNDS]).unwrap());
        for round in 0..ROUNDS {
            // SAFETY: both buffers live and have these bytes.
            unsafe { driver.fill(first, value.address(), round as u8, 1).unwrap() };
            driver.wait(second, driver.record(first).unwrap()).unwrap();
            let slot = history.slice(round, 1);
            // SAFETY: as above.
            unsafe { driver.copy(second, slot.address(), value.address(), 1).unwrap() };
            driver.wait(first, driver.record(second).unwrap()).unwrap();
        }
        let want: Vec<u8> = (0..ROUNDS).map(|round| round as u8).collect();
        driver.synchronize(second).unwrap();
        assert_eq!(history.download().unwrap(), want);
    });
}

/// The context is made current in whichever thread calls.
#[test]
fn any_thread_may_call() {
    with_fake("driver::any_thread_may_call", "", || {
        let cuda = gpu(Precision::Half);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let buf = cuda.upload(&[1u32, 2, 3]).unwrap();
                    assert_eq!(buf.download().unwrap(), [1, 2, 3]);
                    let pinned = cuda.driver().allocate_pinned(4096).unwrap();
                    // SAFETY: just allocated, and no copy uses it.
                    unsafe { cuda.driver().free_pinned(pinned, 4096) };
                });
            }
        });
    });
}

#[test]
fn memory_that_does_not_fit_is_told_with_numbers_and_a_cure() {
    let name = "driver::memory_that_does_not_fit_is_told_with_numbers_and_a_cure";
    with_fake(name, "memory=104857600", || {
        let cuda = gpu(Precision::Half);
        let kept = cuda.buffer::<u8>(40 << 20).unwrap();
        let err = cuda.buffer::<u8>(80 << 20).map(drop).unwrap_err();
        let said = err.to_string();
        assert!(
            said.starts_with("the GPU has no room for 80 MiB more (60 MiB of 100 MiB are free): lower --"),
            "{said}"
        );
        assert!(matches!(err, Error::OutOfMemory { bytes: 83886080, free: 62914560, .. }));
        assert_eq!(err.exit_code(), 1);
        drop(kept);
    });
}

/// Work that fails later is blamed on the kernels launched last, newest first.
#[test]
fn late_errors_name_the_last_kernels() {
    with_fake("driver::late_errors_name_the_last_kernels", "sync=700", || {
        let cuda = gpu(Precision::Half);
        let buffer = cuda.buffer::<u32>(4).unwrap();
        let shape = spleen_hpc::tensor::Shape::new(1, [1, 1, 3], 1);
        let view = spleen_hpc::tensor::View::plain(cuda.act(3).unwrap(), shape);
        ops::residual::cuda::add(&view, None).unwrap();
        let said = buffer.download().unwrap_err().to_string();
        assert_eq!(
            said,
            "work on the GPU failed: an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS); launched last: \
             residual_add_scalar_f16 (1x1x1 blocks of 256 threads, 0 bytes of shared memory each); CUDA_LAUNCH_BLOCKING=1 makes \
             the kernel at fault the first of them"
        );
    });
}

/// A block may have as much dynamic shared memory as the device allows, not the 48 KiB that need no asking.
#[test]
fn blocks_may_have_all_shared_memory() {
    with_fake("driver::blocks_may_have_all_shared_memory", "", || {
        let cuda = gpu(Precision::Half);
        let launch = |shared| {
            // Of kernels/residual.cu; of length 0, so that no address is used.
            let kernel: Kernel<Zeros> = Kernel::new("residual.cu", "residual_add");
            cuda.launch(&kernel, Launch { grid: [1; 3], threads: 32, shared }, &[0; 64])
        };
        launch(cuda.info().shared_per_block).unwrap();
        assert!(launch(cuda.info().shared_per_block + 1).is_err());
        cuda.synchronize().unwrap();
    });
}

/// A launch that is refused names the kernel and its shape; a kernel that is not there, its file.
#[test]
fn refused_launches_are_described() {
    with_fake("driver::refused_launches_are_described", "", || {
        let cuda = gpu(Precision::Half);
        let launch = Launch { grid: [7, 2, 1], threads: 2048, shared: 0 };
        let kernel: Kernel<Zeros> = Kernel::new("residual.cu", "residual_add");
        let said = cuda.launch(&kernel, launch, &[0; 64]).unwrap_err().to_string();
        assert!(
            said.starts_with(
                "residual.cu: launch of residual_add_f16 (7x2x1 blocks of 2048 threads, 0 bytes"
            ),
            "{said}"
        );
        let unknown: Kernel<Zeros> = Kernel::new("residual.cu", "nothing");
        let said = cuda.launch(&unknown, launch, &[0; 64]).unwrap_err().to_string();
        assert_eq!(
            said,
            "residual.cu has no kernel nothing_f16: named symbol not found (CUDA_ERROR_NOT_FOUND)"
        );
    });
}

/// The driver refuses what a newer NVRTC made: the sentence says which is older.
#[test]
fn an_old_driver_is_named() {
    with_fake("driver::an_old_driver_is_named", "load=222 version=11080", || {
        let cuda = gpu(Precision::Half);
        let said = cuda.prepare(&["residual.cu"]).unwrap_err().to_string();
        assert!(
            said.contains("residual.cu for sm_90a: the NVIDIA driver does not load it: the provided PTX"),
            "{said}"
        );
        assert!(
            said.contains("but the driver is of CUDA 11.8: install that NVRTC, or a newer driver"),
            "{said}"
        );
    });
}
