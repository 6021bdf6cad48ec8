//! Writing sums to a head: sixteen at a time, as an epilogue says.

use super::epilogue::LaneMap;
use super::plan::LANES;
use crate::device::lanes::{Job, Lanes};
use crate::tensor::Values;
use std::ptr::null_mut;

/// A part of a head, as one that writes lanes to it sees it.
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
                Some(slope) => (self.map, slope).of(sums),
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

    /// See [`super::epilogue::Out::put_rows`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub unsafe fn put_rows<V: Lanes>(
        &self,
        step: usize,
        rows: &[[f32; LANES]],
        len: usize,
        pause: impl Pause,
    ) {
        debug_assert!(len <= LANES);
        // SAFETY: handed on from the caller.
        unsafe {
            if len < LANES {
                for (number, rows) in rows.chunks(ROWS).enumerate() {
                    pause.pause();
                    for (i, row) in rows.iter().enumerate() {
                        self.put_few((number * ROWS + i) * step, V::load(row.as_ptr()), len);
                    }
                }
                return;
            }
            // What all rows have in common is asked once.
            let rows = (rows, step);
            match (self.plus.filter(|_| FINISHES), self.half.is_null()) {
                (None, true) => self.put_whole::<V>(rows, (), self.single, pause),
                (None, false) => self.put_whole::<V>(rows, (), self.half, pause),
                (Some(Values::Single(x)), true) => self.put_whole::<V>(rows, x.as_ptr(), self.single, pause),
                (Some(Values::Single(x)), false) => self.put_whole::<V>(rows, x.as_ptr(), self.half, pause),
                (Some(Values::Bf16(x)), true) => self.put_whole::<V>(rows, x.as_ptr(), self.single, pause),
                (Some(Values::Bf16(x)), false) => self.put_whole::<V>(rows, x.as_ptr(), self.half, pause),
            }
        }
    }

    /// [`Self::put`] of every row, with the target's summand and place.
    ///
    /// # Safety
    /// As [`Self::put`]; what `pause` needs must be there.
    #[inline(always)]
    unsafe fn put_whole<V: Lanes>(
        &self,
        (rows, step): (&[[f32; LANES]], usize),
        plus: impl Plus,
        out: *mut impl Value,
        pause: impl Pause,
    ) {
        let more = if self.more.is_null() { (self.map.bias.as_ptr(), 0) } else { (self.more, step) };
        // SAFETY: handed on from the caller.
        unsafe {
            match self.slope.filter(|_| FINISHES) {
                None => V::call(Whole { rows, more, map: (), plus, out, step, pause }),
                Some(slope) => V::call(Whole { rows, more, map: (self.map, slope), plus, out, step, pause }),
            }
        }
    }

    /// [`Self::put`] of every row in pieces of `each` values, 2, 4 or 8: piece p of row i belongs `starts[p] - first + i * each`
    /// values from the target's first. The target's map is the same for every piece.
    ///
    /// # Safety
    /// As [`Self::put`]; what `pause` needs must be there.
    #[inline(always)]
    pub unsafe fn put_pieces<V: Lanes>(
        &self,
        rows: &[[f32; LANES]],
        each: usize,
        starts: (usize, &[usize]),
        pause: impl Pause,
    ) {
        debug_assert!(starts.1.len() * each <= LANES);
        // SAFETY: handed on from the caller.
        unsafe {
            match (each, self.half.is_null()) {
                (2, true) => self.put_pieces_of::<V, _, 2>(rows, starts, self.single, pause),
                (2, false) => self.put_pieces_of::<V, _, 2>(rows, starts, self.half, pause),
                (4, true) => self.put_pieces_of::<V, _, 4>(rows, starts, self.single, pause),
                (4, false) => self.put_pieces_of::<V, _, 4>(rows, starts, self.half, pause),
                (8, true) => self.put_pieces_of::<V, _, 8>(rows, starts, self.single, pause),
                (8, false) => self.put_pieces_of::<V, _, 8>(rows, starts, self.half, pause),
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
        rows: &[[f32; LANES]],
        (first, starts): (usize, &[usize]),
        out: *mut T,
        pause: impl Pause,
    ) {
        // SAFETY: handed on from the caller; arrays of sixteen.
        unsafe {
            if !self.more.is_null() || self.plus.filter(|_| FINISHES).is_some() {
                for (number, rows) in rows.chunks(ROWS).enumerate() {
                    pause.pause();
                    for (i, row) in rows.iter().enumerate() {
                        for (piece, start) in row.as_chunks::<EACH>().0.iter().zip(starts) {
                            let sums = few(piece.as_ptr(), EACH);
                            let at = start - first + (number * ROWS + i) * EACH;
                            self.put_few(at, V::load(sums.as_ptr()), EACH);
                        }
                    }
                }
                return;
            }
            for (number, rows) in rows.chunks(LANES).enumerate() {
                // Written whole and read in pieces, which need not wait for the cache as the other way round.
                let mut values = [[T::default(); LANES]; LANES];
                let place = values.as_mut_ptr().cast::<T>();
                self.put_whole::<V>((rows, LANES), (), place, pause);
                for (piece, start) in starts.iter().enumerate() {
                    let out = out.add(start - first + number * LANES * EACH).cast::<[T; EACH]>();
                    for (i, values) in values[..rows.len()].iter().enumerate() {
                        out.add(i).write_unaligned(values.as_chunks::<EACH>().0[piece]);
                    }
                }
            }
        }
    }
}

/// Rows from one pause to the next.
const ROWS: usize = 4;

/// What has to be done now and then while rows are written.
pub trait Pause: Copy {
    /// Does it.
    ///
    /// # Safety
    /// What it needs must be there; see the type.
    unsafe fn pause(self);
}

/// Nothing has.
impl Pause for () {
    #[inline(always)]
    unsafe fn pause(self) {}
}

/// Whole rows of sums and what becomes of them. Running it is safe where sixteen values of every row may be read through
/// `more` and `plus` and written through `out`, which nobody else uses, and where `pause` may run.
struct Whole<'a, M, P, T, S> {
    rows: &'a [[f32; LANES]],
    /// What is added to the first row before it is mapped, and floats from there to what is added to the next.
    more: (*const f32, usize),
    map: M,
    plus: P,
    /// Where the first row goes.
    out: *mut T,
    /// Values from row to row there and in `plus`.
    step: usize,
    pause: S,
}

