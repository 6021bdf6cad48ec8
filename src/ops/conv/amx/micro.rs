//! The register tiles: up to 2 x 2 or 4 x 1 accumulators of 16 x 16 floats stay in tile registers over a whole reduction.
//!
//! A product takes 16 cycles and a load of 16 rows that lie in L1 takes 8. 2 x 2 needs four loads for four products, 4 x 1
//! five: both leave the multiplier busy. 1 x 1 is bound by the latency of a product, 52 cycles, three times as slow.
//!
//! That is so of lines in L1. A halo tile and the weights lie in L2, and rows of 16 channels begin in the middle of lines:
//! loads take longer, and were what a forward pass waited for. A column is 4 x 1 of neighbouring planes of outputs, of which
//! each reads what the ones before read, too: with three taps along d, six parts of A and three of B are loaded for twelve
//! products. Three planes load eight parts for nine, two seven for six; fewer than three in all are left to 2 x 2 and 4 x 1.
//! One register takes all of A: the CPU renames it, so that a load need not wait for the products of the one before.

use crate::device::amx::{ROW_BYTES, ROWS, load, multiply, store, zero};
use crate::ops::conv::plan::LANES;

/// Planes of outputs of a column at most.
pub const COLUMN_PLANES: usize = 4;

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

/// A matrix operand's parts.
#[derive(Clone, Copy)]
pub struct Operand<const N: usize> {
    /// First row of each part, in step (0, 0).
    pub starts: [*const u8; N],
    /// Bytes between rows.
    pub stride: usize,
}

/// What a column reads.
pub struct Column {
    /// First row of A of the first plane, in a step of offset 0.
    pub start: *const u8,
    /// Bytes between rows.
    pub stride: usize,
    /// Bytes between planes.
    pub plane: usize,
}

/// Sums, row by row of the left operand's parts.
#[derive(Clone, Copy)]
pub struct Sums<const MN: usize> {
    /// First row of each.
    pub starts: [*mut f32; MN],
    /// Bytes between rows.
    pub stride: usize,
    /// Whether they are added to; they are overwritten if not.
    pub add: bool,
}

/// `$name`: M parts of A by N of B. Each part has a tile register, `part tile`; two parts of A may share one.
macro_rules! kernel {
    ($name:ident, $m:literal, $n:literal, $mn:literal, b [$($b:literal $bt:literal),+],
     a [$($a:literal $at:literal: $($sum:literal += $with:literal),+);+]) => {
        /// sums (+)= sum over steps of A B.
        ///
        /// # Safety
        /// The thread must hold [`crate::device::amx::Tiles`]; the rows they are configured for must be readable at every
        /// part of both operands in every step, and writable, and readable to add, at every sum.
        #[inline]
        unsafe fn $name(a: Operand<$m>, b: Operand<$n>, steps: &[Step], sums: Sums<$mn>) {
            // SAFETY: by the caller's promise.
            unsafe {
                if sums.add {
                    $($(load::<$sum>(sums.starts[$sum].cast(), sums.stride);)+)+
                } else {
                    $($(zero::<$sum>();)+)+
                }
                for step in steps {
                    $(load::<$bt>(b.starts[$b].add(step.b), b.stride);)+
                    $(
                        load::<$at>(a.starts[$a].add(step.a), a.stride);
                        $(multiply::<$sum, $at, $with>();)+
                    )+
                }
                $($(store::<$sum>(sums.starts[$sum].cast(), sums.stride);)+)+
            }
        }
    };
}

kernel!(multiply_2x2, 2, 2, 4, b [0 6, 1 7], a [0 4: 0 += 6, 1 += 7; 1 5: 2 += 6, 3 += 7]);
kernel!(multiply_1x2, 1, 2, 2, b [0 6, 1 7], a [0 4: 0 += 6, 1 += 7]);
kernel!(multiply_4x1, 4, 1, 4, b [0 6], a [0 4: 0 += 6; 1 5: 1 += 6; 2 4: 2 += 6; 3 5: 3 += 6]);
kernel!(multiply_2x1, 2, 1, 2, b [0 6], a [0 4: 0 += 6; 1 5: 1 += 6]);
kernel!(multiply_1x1, 1, 1, 1, b [0 6], a [0 4: 0 += 6]);

/// Number of parts of A that the widest kernel for this many parts of B takes.
pub fn parts_of_a(parts_of_b: usize) -> usize {
    if parts_of_b == 2 { 2 } else { 4 }
}

