//! The register tiles: up to 2 x 2 or 4 x 1 accumulators of 16 x 16 floats stay in tile registers over a whole reduction.
//!
//! A product takes 16 cycles and a load of 16 rows that lie in L1 takes 8. 2 x 2 needs four loads for four products, 4 x 1
//! five: both leave the multiplier busy. 1 x 1 is bound by the latency of a product, 52 cycles, three times as slow.
//!
//! That is so of lines in L1. A halo tile and the weights lie in L2, and rows of 16 channels begin in the middle of lines:
//! loads take longer, and were what a forward pass waited for. A column is 4 x 1 of neighbouring planes of outputs, of which
//! each reads what the ones before read, too: with three taps along d, six parts of A and three of B are loaded for twelve
//! products. Three planes load eight parts for nine, two seven for six; fewer than three in all are left to 2 x 2 and 4 x 1.
//!
//! Kernels are listings, one instruction after the other. The wide ones are in an order in which a product does not wait for
//! the one before of its sum, three or four earlier but for a column's last, nor for a register that was just read: at
//! least one product lies between the last that reads a register and the first that reads what it is loaded with next.
//!
//! Tile registers outlive a call: a reduction may be cut into calls with other work between them, which vector units do
//! while products are under way.

use crate::device::amx::{ROW_BYTES, load, multiply, store, zero};

/// Register tiles of sums at most.
pub const SUMS: usize = 4;

/// Planes of outputs from which on columns are worth it.
pub const COLUMNS_FROM: usize = 3;

/// Taps along d of a column.
pub const TAPS: usize = 3;

/// One step of a reduction: where its A and its B begin, in bytes from the operands' own starts.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Of A.
    pub a: usize,
    /// Of B.
    pub b: usize,
}

/// Instructions of a listing: `a P T`, `b P T`: load part P of an operand into tile T; `S += T U`: add the product of tiles
/// T and U to sum S.
macro_rules! instructions {
    ($a:ident $stride:ident $b:ident:) => {};
    ($a:ident $stride:ident $b:ident: a $part:literal $tile:literal; $($rest:tt)*) => {
        load::<$tile>($a($part), $stride);
        instructions!($a $stride $b: $($rest)*);
    };
    ($a:ident $stride:ident $b:ident: b $part:literal $tile:ident; $($rest:tt)*) => {
        load::<$tile>($b($part), ROW_BYTES);
        instructions!($a $stride $b: $($rest)*);
    };
    ($a:ident $stride:ident $b:ident: $sum:literal += $left:literal $right:ident; $($rest:tt)*) => {
        multiply::<$sum, $left, $right>();
        instructions!($a $stride $b: $($rest)*);
    };
}

/// `$name`: sums += A B of one step, or of three of a column. The right operands' tiles are X and Y.
macro_rules! kernel {
    ($name:ident: $($listing:tt)+) => {
        /// # Safety
        /// See [`Operands::multiply`].
        #[inline(always)]
        unsafe fn $name<const X: u8, const Y: u8>(
            a: impl Fn(usize) -> *const u8,
            stride: usize,
            b: impl Fn(usize) -> *const u8,
        ) {
            // SAFETY: by the caller's promise.
            unsafe { instructions!(a stride b: $($listing)+); }
        }
    };
}

kernel!(multiply_2x2: b 0 X; b 1 Y; a 0 4; 0 += 4 X; 1 += 4 Y; a 1 5; 2 += 5 X; 3 += 5 Y;);
kernel!(multiply_1x2: b 0 X; b 1 Y; a 0 4; 0 += 4 X; 1 += 4 Y;);
kernel!(multiply_4x1: b 0 X; a 0 4; 0 += 4 X; a 1 5; 1 += 5 X; a 2 4; 2 += 4 X; a 3 5; 3 += 5 X;);
kernel!(multiply_3x1: b 0 X; a 0 4; 0 += 4 X; a 1 5; 1 += 5 X; a 2 4; 2 += 4 X;);
kernel!(multiply_2x1: b 0 X; a 0 4; 0 += 4 X; a 1 5; 1 += 5 X;);
kernel!(multiply_1x1: b 0 X; a 0 4; 0 += 4 X;);
kernel!(column_4:
    b 0 X; b 1 Y;
    a 0 4; 0 += 4 X;
    a 1 5; 1 += 5 X;
    a 2 4; 2 += 4 X; 0 += 5 Y; 1 += 4 Y;
    a 3 5; 3 += 5 X; 2 += 5 Y;
    b 2 X; 0 += 4 X; 1 += 5 X;
    a 4 4; 3 += 4 Y; 2 += 4 X;
    a 5 5; 3 += 5 X;);
kernel!(column_3:
    b 0 X; b 1 Y;
    a 0 4; 0 += 4 X;
    a 1 5; 1 += 5 X;
    a 2 4; 2 += 4 X; 0 += 5 Y; 1 += 4 Y;
    a 3 5; 2 += 5 Y;
    b 2 X; 0 += 4 X; 1 += 5 X;
    a 4 4; 2 += 4 X;);
kernel!(column_2:
    b 0 X; b 1 Y;
    a 0 4; 0 += 4 X;
    a 1 5; 1 += 5 X; 0 += 5 Y;
    a 2 4; 1 += 4 Y;
    b 2 X; 0 += 4 X;
    a 3 5; 1 += 5 X;);

