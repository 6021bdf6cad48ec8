//! The register tiles: up to 2 x 2 or 4 x 1 accumulators of 16 x 16 floats stay in tile registers over a whole reduction.
//!
//! A product takes 16 cycles and a load of 16 rows that lie in L1 takes 8. 2 x 2 needs four loads for four products, 4 x 1
//! five: both leave the multiplier busy. 1 x 1 is bound by the latency of a product, 52 cycles, three times as slow.
//!
//! That is so of lines in L1. A halo tile and the weights lie in L2, and rows of 16 channels begin, at a stride of 1, in
//! the middle of lines: loads take longer, and were what a forward pass waited for. A column is 4 x 1 of neighbouring
//! planes of outputs, of which each reads what the ones before read, too: with three taps along d, six parts of A and three
//! of B are loaded for twelve products. Three planes load eight parts for nine, two seven for six; fewer than three in all
//! are left to 2 x 2 and 4 x 1.
//!
//! Kernels are listings, one instruction after the other, in an order with two aims. Between the last product that reads a
//! register and the first that reads what the register is loaded with next there is at least another one. And products
//! of a sum are apart by the number of sums where that can be: by four they wait for nothing, by three for 4 of 52 cycles,
//! by two for 20. In a column of four planes two of twelve are apart by three and one by two.
//!
//! Tile registers outlive a call: a reduction may be cut into calls with other work between them, which vector units do
//! while products are under way. A multiplier that has had no product for 840 to 1,200 cycles is asleep, and the next product
//! takes some 700 longer (measured on a Xeon of model 207): vector units that write sums [`keep_awake`] the multiplier. Its
//! product reads a register that the next call loads anew, which is where the first aim is missed.

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

/// Instructions of a listing: `a N T`, `b N T`: load part N of an operand into tile T; `S += T U`: add the product of tiles
/// T and U to sum S.
macro_rules! instructions {
    ($a:ident $stride:ident $b:ident:) => {};
    ($a:ident $stride:ident $b:ident: a $part:literal $tile:ident; $($rest:tt)*) => {
        load::<$tile>($a($part), $stride);
        instructions!($a $stride $b: $($rest)*);
    };
    ($a:ident $stride:ident $b:ident: b $part:literal $tile:ident; $($rest:tt)*) => {
        load::<$tile>($b($part), ROW_BYTES);
        instructions!($a $stride $b: $($rest)*);
    };
    ($a:ident $stride:ident $b:ident: $sum:literal += $left:ident $right:ident; $($rest:tt)*) => {
        multiply::<$sum, $left, $right>();
        instructions!($a $stride $b: $($rest)*);
    };
}

/// `$name`: sums += A B over steps, by the listing of one. P and Q are left operands' tiles, 4 and 5, X and Y right ones', 6
/// and 7; every other step has them as `next` says.
macro_rules! kernel {
    ($name:ident, next $p:literal $q:literal $x:literal $y:literal: $($listing:tt)+) => {
        /// # Safety
        /// See [`Reads::multiply`].
        #[inline(always)]
        unsafe fn $name<S>(
            steps: &[S],
            a: impl Fn(&S, usize) -> *const u8,
            stride: usize,
            b: impl Fn(&S, usize) -> *const u8,
        ) {
            /// # Safety
            /// As the kernel's.
            #[inline(always)]
            unsafe fn step<const P: u8, const Q: u8, const X: u8, const Y: u8>(
                a: impl Fn(usize) -> *const u8,
                stride: usize,
                b: impl Fn(usize) -> *const u8,
            ) {
                // SAFETY: handed on from the caller.
                unsafe { instructions!(a stride b: $($listing)+); }
            }
            for pair in steps.chunks(2) {
                // SAFETY: handed on from the caller.
                unsafe {
                    step::<4, 5, 6, 7>(|part| a(&pair[0], part), stride, |part| b(&pair[0], part));
                    if let [_, second] = pair {
                        step::<$p, $q, $x, $y>(|part| a(second, part), stride, |part| b(second, part));
                    }
                }
            }
        }

        #[cfg(test)]
        mod $name {
            pub const KERNEL: (&str, [u8; 4]) = (stringify!($($listing)+), [$p, $q, $x, $y]);
        }
    };
}

