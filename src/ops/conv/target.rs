//! Writing sums to a head: sixteen at a time, as an epilogue says.

use super::epilogue::LaneMap;
use super::plan::LANES;
use super::rows::{Mapped, Pause, Plus, Value, Whole, mapped};
use crate::device::cpu::{prefetch_to_read, prefetch_to_write};
use crate::device::lanes::Lanes;
use crate::tensor::Values;
use std::mem::MaybeUninit;
use std::ptr::null_mut;

/// A part of a head, as one that writes lanes to it sees it.
#[derive(Clone, Copy)]
pub struct Target<'a, const FINISHES: bool> {
    /// Sums of the groups before, or null.
    pub(super) more: *const f32,
    /// Where f32 values go.
    pub(super) single: *mut f32,
    /// Where bfloat16 ones go instead, or null.
    pub(super) half: *mut u16,
    pub(super) map: &'a LaneMap,
    /// If there is a map.
    pub(super) slope: Option<f32>,
    pub(super) plus: Option<Values<'a>>,
    /// Number of the part's values: so many lie at `single` or `half`, at `more` and in `plus`, where those are there.
    pub(super) len: usize,
}

impl<const FINISHES: bool> Target<'_, FINISHES> {
    /// Stores, adds or finishes sixteen sums, which belong `at` values from the target's first.
    ///
    /// # Safety
    /// Nobody else uses these values of the head, which lie in the target; V's vector unit exists.
    #[inline(always)]
    pub unsafe fn put<V: Lanes>(&self, at: usize, sums: V) {
        // SAFETY: by the caller's promise.
        unsafe {
            let more = if self.more.is_null() { self.map.bias.as_ptr() } else { self.more.add(at) };
            let sums = sums.add(V::load(more));
            let y = match self.slope.filter(|_| FINISHES) {
                None => sums,
                Some(slope) => mapped(sums, (self.map, slope).load()),
            };
            let y = match self.plus.filter(|_| FINISHES) {
                None => y,
                Some(Values::Single(x)) => Plus::add(x.as_ptr().add(at), y),
                Some(Values::Bf16(x)) => Plus::add(x.as_ptr().add(at), y),
            };
            if self.half.is_null() { y.store(self.single.add(at)) } else { y.store_bf16(self.half.add(at)) }
        }
    }

    /// [`Self::put`] of the first `len` of sixteen sums.
    ///
    /// # Safety
    /// As [`Self::put`].
    #[inline(always)]
    pub unsafe fn put_few<V: Lanes>(&self, at: usize, sums: V, len: usize) {
        // SAFETY: by the caller's promise; what is computed with lies in arrays of sixteen.
        unsafe {
            let sums_before;
            let more = if self.more.is_null() {
                self.map.bias.as_ptr()
            } else {
                sums_before = few(self.more.add(at), len);
                sums_before.as_ptr()
            };
            // Where sixteen are there to be read, no copy is needed.
            let (single_plus, half_plus);
            let plus = match self.plus {
                Some(Values::Single(x)) if x.len() < at + LANES => {
                    single_plus = few(x[at..].as_ptr(), len);
                    Some(Values::Single(&single_plus))
                }
                Some(Values::Bf16(x)) if x.len() < at + LANES => {
                    half_plus = few(x[at..].as_ptr(), len);
                    Some(Values::Bf16(&half_plus))
                }
                Some(Values::Single(x)) => Some(Values::Single(&x[at..])),
                Some(Values::Bf16(x)) => Some(Values::Bf16(&x[at..])),
                None => None,
            };
            let (mut single, mut half) = ([0.0; LANES], [0; LANES]);
            let whole = Target::<FINISHES> {
                more,
                single: single.as_mut_ptr(),
                half: if self.half.is_null() { null_mut() } else { half.as_mut_ptr() },
                plus,
                len: LANES,
                ..*self
            };
            whole.put(0, sums);
            if self.half.is_null() {
                copy_few(&single, self.single.add(at), len);
            } else {
                copy_few(&half, self.half.add(at), len);
            }
        }
    }

    /// Stores, adds or finishes the first `len` values of every row; row i belongs `i * step` values after value `start`. Every
    /// few rows it pauses.
    ///
    /// # Panics
    /// If the target ends before.
    ///
    /// # Safety
    /// Nobody else uses these values of the head; V's vector unit exists, and what `pause` needs.
    #[inline(always)]
    pub unsafe fn put_rows<V: Lanes>(
        &self,
        (start, step): (usize, usize),
        rows: &[[f32; LANES]],
        len: usize,
        pause: impl Pause,
    ) {
        debug_assert!(len <= LANES);
        let Some(last) = rows.len().checked_sub(1) else { return };
        self.check(start, last * step + len);
        // SAFETY: handed on from the caller; inside the target, as was checked.
        unsafe {
            if len < LANES {
                for (number, rows) in rows.chunks(FEW_ROWS).enumerate() {
                    pause.pause();
                    for (i, row) in rows.iter().enumerate() {
                        self.put_few(start + (number * FEW_ROWS + i) * step, V::load(row.as_ptr()), len);
                    }
                }
                return;
            }
            // What all rows have in common is asked once.
            let single = self.single.wrapping_add(start);
            let half = self.half.wrapping_add(start);
            let rows = (rows, start, step);
            match (self.plus.filter(|_| FINISHES), self.half.is_null()) {
                (None, true) => self.put_whole::<V>(rows, (), single, pause),
                (None, false) => self.put_whole::<V>(rows, (), half, pause),
                (Some(Values::Single(x)), true) => {
                    self.put_whole::<V>(rows, x.as_ptr().add(start), single, pause);
                }
                (Some(Values::Single(x)), false) => {
                    self.put_whole::<V>(rows, x.as_ptr().add(start), half, pause);
                }
                (Some(Values::Bf16(x)), true) => {
                    self.put_whole::<V>(rows, x.as_ptr().add(start), single, pause);
                }
                (Some(Values::Bf16(x)), false) => {
                    self.put_whole::<V>(rows, x.as_ptr().add(start), half, pause);
                }
            }
        }
    }

    /// Asks the cache for what [`Self::put_rows`] will write, and read, of the head: there is time until it does.
    ///
    /// # Panics
    /// If the target ends before.
    #[inline(always)]
    pub fn prefetch(&self, (start, step): (usize, usize), rows: usize, len: usize) {
        let Some(last) = rows.checked_sub(1) else { return };
        let span = last * step + len;
        self.check(start, span);
        match self.half.is_null() {
            true => prefetch_lines(self.single.wrapping_add(start), span, step, prefetch_to_write),
            false => prefetch_lines(self.half.wrapping_add(start), span, step, prefetch_to_write),
        }
        match self.plus {
            Some(Values::Single(x)) => prefetch_lines(x[start..].as_ptr(), span, step, prefetch_to_read),
            Some(Values::Bf16(x)) => prefetch_lines(x[start..].as_ptr(), span, step, prefetch_to_read),
            None => {}
        }
    }

    /// Panics if `len` values from `start` on do not lie in the target.
    #[inline(always)]
    fn check(&self, start: usize, len: usize) {
        assert!(start <= self.len && len <= self.len - start, "{len} values at {start} of {}", self.len);
    }

    /// [`Self::put`] of every row, the first of which belongs at value `start`, with the summand and the place of that value.
    ///
    /// # Safety
    /// As [`Self::put`]; what `pause` needs must be there.
    #[inline(always)]
    unsafe fn put_whole<V: Lanes>(
        &self,
        (rows, start, step): (&[[f32; LANES]], usize, usize),
        plus: impl Plus,
        out: *mut impl Value,
        pause: impl Pause,
    ) {
        let more = match self.more.is_null() {
            true => (self.map.bias.as_ptr(), 0),
            false => (self.more.wrapping_add(start), step),
        };
        // SAFETY: handed on from the caller.
        unsafe {
            match self.slope.filter(|_| FINISHES) {
                None => V::call(Whole { rows, more, map: (), plus, out, step, pause }),
                Some(slope) => V::call(Whole { rows, more, map: (self.map, slope), plus, out, step, pause }),
            }
        }
    }

    /// Stores, adds or finishes every row in pieces of `each` values, 2, 4 or 8: piece p of row i belongs `i * each` values
    /// after value `starts[p]`. The target's map is the same for every piece. Every few rows it pauses.
    ///
    /// # Panics
    /// If the target ends before, or rows have fewer pieces.
    ///
    /// # Safety
    /// As [`Self::put_rows`].
    #[inline(always)]
    pub unsafe fn put_pieces<V: Lanes>(
        &self,
        starts: &[usize],
        rows: &[[f32; LANES]],
        each: usize,
        pause: impl Pause,
    ) {
        assert!(starts.len() * each <= LANES, "{} pieces of {each} values", starts.len());
        starts.iter().for_each(|&start| self.check(start, rows.len() * each));
        // SAFETY: handed on from the caller; inside the target, as was checked.
        unsafe {
            match (each, self.half.is_null()) {
                (2, true) => self.put_pieces_of::<V, _, 2>(starts, rows, self.single, pause),
                (2, false) => self.put_pieces_of::<V, _, 2>(starts, rows, self.half, pause),
                (4, true) => self.put_pieces_of::<V, _, 4>(starts, rows, self.single, pause),
                (4, false) => self.put_pieces_of::<V, _, 4>(starts, rows, self.half, pause),
                (8, true) => self.put_pieces_of::<V, _, 8>(starts, rows, self.single, pause),
                (8, false) => self.put_pieces_of::<V, _, 8>(starts, rows, self.half, pause),
                _ => unreachable!("pieces of {each} values"),
            }
        }
    }

    /// The same, of known length: copies without a call.
    ///
    /// # Safety
    /// As [`Self::put_pieces`].
    #[inline(always)]
    unsafe fn put_pieces_of<V: Lanes, T: Value, const EACH: usize>(
        &self,
        starts: &[usize],
        rows: &[[f32; LANES]],
        out: *mut T,
        pause: impl Pause,
    ) {
        // SAFETY: handed on from the caller; arrays of sixteen. Pieces are read of rows that were just written whole.
        unsafe {
            if !self.more.is_null() || self.plus.filter(|_| FINISHES).is_some() {
                for (i, row) in rows.iter().enumerate() {
                    pause.pause();
                    for (piece, start) in row.as_chunks::<EACH>().0.iter().zip(starts) {
                        let sums = few(piece.as_ptr(), EACH);
                        self.put_few(start + i * EACH, V::load(sums.as_ptr()), EACH);
                    }
                }
                return;
            }
            for (number, rows) in rows.chunks(LANES).enumerate() {
                // Written whole and read in pieces, which need not wait for the cache as the other way round.
                let mut values = MaybeUninit::<[[T; LANES]; LANES]>::uninit();
                self.put_whole::<V>((rows, 0, LANES), (), values.as_mut_ptr().cast::<T>(), pause);
                let pieces = values.as_ptr().cast::<[T; EACH]>();
                for (piece, start) in starts.iter().enumerate() {
                    let out = out.add(start + number * LANES * EACH).cast::<[T; EACH]>();
                    for i in 0..rows.len() {
                        out.add(i).write_unaligned(pieces.add(i * (LANES / EACH) + piece).read());
                    }
                }
            }
        }
    }
}

