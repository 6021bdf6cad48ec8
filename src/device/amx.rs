//! AMX: eight tile registers of 16 rows of 64 bytes, and products of bfloat16 matrices in them.
//!
//! `C += A B` with C 16 x 16 f32, A 16 x 32 bfloat16 (row by row) and B 32 x 16 bfloat16, whose rows hold pairs: row k of
//! the register is rows 2 k and 2 k + 1 of B, interleaved. TDPBF16PS adds the 16 even and the 16 odd products of an
//! element of C in a chain of fused multiply-adds each, adds the two sums, and adds that to C; every step rounds to
//! nearest even, and denormals count as 0 on both sides. That is another order than [`super::bf16`]'s, so results differ
//! from the vector units' in their last bits; and by the rounding of operands where those multiply transforms.
//!
//! Rust's tile intrinsics are not stable: each instruction here is an `asm!` block. The compiler neither allocates nor
//! spills tile registers and keeps the order of such blocks, so a tile holds its value from one block to the next.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile.
pub const ROWS: usize = 16;

/// Bytes of a row: 32 bfloat16 or 16 f32.
pub const ROW_BYTES: usize = 64;

/// Bytes of a tile.
pub const TILE_BYTES: usize = ROWS * ROW_BYTES;

/// Floating-point operations of a product: 16 x 16 x 32 multiplications and as many additions.
pub const PRODUCT_FLOPS: usize = 2 * ROWS * ROWS * 2 * (ROW_BYTES / 4);

/// Whether the CPU has AMX with bfloat16 products and the kernel lets this process use it. Asks the kernel once.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| is_x86_feature_detected!("avx512bf16") && in_cpu() && permitted())
}

/// What CPUID says, and whether the kernel saves tiles when it switches threads.
#[allow(unused_unsafe)] // CPUID is a safe function in newer Rusts than the oldest that builds this.
fn in_cpu() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    // The states of the tiles' shapes and contents.
    const TILES_SAVED: u64 = 0b11 << 17;
    // SAFETY: every x86-64 CPU has CPUID.
    let (highest, features) = unsafe { (__cpuid(0).eax, __cpuid(1).ecx) };
    if highest < 7 || features & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: leaf 7 was just seen to exist.
    let extended = unsafe { __cpuid_count(7, 0).edx };
    // SAFETY: OSXSAVE says that XGETBV works.
    let saved = unsafe { xcr0() };
    extended & AMX_BF16 != 0 && extended & AMX_TILE != 0 && saved & TILES_SAVED == TILES_SAVED
}

/// Which states the kernel saves.
///
/// # Safety
/// XGETBV must be enabled.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: by the caller's promise.
    unsafe { _xgetbv(0) }
}

/// Asks the kernel for the 8 KB a thread that tiles take; all threads of the process may use them then.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    use std::ffi::{c_int, c_long, c_ulong};
    unsafe extern "C" {
        fn syscall(number: c_long, ...) -> c_long;
    }
    const ARCH_PRCTL: c_long = 158;
    const ARCH_REQ_XCOMP_PERM: c_int = 0x1023;
    const XFEATURE_XTILEDATA: c_ulong = 18;
    // SAFETY: the call reads no memory of ours.
    unsafe { syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Other systems are not asked: their rules are others.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The operand of LDTILECFG.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tiles, configured until it is dropped: 0 to 3 hold sums, 4 and 5 left operands, 6 and 7 right ones. Without
/// a configuration the kernel has no tiles to save when it switches threads.
pub struct Tiles(PhantomData<*mut ()>);

impl Tiles {
    /// Configures them for products over `pairs` pairs of bfloat16, at most 16: a left operand's 16 rows have so many, a
    /// right operand so many rows. All other sides are 16 rows and 64 bytes.
    ///
    /// # Safety
    /// AMX must be [available](available()), or its instructions trapped and emulated; the thread must not hold other
    /// `Tiles`.
    pub unsafe fn configure(pairs: usize) -> Self {
        assert!((1..=16).contains(&pairs), "{pairs} pairs");
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(ROW_BYTES as u16);
        config.rows[..8].fill(ROWS as u8);
        config.row_bytes[4..6].fill(4 * pairs as u16);
        config.rows[6..8].fill(pairs as u8);
        // SAFETY: by the caller's promise; the operand is 64 readable bytes.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags));
        }
        Tiles(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the instruction that made `self` worked, so this one does.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
    }
}

/// Tile T = 0.
///
/// # Safety
/// The thread must hold [`Tiles`].
#[inline(always)]
pub unsafe fn zero<const T: u8>() {
    // SAFETY: by the caller's promise.
    unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem, preserves_flags)) }
}

/// Tile T = its rows, every `stride` bytes from `start`.
///
/// # Safety
/// The thread must hold [`Tiles`]; the rows must be readable.
#[inline(always)]
pub unsafe fn load<const T: u8>(start: *const u8, stride: usize) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm{t}, [{start} + {stride}]",
            t = const T, start = in(reg) start, stride = in(reg) stride,
            options(nostack, readonly, preserves_flags),
        );
    }
}

/// Writes the rows of tile T every `stride` bytes from `start`.
///
/// # Safety
/// The thread must hold [`Tiles`]; the rows must be writable.
#[inline(always)]
pub unsafe fn store<const T: u8>(start: *mut u8, stride: usize) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "tilestored [{start} + {stride}], tmm{t}",
            t = const T, start = in(reg) start, stride = in(reg) stride,
            options(nostack, preserves_flags),
        );
    }
}

/// Tile C += tile A times tile B; three different ones, whose shapes fit.
///
/// # Safety
/// The thread must hold [`Tiles`].
#[inline(always)]
pub unsafe fn multiply<const C: u8, const A: u8, const B: u8>() {
    const { assert!(C != A && C != B && A != B, "three tiles") };
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
            c = const C, a = const A, b = const B,
            options(nostack, nomem, preserves_flags),
        );
    }
}

/// Multiplies tiles of zeros, six independent sums of `steps` products each and nothing else: what the unit can do.
/// Returns the number of floating-point operations, 0 where AMX is not in use.
pub fn peak_bf16(steps: usize) -> usize {
    if !super::cpu::amx() {
        return 0;
    }
    // SAFETY: AMX is in use; who holds `Tiles` calls nothing that configures them again, by their contract.
    unsafe {
        let _tiles = Tiles::configure(16);
        zero::<6>();
        zero::<7>();
        for _ in 0..steps {
            multiply::<0, 6, 7>();
            multiply::<1, 6, 7>();
            multiply::<2, 6, 7>();
            multiply::<3, 6, 7>();
            multiply::<4, 6, 7>();
            multiply::<5, 6, 7>();
        }
    }
    steps * 6 * PRODUCT_FLOPS
}