impl<M: Mapped, P: Plus, T: Value, S: Pause> Job for Whole<'_, M, P, T, S> {
    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Whole { rows, more: (mut more, more_step), map, mut plus, mut out, step, pause } = self;
        for rows in rows.chunks(ROWS) {
            // SAFETY: handed on from the caller.
            unsafe { pause.pause() };
            for row in rows {
                // SAFETY: handed on from the caller.
                unsafe {
                    let y = map.of(V::load(row.as_ptr()).add(V::load(more)));
                    T::store(out, plus.add(y));
                }
                (more, plus, out) = (more.wrapping_add(more_step), plus.next(step), out.wrapping_add(step));
            }
        }
    }
}

/// An epilogue's map, or none.
trait Mapped: Copy {
    /// Of a sum.
    ///
    /// # Safety
    /// V's vector unit exists.
    unsafe fn of<V: Lanes>(self, sum: V) -> V;
}

/// None.
impl Mapped for () {
    #[inline(always)]
    unsafe fn of<V: Lanes>(self, sum: V) -> V {
        sum
    }
}

/// With this slope.
impl Mapped for (&LaneMap, f32) {
    #[inline(always)]
    unsafe fn of<V: Lanes>(self, sum: V) -> V {
        let (LaneMap { scale, shift, .. }, slope) = self;
        // SAFETY: sixteen scales and shifts, and a slope.
        unsafe {
            sum.mul(V::load(scale.as_ptr())).add(V::load(shift.as_ptr())).prelu(V::splat(&raw const slope))
        }
    }
}

/// What an epilogue adds last.
trait Plus: Copy {
    /// `y` plus the sixteen values here.
    ///
    /// # Safety
    /// They are readable; V's vector unit exists.
    unsafe fn add<V: Lanes>(self, y: V) -> V;

    /// What lies `step` values further.
    fn next(self, step: usize) -> Self;
}

/// Nothing.
impl Plus for () {
    #[inline(always)]
    unsafe fn add<V: Lanes>(self, y: V) -> V {
        y
    }

    #[inline(always)]
    fn next(self, _: usize) -> Self {}
}

impl<T: Value> Plus for *const T {
    #[inline(always)]
    unsafe fn add<V: Lanes>(self, y: V) -> V {
        // SAFETY: handed on from the caller.
        unsafe { y.add(T::load(self)) }
    }

    #[inline(always)]
    fn next(self, step: usize) -> Self {
        self.wrapping_add(step)
    }
}

/// What activations are stored as.
trait Value: Copy + Default {
    /// Sixteen from `p` on.
    ///
    /// # Safety
    /// They are readable; V's vector unit exists.
    unsafe fn load<V: Lanes>(p: *const Self) -> V;

    /// Writes sixteen from `p` on.
    ///
    /// # Safety
    /// They are writable; V's vector unit exists.
    unsafe fn store<V: Lanes>(p: *mut Self, y: V);
}

impl Value for f32 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const f32) -> V {
        // SAFETY: handed on from the caller.
        unsafe { V::load(p) }
    }

    #[inline(always)]
    unsafe fn store<V: Lanes>(p: *mut f32, y: V) {
        // SAFETY: handed on from the caller.
        unsafe { y.store(p) }
    }
}

/// bfloat16.
impl Value for u16 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const u16) -> V {
        // SAFETY: handed on from the caller.
        unsafe { V::load_bf16(p) }
    }

    #[inline(always)]
    unsafe fn store<V: Lanes>(p: *mut u16, y: V) {
        // SAFETY: handed on from the caller.
        unsafe { y.store_bf16(p) }
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