kernel!(multiply_2x2, next 4 5 6 7: b 0 X; b 1 Y; a 0 P; 0 += P X; 1 += P Y; a 1 Q; 2 += Q X; 3 += Q Y;);
kernel!(multiply_1x2, next 5 4 6 7: b 0 X; b 1 Y; a 0 P; 0 += P X; 1 += P Y;);
kernel!(multiply_4x1, next 4 5 7 6: b 0 X; a 0 P; 0 += P X; a 1 Q; 1 += Q X; a 2 P; 2 += P X; a 3 Q; 3 += Q X;);
kernel!(multiply_3x1, next 5 4 7 6: b 0 X; a 0 P; 0 += P X; a 1 Q; 1 += Q X; a 2 P; 2 += P X;);
kernel!(multiply_2x1, next 4 5 7 6: b 0 X; a 0 P; 0 += P X; a 1 Q; 1 += Q X;);
kernel!(multiply_1x1, next 5 4 7 6: b 0 X; a 0 P; 0 += P X;);
kernel!(column_4, next 4 5 7 6:
    b 0 X; b 1 Y;
    a 0 P; 0 += P X;
    a 1 Q; 1 += Q X;
    a 2 P; 2 += P X; 0 += Q Y; 1 += P Y;
    a 3 Q; 3 += Q X; 2 += Q Y;
    b 2 X; 0 += P X; 1 += Q X;
    a 4 P; 3 += P Y; 2 += P X;
    a 5 Q; 3 += Q X;);
kernel!(column_3, next 5 4 7 6:
    b 0 X; b 1 Y;
    a 0 P; 0 += P X;
    a 1 Q; 1 += Q X;
    a 2 P; 2 += P X; 0 += Q Y; 1 += P Y;
    a 3 Q; 2 += Q Y;
    b 2 X; 0 += P X; 1 += Q X;
    a 4 P; 2 += P X;);
kernel!(column_2, next 4 5 7 6:
    b 0 X; b 1 Y;
    a 0 P; 0 += P X;
    a 1 Q; 1 += Q X; 0 += Q Y;
    a 2 P; 1 += P Y;
    b 2 X; 0 += P X;
    a 3 Q; 1 += Q X;);

