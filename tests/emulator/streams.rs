//! Streams, events, pinned memory and graphs: what is not ordered goes wrong under some schedule, what is ordered never does.

use crate::{Data, device, kernel, launch};
use spleen_hpc::Result;
use spleen_hpc::device::cuda::driver::{Driver, Stream, Symbol};
use spleen_hpc::device::cuda::emulated::Emulated;
use spleen_hpc::device::cuda::{Buf, Cuda, Precision};
use std::sync::Arc;

const SEEDS: std::ops::Range<u64> = 0..12;
const MAIN: Stream = Stream(0);

/// y = n x on a stream.
fn scale(cuda: &Cuda, stream: Stream, x: &Buf<f32>, y: &Buf<f32>, n: u32, data: &Data) -> Result<()> {
    let symbol = Symbol { file: "planted.cu", name: "planted_scale", precision: Precision::Half };
    let args = crate::Planted { x: x.read(), y: y.both(), ..data.args(n, 0) };
    // SAFETY: buffers of at least as many values as there are threads.
    unsafe { cuda.driver().launch(stream, symbol, launch(1, x.len() as u32, 0), bytemuck::bytes_of(&args)) }
}

/// Host memory that copies use when they run.
struct Pinned<'a> {
    driver: &'a dyn Driver,
    pointer: *mut f32,
    len: usize,
}

impl<'a> Pinned<'a> {
    fn new(driver: &'a dyn Driver, values: &[f32]) -> Self {
        let pointer = driver.allocate_pinned(4 * values.len()).unwrap().cast();
        let mut pinned = Pinned { driver, pointer, len: values.len() };
        pinned.set(values);
        pinned
    }

    fn set(&mut self, values: &[f32]) {
        // SAFETY: our own memory, of this length.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }.copy_from_slice(values);
    }

    fn get(&self) -> Vec<f32> {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }.to_vec()
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        // SAFETY: from `allocate_pinned`; every test waits for its copies.
        unsafe { self.driver.free_pinned(self.pointer.cast(), 4 * self.len) }
    }
}

#[test]
fn pinned_memory_is_read_and_written_when_copies_run() {
    let cuda = device(0);
    let driver = cuda.driver();
    let y = cuda.upload(&[0.0f32; 4]).unwrap();
    let mut from = Pinned::new(driver, &[1.0; 4]);
    let to = Pinned::new(driver, &[7.0; 4]);
    // SAFETY: 16 bytes each, alive until the end.
    unsafe {
        driver.copy_in(MAIN, y.address(), from.pointer.cast(), 16).unwrap();
        driver.copy_out(MAIN, to.pointer.cast(), y.address(), 16).unwrap();
    }
    assert_eq!(to.get(), [7.0; 4], "nobody has waited");
    from.set(&[2.0; 4]);
    cuda.synchronize().unwrap();
    assert_eq!(to.get(), [2.0; 4], "what the memory held when the copy ran");
}

/// A producer on a second stream and a consumer on the first: the consumer's result.
fn across_streams(seed: u64, ordered: bool) -> Vec<f32> {
    let cuda = device(seed);
    let driver = cuda.driver();
    let side = driver.new_stream().unwrap();
    let data = Data::new(&cuda, 32).unwrap();
    let (middle, result) = (cuda.upload(&[0.0f32; 32]).unwrap(), cuda.upload(&[0.0f32; 32]).unwrap());
    scale(&cuda, side, &data.x, &middle, 3, &data).unwrap();
    let event = driver.record(side).unwrap();
    if ordered {
        driver.wait(MAIN, event).unwrap();
    }
    scale(&cuda, MAIN, &middle, &result, 1, &data).unwrap();
    let got = result.download().unwrap();
    driver.synchronize(side).unwrap();
    got
}

#[test]
fn streams_are_ordered_by_events_only() {
    let want: Vec<f32> = (1..=32).map(|i| (3 * i) as f32).collect();
    assert!(SEEDS.map(|seed| across_streams(seed, true)).all(|got| got == want));
    let without: Vec<bool> = SEEDS.map(|seed| across_streams(seed, false) == want).collect();
    assert!(without.contains(&false), "a missing wait is seen under some schedule");
    assert!(!without[0], "seed 0 runs other streams as late as it can");
}

