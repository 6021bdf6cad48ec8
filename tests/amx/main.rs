//! AMX: the instructions, against their definition; convolutions on them, against theirs. Emulated where the CPU has
//! none; where it has, the emulator is compared with it.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "../amx_emulator/mod.rs"]
mod amx_emulator;
mod instructions;
mod order;
mod share;

/// Products are counted for the process: tests that count or multiply take turns.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
