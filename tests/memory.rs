//! Memory: what a header claims is not taken before the file's size allows it, and inference of a full-size CT
//! stays small.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use spleen_hpc::config::{Config, Recipe};
use spleen_hpc::data::{nifti, nifti_write, scan, volume::Volume};

const MIB: usize = 1 << 20;

/// Held by each test: the counts are the process's, so another's allocations must not be among them.
static ALONE: Mutex<()> = Mutex::new(());

/// The system's allocator, counting the bytes in use and their maximum.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's own with the same arguments; counting touches only atomics. The
// default `realloc` and `alloc_zeroed` go through these two.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut zipped = Vec::new();
    let mut gz = flate2::read::GzEncoder::new(bytes, flate2::Compression::fast());
    gz.read_to_end(&mut zipped).expect("in memory");
    zipped
}

/// Headers that claim 30000^3 voxels (49 TiB), and a grid of 8 voxels that lies in a cube of 2 km.
#[test]
fn what_a_header_claims_is_not_allocated() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let affine = [[1e6, 0.0, 0.0, 0.0], [0.0, 1e6, 0.0, 0.0], [0.0, 0.0, 1e6, 0.0], [0.0, 0.0, 0.0, 1.0]];
    let vast = folder.path().join("vast.nii");
    nifti_write::write_volume(&vast, &Volume { shape: [2; 3], data: vec![0i16; 8], affine })
        .expect("written");

    let mut liar = std::fs::read(&vast).expect("own file");
    liar[42..48].copy_from_slice(&[30_000i16; 3].map(i16::to_le_bytes).concat());
    liar.resize(1024, 0);
    let paths = ["liar.nii", "liar.nii.gz", "pair.img", "pair.img.gz"].map(|name| folder.path().join(name));
    std::fs::write(&paths[0], &liar).expect("written");
    std::fs::write(&paths[1], gzip(&liar)).expect("written");
    let mut half = liar.clone();
    half[344..348].copy_from_slice(b"ni1\0");
    std::fs::write(folder.path().join("pair.hdr"), &half).expect("written");
    std::fs::write(&paths[2], [0; 600]).expect("written");
    std::fs::write(&paths[3], gzip(&[0; 600])).expect("written");

    let transform = Config::for_recipe(Recipe::V036).preprocess;
    for (path, part) in paths.iter().zip([
        "but the file has 1024 bytes",
        "can hold compressed",
        "but the file has 600 bytes",
        "can hold compressed",
    ]) {
        let error = peak_below(8 * MIB, || nifti::read(path).map(|_| ())).expect_err(part).to_string();
        assert!(error.contains(part), "wanted {part:?}: {error}");
    }
    let refused = peak_below(8 * MIB, || scan::read(&vast, &transform).map(|_| ()));
    let error = refused.expect_err("8e18 voxels").to_string();
    assert!(error.starts_with(&vast.display().to_string()) && error.contains("check the spacing"), "{error}");
}

/// A needle of 32767 voxels from toe to head: scratch must not grow with the longest axis.
#[test]
fn a_long_thin_scan_takes_no_more_than_its_voxels_warrant() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let needle = folder.path().join("needle.nii");
    let affine = [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]];
    let volume = Volume { shape: [32_767, 1, 1], data: vec![5i16; 32_767], affine };
    nifti_write::write_volume(&needle, &volume).expect("written");
    let transform = Config::for_recipe(Recipe::V036).preprocess;
    let scan = peak_below(8 * MIB, || scan::read(&needle, &transform)).expect("a scan like any other");
    assert!(scan.prepared.image.len() > 16_000);
}

/// Runs `work` and asserts that it never holds more than `most` bytes beyond what is in use now. The buffer of the
/// reader is 1 MiB.
fn peak_below<T>(most: usize, work: impl FnOnce() -> T) -> T {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = work();
    let taken = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    assert!(taken < most, "{taken} bytes were taken");
    result
}

/// The real program, the bundle's network and window, two adults of 512 x 512 x 90 voxels, so that one is read or
/// written while the other is predicted. Two threads: their number decides how much scratch memory there is.
#[cfg(target_os = "linux")]
#[test]
fn inference_of_a_full_ct_stays_under_a_gibibyte_and_a_half() {
    use spleen_hpc::data::phantom::{PhantomConfig, case};
    use spleen_hpc::nn::{UNet, weights};

    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let (image, _) = case(&PhantomConfig { full: true, ..PhantomConfig::default() }, 0);
    assert_eq!(image.len(), 512 * 512 * 90);
    std::fs::create_dir(at("scans")).expect("a folder");
    nifti_write::write_volume(at("scans/one.nii.gz"), &image).expect("written");
    drop(image);
    std::fs::copy(at("scans/one.nii.gz"), at("scans/two.nii.gz")).expect("copied");
    let net = UNet::new(&Config::for_recipe(Recipe::V036).net, 0).expect("a valid network");
    weights::write_safetensors(&at("net.safetensors"), &net.state_dict(), &Default::default())
        .expect("written");

    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_spleen-hpc"))
        .args(["infer", "--threads", "2", "--overlap", "0", "--device", "cpu"])
        .arg("--weights")
        .arg(at("net.safetensors"))
        .arg("--out")
        .arg(at("masks"))
        .arg(at("scans"))
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("the program starts");
    let mut peak = 0;
    let status = loop {
        // The kernel's own high-water mark; what it says last, milliseconds before the end, is the peak.
        peak = peak.max(high_water_kib(Path::new(&format!("/proc/{}/status", child.id()))).unwrap_or(0));
        if let Some(status) = child.try_wait().expect("our child") {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert!(status.success(), "{status}");
    assert!(at("masks/one.nii.gz").is_file() && at("masks/two.nii.gz").is_file());
    println!("infer, two CTs of 512 x 512 x 90 voxels: peak of {} MiB", peak / 1024);
    // The volume alone is 90 MiB in float32: a peak below that would mean that nothing was measured.
    assert!((90 * 1024..1536 * 1024).contains(&peak), "the peak was {} MiB", peak / 1024);
}

#[cfg(target_os = "linux")]
fn high_water_kib(status: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