#[test]
fn errors_of_queued_work_surface_when_it_is_waited_for_and_stay() {
    for seed in SEEDS {
        let cuda = device(seed);
        let data = Data::new(&cuda, 64).unwrap();
        let queued = cuda.launch(&kernel("planted_past_end"), launch(1, 64, 0), &data.args(0, 1));
        assert!(queued.is_ok());
        let text = cuda.synchronize().unwrap_err().to_string();
        assert!(text.starts_with("planted_past_end_f16: "), "{text}");
        let later = scale(&cuda, MAIN, &data.x, &data.y, 1, &data).unwrap_err().to_string();
        assert_eq!(later, text, "a device that has failed stays so");
        assert_eq!(data.y.download().unwrap_err().to_string(), text);
    }
}

/// One step: y = n x, then x = y, through a temporary block and a second stream.
fn step(cuda: &Arc<Cuda>, side: Stream, data: &Data, n: u32) -> Result<()> {
    let driver = cuda.driver();
    let temporary = cuda.buffer::<f32>(data.x.len())?;
    scale(cuda, MAIN, &data.x, &temporary, n, data)?;
    let forked = driver.record(MAIN)?;
    driver.wait(side, forked)?;
    scale(cuda, side, &temporary, &data.x, 1, data)?;
    let joined = driver.record(side)?;
    driver.wait(MAIN, joined)
}

#[test]
fn replays_equal_eager_steps() {
    for seed in SEEDS {
        let run = |replayed: bool| {
            let cuda = device(seed);
            let driver = cuda.driver();
            let side = driver.new_stream().unwrap();
            let data = Data::new(&cuda, 32).unwrap();
            if replayed {
                driver.begin_capture(MAIN).unwrap();
                let mut n = 3;
                step(&cuda, side, &data, n).unwrap();
                n = 5;
                let graph = driver.end_capture(MAIN).unwrap();
                assert_eq!(n, 5, "the graph keeps the 3 it was captured with");
                // SAFETY: all buffers live, the temporary one in the pool.
                (0..4).for_each(|_| unsafe { driver.replay(MAIN, graph) }.unwrap());
            } else {
                (0..4).for_each(|_| step(&cuda, side, &data, 3).unwrap());
            }
            data.x.download().unwrap()
        };
        let want: Vec<f32> = (1..=32).map(|i| (81 * i) as f32).collect();
        assert_eq!(run(false), want, "seed {seed}");
        assert_eq!(run(true), want, "seed {seed}");
    }
}

#[test]
fn captured_work_does_not_run() {
    for seed in SEEDS {
        let cuda = device(seed);
        let driver = cuda.driver();
        let data = Data::new(&cuda, 32).unwrap();
        driver.begin_capture(MAIN).unwrap();
        scale(&cuda, MAIN, &data.x, &data.y, 2, &data).unwrap();
        assert!(cuda.synchronize().is_err(), "a captured stream cannot be waited for");
        let graph = driver.end_capture(MAIN).unwrap();
        assert_eq!(data.y.download().unwrap()[0], 0.0);
        // SAFETY: the buffers live.
        unsafe { driver.replay(MAIN, graph) }.unwrap();
        assert_eq!(data.y.download().unwrap()[0], 2.0);
    }
}

#[test]
fn a_capture_must_wait_for_its_streams() {
    let cuda = device(0);
    let driver = cuda.driver();
    let side = driver.new_stream().unwrap();
    let data = Data::new(&cuda, 32).unwrap();
    driver.begin_capture(MAIN).unwrap();
    let forked = driver.record(MAIN).unwrap();
    driver.wait(side, forked).unwrap();
    scale(&cuda, side, &data.x, &data.y, 2, &data).unwrap();
    let text = driver.end_capture(MAIN).unwrap_err().to_string();
    assert!(text.contains("does not wait for stream 1"), "{text}");
}

#[test]
fn memory_is_given_back_after_queued_work() {
    let driver = Emulated::new(0);
    let address = driver.allocate(256).unwrap();
    let to = Pinned::new(&driver, &[0.0]);
    // SAFETY: 4 bytes of a block of 256, and of pinned memory.
    unsafe {
        driver.fill(MAIN, address, 0, 256).unwrap();
        driver.copy_out(MAIN, to.pointer.cast(), address, 4).unwrap();
    }
    driver.free(address, 256);
    assert_eq!(to.get(), [0.0]);
    driver.synchronize(MAIN).unwrap();
    // SAFETY: not live, which is the point: the range is checked before it is used.
    unsafe { driver.fill(MAIN, address, 0, 4) }.unwrap();
    let text = driver.synchronize(MAIN).unwrap_err().to_string();
    assert!(text.contains("fill of 4 bytes at 0x") && text.contains("in no live block"), "{text}");
}
