//! The device that tests of the CUDA engine run on.

use spleen_hpc::config::{Amp, DeviceChoice};
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::device::{Device, choice};
use std::sync::Arc;

/// Whether `SPLEEN_TEST_DEVICE=cuda` asks for the first GPU instead of the emulator.
pub fn native() -> bool {
    match std::env::var("SPLEEN_TEST_DEVICE").as_deref() {
        Ok("cuda") => true,
        Ok("emulated") | Err(_) => false,
        Ok(other) => panic!("SPLEEN_TEST_DEVICE={other}: it is cuda or emulated"),
    }
}

/// The emulator with this seed of its schedule, or the GPU, which must then be there. Without either a line says so;
/// `SPLEEN_REQUIRE_NVRTC=1` makes that a failure.
pub fn device(precision: Precision, seed: u64) -> Option<Arc<Cuda>> {
    if native() {
        let amp = if precision == Precision::Half { Amp::On } else { Amp::Off };
        return match choice::resolve(DeviceChoice::Cuda(0), amp) {
            Ok((Device::Cuda(cuda), _)) => Some(cuda),
            Ok((Device::Cpu(_), why)) => panic!("{why}"),
            Err(err) => panic!("{err}"),
        };
    }
    #[cfg(emulated)]
    {
        use spleen_hpc::device::cuda::emulated::Emulated;
        Some(Cuda::new(Arc::new(Emulated::new(seed)), precision))
    }
    #[cfg(not(emulated))]
    {
        let _ = (precision, seed);
        assert!(std::env::var_os("SPLEEN_REQUIRE_NVRTC").is_none(), "no C++ compiler built the emulator");
        println!("skipped: no C++ compiler built the emulator");
        None
    }
}
