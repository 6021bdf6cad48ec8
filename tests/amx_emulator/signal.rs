//! The handler of SIGILL.

use super::decode::{Instruction, LONGEST, decode};
use super::machine::Machine;
use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    // A constant without a destructor: a handler may touch it at any time.
    static MACHINE: UnsafeCell<Machine> = const { UnsafeCell::new(Machine::new()) };
}

static PRODUCTS: AtomicUsize = AtomicUsize::new(0);

/// Products executed so far.
pub fn products() -> usize {
    PRODUCTS.load(Ordering::Relaxed)
}

/// Has this process' SIGILLs handled.
pub fn install() {
    // SAFETY: all zeros is a valid sigaction; the handler has the signature that SA_SIGINFO asks for. It runs on the
    // thread's own stack: Rust's alternative one is for overflows and small.
    let installed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_illegal_instruction as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut())
    };
    assert_eq!(installed, 0, "a handler of SIGILL");
}

/// Executes the instruction that `context` stands at and moves on behind it.
extern "C" fn on_illegal_instruction(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a ucontext_t, valid while it runs.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let numbered = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    let values = numbered.map(|number| registers[number as usize] as u64);
    let rip = registers[libc::REG_RIP as usize] as u64;
    // SAFETY: RIP points at code, which does not end with an instruction.
    let code = unsafe { &*(rip as *const [u8; LONGEST]) };
    let Some((instruction, length)) = decode(code, rip, &values) else {
        end(format_args!("an illegal instruction that is none of AMX's known here: {code:02x?}"));
    };
    // SAFETY: the thread's own machine; SIGILL is blocked while its handler runs. Addresses are the instruction's, whose
    // author promised them readable or writable.
    let result = MACHINE.with(|machine| unsafe {
        let machine = &mut *machine.get();
        match instruction {
            Instruction::Configure(config) => machine.configure(&*(config as *const [u8; 64])),
            Instruction::Release => {
                machine.release();
                Ok(())
            }
            Instruction::Zero(t) => machine.zero(t),
            Instruction::Load(t, start, stride) => machine.load(t, start, stride),
            Instruction::Store(t, start, stride) => machine.store(t, start, stride),
            Instruction::Multiply(c, a, b) => {
                PRODUCTS.fetch_add(1, Ordering::Relaxed);
                machine.multiply(c, a, b)
            }
        }
    });
    if let Err(fault) = result {
        end(format_args!("{instruction:x?} raises {fault:?}"));
    }
    registers[libc::REG_RIP as usize] += length as i64;
}

/// Ends the process with a message.
fn end(message: std::fmt::Arguments) -> ! {
    eprintln!("AMX emulator: {message}");
    std::process::abort();
}