/// Rows of fewer values than a vector has from one pause to the next: each takes as long as some whole ones.
const FEW_ROWS: usize = 4;

/// Asks for the lines of `span` values from `p` on, of which some of every `step` are used.
#[inline(always)]
fn prefetch_lines<T>(p: *const T, span: usize, step: usize, ask: fn(*const T)) {
    // Not an iterator that steps: it divides to know how often.
    let step = step.max(64 / size_of::<T>());
    let mut at = 0;
    while at < span {
        ask(p.wrapping_add(at));
        at += step;
    }
}

/// The `len` values from `p` on, and zeros.
///
/// # Safety
/// They must be readable; there are at most sixteen.
#[inline(always)]
unsafe fn few<T: Copy + Default>(p: *const T, len: usize) -> [T; LANES] {
    debug_assert!(len <= LANES);
    let mut values = [T::default(); LANES];
    // SAFETY: by the caller's promise. Eight, the most common number, without a call.
    unsafe {
        match len {
            8 => p.copy_to_nonoverlapping(values.as_mut_ptr(), 8),
            _ => p.copy_to_nonoverlapping(values.as_mut_ptr(), len),
        }
    }
    values
}

/// Writes the first `len` values to `p`.
///
/// # Safety
/// So many must be writable; they are at most sixteen.
#[inline(always)]
unsafe fn copy_few<T: Copy>(values: &[T; LANES], p: *mut T, len: usize) {
    debug_assert!(len <= LANES);
    // SAFETY: by the caller's promise.
    unsafe {
        match len {
            8 => p.copy_from_nonoverlapping(values.as_ptr(), 8),
            _ => p.copy_from_nonoverlapping(values.as_ptr(), len),
        }
    }
}