/// Runs the kernels over as many parts of A as are given, by one or two parts of B: sum of part m of A and n of B at
/// `sum(m, n)`.
///
/// # Safety
/// As a kernel's.
pub unsafe fn multiply_parts(
    (a, a_stride): (&[*const u8], usize),
    (b, b_stride): (&[*const u8], usize),
    steps: &[Step],
    sum: impl Fn(usize, usize) -> *mut f32,
    (stride, add): (usize, bool),
) {
    let mut m = 0;
    while m < a.len() {
        macro_rules! run {
            ($kernel:ident, $m:literal, [$($sum:expr),+]) => {{
                let a = Operand { starts: std::array::from_fn::<_, $m, _>(|i| a[m + i]), stride: a_stride };
                let b = Operand { starts: std::array::from_fn(|i| b[i]), stride: b_stride };
                let starts = [$($sum),+].map(|(i, n)| sum(m + i, n));
                // SAFETY: by the caller's promise.
                unsafe { $kernel(a, b, steps, Sums { starts, stride, add }) };
                $m
            }};
        }
        m += match (b.len(), a.len() - m) {
            (2, 2..) => run!(multiply_2x2, 2, [(0, 0), (0, 1), (1, 0), (1, 1)]),
            (2, _) => run!(multiply_1x2, 1, [(0, 0), (0, 1)]),
            (_, 4..) => run!(multiply_4x1, 4, [(0, 0), (1, 0), (2, 0), (3, 0)]),
            (_, 2..) => run!(multiply_2x1, 2, [(0, 0), (1, 0)]),
            _ => run!(multiply_1x1, 1, [(0, 0)]),
        };
    }
}

/// `$name`: a column of as many planes as it has sums. What a part of A is multiplied with is listed once: sum and tap.
macro_rules! column {
    ($name:ident, [$($sum:literal),+], $(($plane:literal: $($to:literal += $tap:literal),+)),+) => {
        /// sums = sum over steps of A B, for outputs of neighbouring planes.
        ///
        /// # Safety
        /// As [`multiply_column`].
        #[inline]
        unsafe fn $name(a: &Column, b: *const u8, steps: &[[Step; TAPS]], sums: *mut [[f32; LANES]; ROWS]) {
            // SAFETY: by the caller's promise.
            unsafe {
                $(zero::<$sum>();)+
                for taps in steps {
                    load::<5>(b.add(taps[0].b), ROW_BYTES);
                    load::<6>(b.add(taps[1].b), ROW_BYTES);
                    load::<7>(b.add(taps[2].b), ROW_BYTES);
                    $(
                        load::<4>(a.start.add(taps[0].a + $plane * a.plane), a.stride);
                        $(multiply::<$to, 4, { 5 + $tap }>();)+
                    )+
                }
                $(store::<$sum>(sums.add($sum).cast(), ROW_BYTES);)+
            }
        }
    };
}

column!(column_4, [0, 1, 2, 3], (0: 0 += 0), (1: 1 += 0, 0 += 1), (2: 2 += 0, 1 += 1, 0 += 2),
    (3: 3 += 0, 2 += 1, 1 += 2), (4: 3 += 1, 2 += 2), (5: 3 += 2));
column!(column_3, [0, 1, 2], (0: 0 += 0), (1: 1 += 0, 0 += 1), (2: 2 += 0, 1 += 1, 0 += 2), (3: 2 += 1, 1 += 2),
    (4: 2 += 2));
column!(column_2, [0, 1], (0: 0 += 0), (1: 1 += 0, 0 += 1), (2: 1 += 1, 0 += 2), (3: 1 += 2));

/// Runs the kernel of a column of `planes` planes, 2 to [`COLUMN_PLANES`]: the sums of plane i to `sums[i]`. The steps come in
/// threes, of the taps along d; the second and third read the first's A one and two planes further.
///
/// # Safety
/// The thread must hold [`crate::device::amx::Tiles`] with three right operands; the rows they are configured for must be
/// readable at every plane's A in every step, two planes beyond the last output's too, and at every B, and there must be
/// `planes` sums.
pub unsafe fn multiply_column(
    planes: usize,
    a: &Column,
    b: *const u8,
    steps: &[[Step; TAPS]],
    sums: *mut [[f32; LANES]; ROWS],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        match planes {
            4 => column_4(a, b, steps, sums),
            3 => column_3(a, b, steps, sums),
            2 => column_2(a, b, steps, sums),
            _ => unreachable!("a column of {planes} planes"),
        }
    }
}
