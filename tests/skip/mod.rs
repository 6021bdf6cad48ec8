//! Tests that need NVRTC: where there is none they say so and pass, or fail with `SPLEEN_REQUIRE_NVRTC=1`.

use spleen_hpc::device::cuda::nvrtc::Nvrtc;

/// Whether what is missing makes a test fail.
pub fn required() -> bool {
    std::env::var_os("SPLEEN_REQUIRE_NVRTC").is_some_and(|value| value == "1")
}

/// The machine's NVRTC.
pub fn nvrtc() -> Option<&'static Nvrtc> {
    match Nvrtc::get() {
        Ok(nvrtc) => Some(nvrtc),
        Err(why) if required() => panic!("SPLEEN_REQUIRE_NVRTC=1, but {why}"),
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}
