//! AMX on a CPU without it: its instructions raise SIGILL there, and a handler executes them in software.
//!
//! So the very machine code that a CPU with AMX executes is tested everywhere. Decoder and machine follow Intel's
//! Software Developer's Manual, volume 2 (encodings, operation) and volume 1, chapter 18 (tiles). What they do not know,
//! and what a CPU would refuse, ends the process with a message.

pub mod decode;
pub mod machine;
mod signal;

use spleen_hpc::device::{amx, cpu};
use std::sync::Once;

/// Turns AMX on for this process, executed by the CPU where it can and emulated where not.
pub fn turn_on() {
    static HANDLER: Once = Once::new();
    if !amx::available() {
        HANDLER.call_once(signal::install);
    }
    // SAFETY: the CPU executes the instructions, or the handler does.
    unsafe { cpu::use_amx() };
}

/// Products of tiles that all threads have emulated so far; `None` where the CPU executes them.
#[allow(dead_code)] // Not every test binary counts.
pub fn emulated_products() -> Option<usize> {
    (!amx::available()).then(signal::products)
}