/// Runs a kernel over all steps. Right operands change places from one to the next.
macro_rules! run {
    ($kernel:ident, $steps:ident, $a:ident, $stride:ident, $b:ident) => {
        for pair in $steps.chunks(2) {
            $kernel::<6, 7>(|part| $a(&pair[0], part), $stride, |part| $b(&pair[0], part));
            if let [_, second] = pair {
                $kernel::<7, 6>(|part| $a(second, part), $stride, |part| $b(second, part));
            }
        }
    };
}

/// What a reduction reads, in a step of offsets 0; rows of B have no bytes between them.
#[derive(Clone, Copy)]
pub enum Operands {
    /// Sums of 1 to 4 parts of A by a part of B, or of 1 or 2 by 2.
    Parts {
        /// First row of every part of A.
        a: [*const u8; SUMS],
        /// Number of them.
        parts_of_a: usize,
        /// Bytes between rows of A.
        stride: usize,
        /// First row of every part of B.
        b: [*const u8; 2],
        /// Number of them.
        parts_of_b: usize,
    },
    /// Sums of 2 to 4 neighbouring planes of outputs. Steps come in threes, of the taps along d; the second and third read the
    /// first's A one and two planes further.
    Column {
        /// First row of A of the first plane.
        a: *const u8,
        /// Bytes between rows of A.
        stride: usize,
        /// Bytes between planes.
        plane: usize,
        /// Planes of outputs.
        planes: usize,
        /// First row of B.
        b: *const u8,
    },
}

/// Number of parts of A that the widest kernel for this many parts of B takes.
pub fn parts_of_a(parts_of_b: usize) -> usize {
    SUMS / parts_of_b
}

impl Operands {
    /// sums += sum over steps of A B, the sums in tile registers, row by row of parts of A.
    ///
    /// # Safety
    /// The thread must hold [`crate::device::amx::Tiles`]; the rows they are configured for must be
    /// readable at every part of both operands in every step, and two planes beyond a column's last output.
    pub unsafe fn multiply(&self, steps: &[Step]) {
        // SAFETY: handed on from the caller.
        unsafe {
            match *self {
                Operands::Parts { a, parts_of_a, stride, b, parts_of_b } => {
                    let a = |step: &Step, part: usize| a[part].wrapping_add(step.a);
                    let b = |step: &Step, part: usize| b[part].wrapping_add(step.b);
                    match (parts_of_a, parts_of_b) {
                        (2, 2) => run!(multiply_2x2, steps, a, stride, b),
                        (1, 2) => run!(multiply_1x2, steps, a, stride, b),
                        (4, 1) => run!(multiply_4x1, steps, a, stride, b),
                        (3, 1) => run!(multiply_3x1, steps, a, stride, b),
                        (2, 1) => run!(multiply_2x1, steps, a, stride, b),
                        (1, 1) => run!(multiply_1x1, steps, a, stride, b),
                        (m, n) => unreachable!("{m} parts of A by {n} of B"),
                    }
                }
                Operands::Column { a, stride, plane, planes, b } => {
                    let steps: &[[Step; TAPS]] = steps.as_chunks().0;
                    let a = |taps: &[Step; TAPS], part: usize| a.wrapping_add(taps[0].a + part * plane);
                    let b = |taps: &[Step; TAPS], part: usize| b.wrapping_add(taps[part].b);
                    match planes {
                        4 => run!(column_4, steps, a, stride, b),
                        3 => run!(column_3, steps, a, stride, b),
                        2 => run!(column_2, steps, a, stride, b),
                        _ => unreachable!("a column of {planes} planes"),
                    }
                }
            }
        }
    }
}

/// `$instruction` of as many sums as there are places.
macro_rules! each_sum {
    ($instruction:ident, $places:ident, $stride:ident) => {{
        each_sum!($instruction, $places, $stride, 0);
        each_sum!($instruction, $places, $stride, 1);
        each_sum!($instruction, $places, $stride, 2);
        each_sum!($instruction, $places, $stride, 3);
    }};
    ($instruction:ident, $places:ident, $stride:ident, $sum:literal) => {
        if let Some(place) = $places.get($sum) {
            $instruction::<$sum>(place.cast(), $stride);
        }
    };
}

/// All sums = 0.
///
/// # Safety
/// The thread must hold [`crate::device::amx::Tiles`].
pub unsafe fn clear_sums() {
    // SAFETY: handed on from the caller.
    unsafe {
        zero::<0>();
        zero::<1>();
        zero::<2>();
        zero::<3>();
    }
}

/// The first sums = 16 x 16 floats each, rows every `stride` bytes from one of `places`.
///
/// # Safety
/// The thread must hold [`crate::device::amx::Tiles`]; the floats must be readable.
pub unsafe fn load_sums(places: &[*mut f32], stride: usize) {
    // SAFETY: handed on from the caller.
    unsafe { each_sum!(load, places, stride) }
}

/// Writes the first sums to where [`load_sums`] reads them.
///
/// # Safety
/// The thread must hold [`crate::device::amx::Tiles`]; the floats must be writable.
pub unsafe fn store_sums(places: &[*mut f32], stride: usize) {
    // SAFETY: handed on from the caller.
    unsafe { each_sum!(store, places, stride) }
}