/// What a reduction reads, in a step of offsets 0; rows of B have no bytes between them.
#[derive(Clone, Copy)]
pub enum Reads {
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

/// Parts of A that the widest kernel for this many parts of B takes.
pub fn most_parts_of_a(parts_of_b: usize) -> usize {
    SUMS / parts_of_b
}

impl Reads {
    /// sums += sum over steps of A B, the sums in tile registers, row by row of parts of A.
    ///
    /// # Safety
    /// The thread must hold [`crate::device::amx::Tiles`]; the rows they are configured for must be
    /// readable at every part of both operands in every step, and two planes beyond a column's last output.
    pub unsafe fn multiply(&self, steps: &[Step]) {
        // SAFETY: handed on from the caller.
        unsafe {
            match *self {
                Reads::Parts { a, parts_of_a, stride, b, parts_of_b } => {
                    let a = |step: &Step, part: usize| a[part].wrapping_add(step.a);
                    let b = |step: &Step, part: usize| b[part].wrapping_add(step.b);
                    match (parts_of_a, parts_of_b) {
                        (2, 2) => multiply_2x2(steps, a, stride, b),
                        (1, 2) => multiply_1x2(steps, a, stride, b),
                        (4, 1) => multiply_4x1(steps, a, stride, b),
                        (3, 1) => multiply_3x1(steps, a, stride, b),
                        (2, 1) => multiply_2x1(steps, a, stride, b),
                        (1, 1) => multiply_1x1(steps, a, stride, b),
                        (m, n) => unreachable!("{m} parts of A by {n} of B"),
                    }
                }
                Reads::Column { a, stride, plane, planes, b } => {
                    let (steps, rest): (&[[Step; TAPS]], _) = steps.as_chunks();
                    debug_assert!(rest.is_empty(), "steps of a column come in threes");
                    let a = |taps: &[Step; TAPS], part: usize| a.wrapping_add(taps[0].a + part * plane);
                    let b = |taps: &[Step; TAPS], part: usize| b.wrapping_add(taps[part].b);
                    match planes {
                        4 => column_4(steps, a, stride, b),
                        3 => column_3(steps, a, stride, b),
                        2 => column_2(steps, a, stride, b),
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

/// A product of which nothing is kept: of the first sum and a left operand, into the other left operand, whose rows are as long.
/// The kernels load every operand that they read.
///
/// # Safety
/// The thread must hold [`crate::device::amx::Tiles`].
pub unsafe fn keep_awake() {
    // SAFETY: handed on from the caller.
    unsafe { multiply::<5, 0, 4>() }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Products (sum, part of A, part of B) of three steps of a kernel. Asserts the first aim of its order.
    fn products((listing, next): (&str, [u8; 4])) -> Vec<(usize, usize, usize)> {
        let mut products = Vec::new();
        // Of every tile: the part that it holds, and whether a product has read it; the last product that read any.
        let mut held: [Option<(usize, bool)>; 8] = [None; 8];
        let mut last_read: [Option<usize>; 8] = [None; 8];
        for step in 0..3 {
            let tiles = if step % 2 == 0 { [4, 5, 6, 7] } else { next };
            let tile = |name: &str| usize::from(tiles["PQXY".find(name).expect("a tile")]);
            for line in listing.split(';').map(str::trim).filter(|line| !line.is_empty()) {
                let words: Vec<&str> = line.split_whitespace().collect();
                if let [sum, "+=", left, right] = words[..] {
                    let number = products.len();
                    let parts = [tile(left), tile(right)].map(|tile| {
                        let (part, was_read) = held[tile].expect("loaded before it is read");
                        let before = last_read[tile].filter(|_| !was_read);
                        assert!(before.is_none_or(|before| number - before > 1), "{line}: {listing}");
                        (held[tile], last_read[tile]) = (Some((part, true)), Some(number));
                        part
                    });
                    products.push((sum.parse().expect("a sum"), parts[0], parts[1]));
                } else {
                    held[tile(words[2])] = Some((words[1].parse().expect("a part"), false));
                }
            }
            // Nothing is left of one step for the next.
            held = [None; 8];
        }
        products
    }

    #[test]
    fn no_product_reads_a_register_just_read_and_loaded_anew() {
        let parts = [
            (multiply_2x2::KERNEL, 2, 2),
            (multiply_1x2::KERNEL, 1, 2),
            (multiply_4x1::KERNEL, 4, 1),
            (multiply_3x1::KERNEL, 3, 1),
            (multiply_2x1::KERNEL, 2, 1),
            (multiply_1x1::KERNEL, 1, 1),
        ];
        for (kernel, m, n) in parts {
            let of_step: Vec<_> = (0..m * n).map(|sum| (sum, sum / n, sum % n)).collect();
            assert_eq!(products(kernel), of_step.repeat(3), "{m} x {n}");
        }
    }

    #[test]
    fn columns_add_taps_in_order() {
        for (kernel, planes) in [(column_4::KERNEL, 4), (column_3::KERNEL, 3), (column_2::KERNEL, 2)] {
            let products = products(kernel);
            for sum in 0..planes {
                let of_sum: Vec<_> = products.iter().filter(|p| p.0 == sum).map(|p| (p.1, p.2)).collect();
                assert_eq!(
                    of_sum,
                    [(sum, 0), (sum + 1, 1), (sum + 2, 2)].repeat(3),
                    "plane {sum} of {planes}"
                );
            }
            assert_eq!(products.len(), 3 * TAPS * planes);
        }
    }
}
