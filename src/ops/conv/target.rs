//! Writing sums to a head: sixteen at a time, as an epilogue says.

use super::epilogue::LaneMap;
use super::plan::LANES;
use super::rows::{Apart, Before, Dense, Mapped, Pause, Pieces, Plus, Value, Whole, mapped};
use crate::device::cpu::{LINE, prefetch_to_read, prefetch_to_write};
use crate::device::lanes::{Job, Lanes};
use crate::tensor::Values;
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
                Some(Values::Single(x)) => Plus::add(x.as_ptr(), y, at),
                Some(Values::Bf16(x)) => Plus::add(x.as_ptr(), y, at),
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
                return V::call(Few { target: self, start, starts: &[0], rows, len, step, pause });
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
    #[inline(always)]
    pub fn prefetch(&self, (start, step): (usize, usize), rows: usize, len: usize) {
        let Some(last) = rows.checked_sub(1) else { return };
        let span = last * step + len;
        match self.half.is_null() {
            true => prefetch_lines(self.single.wrapping_add(start), span, step, prefetch_to_write),
            false => prefetch_lines(self.half.wrapping_add(start), span, step, prefetch_to_write),
        }
        match self.plus {
            Some(Values::Single(x)) => {
                prefetch_lines(x.as_ptr().wrapping_add(start), span, step, prefetch_to_read);
            }
            Some(Values::Bf16(x)) => {
                prefetch_lines(x.as_ptr().wrapping_add(start), span, step, prefetch_to_read);
            }
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
        let before = self.more.wrapping_add(start);
        let mapped = self.slope.filter(|_| FINISHES).map(|slope| (self.map, slope));
        // SAFETY: handed on from the caller.
        unsafe {
            match (self.more.is_null(), step == LANES) {
                (true, true) => put_all::<V>(rows, self.map, mapped, plus, out, Dense, pause),
                (true, false) => put_all::<V>(rows, self.map, mapped, plus, out, step, pause),
                (false, _) => put_all::<V>(rows, before, mapped, plus, out, step, pause),
            }
        }
    }

    /// Stores, adds or finishes every row in pieces of `each` values, 2, 4 or 8: piece p of row i belongs `i * each` values
    /// after value `start + starts[p]`. The target's map is the same for every piece. Every few rows it pauses.
    ///
    /// # Panics
    /// If the target ends before, or rows have fewer pieces.
    ///
    /// # Safety
    /// As [`Self::put_rows`]; starts ascend.
    #[inline(always)]
    pub unsafe fn put_pieces<V: Lanes>(
        &self,
        (start, starts): (usize, &[usize]),
        rows: &[[f32; LANES]],
        each: usize,
        pause: impl Pause,
    ) {
        assert!(starts.len() * each <= LANES, "{} pieces of {each} values", starts.len());
        debug_assert!(starts.is_sorted());
        let Some(last) = starts.last() else { return };
        self.check(start + last, rows.len() * each);
        let place = (start, starts);
        // SAFETY: handed on from the caller; inside the target, as was checked.
        unsafe {
            if !self.more.is_null() || self.plus.filter(|_| FINISHES).is_some() {
                return V::call(Few { target: self, start, starts, rows, len: each, step: each, pause });
            }
            match (each, self.half.is_null()) {
                (2, true) => self.put_pieces_of::<V, _, 2, 8>(place, rows, self.single, pause),
                (2, false) => self.put_pieces_of::<V, _, 2, 8>(place, rows, self.half, pause),
                (4, true) => self.put_pieces_of::<V, _, 4, 4>(place, rows, self.single, pause),
                (4, false) => self.put_pieces_of::<V, _, 4, 4>(place, rows, self.half, pause),
                (8, true) => self.put_pieces_of::<V, _, 8, 2>(place, rows, self.single, pause),
                (8, false) => self.put_pieces_of::<V, _, 8, 2>(place, rows, self.half, pause),
                _ => unreachable!("pieces of {each} values"),
            }
        }
    }

    /// The same, of known length, PIECES of EACH are sixteen values, and with nothing to add but biases.
    ///
    /// # Safety
    /// As [`Self::put_pieces`].
    #[inline(always)]
    unsafe fn put_pieces_of<V: Lanes, T: Value, const EACH: usize, const PIECES: usize>(
        &self,
        (start, starts): (usize, &[usize]),
        rows: &[[f32; LANES]],
        out: *mut T,
        pause: impl Pause,
    ) {
        // SAFETY: handed on from the caller.
        unsafe {
            let (bias, out) = (self.map, out.add(start));
            match self.slope.filter(|_| FINISHES).map(|slope| (self.map, slope)) {
                None => V::call(Pieces::<_, _, _, EACH, PIECES> { rows, bias, map: (), out, starts, pause }),
                Some(map) => V::call(Pieces::<_, _, _, EACH, PIECES> { rows, bias, map, out, starts, pause }),
            }
        }
    }
}

/// Runs [`Whole`], with a map or without.
///
/// # Safety
/// As there; V's vector unit exists.
#[inline(always)]
unsafe fn put_all<V: Lanes>(
    rows: &[[f32; LANES]],
    before: impl Before,
    map: Option<(&LaneMap, f32)>,
    plus: impl Plus,
    out: *mut impl Value,
    apart: impl Apart,
    pause: impl Pause,
) {
    // SAFETY: handed on from the caller.
    unsafe {
        match map {
            None => V::call(Whole { rows, before, map: (), plus, out, apart, pause }),
            Some(map) => V::call(Whole { rows, before, map, plus, out, apart, pause }),
        }
    }
}

/// Rows of which less than a vector goes to one place: piece p of row i, `len` values, `start + starts[p] + i * step` values
/// after the target's first. Running it is safe where [`Target::put_few`] of each is, and where `pause` may run.
struct Few<'a, const FINISHES: bool, S> {
    target: &'a Target<'a, FINISHES>,
    start: usize,
    starts: &'a [usize],
    rows: &'a [[f32; LANES]],
    len: usize,
    step: usize,
    pause: S,
}

impl<const FINISHES: bool, S: Pause> Job for Few<'_, FINISHES, S> {
    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        for (i, row) in self.rows.iter().enumerate() {
            for (p, start) in self.starts.iter().enumerate() {
                // SAFETY: handed on from the caller; arrays of sixteen.
                unsafe {
                    if (i * self.starts.len() + p).is_multiple_of(FEW) {
                        self.pause.pause();
                    }
                    let piece = few(row[p * self.len..].as_ptr(), self.len);
                    self.target.put_few(
                        self.start + start + i * self.step,
                        V::load(piece.as_ptr()),
                        self.len,
                    );
                }
            }
        }
    }
}

/// Such pieces from one pause to the next: each takes as long as some whole rows.
const FEW: usize = 4;

/// Asks for the lines of `span` values from `p` on, of which some of every `step` are used.
#[inline(always)]
fn prefetch_lines<T>(p: *const T, span: usize, step: usize, ask: fn(*const u8)) {
    let (mut p, end, step) = (p.cast::<u8>(), p.wrapping_add(span).cast(), LINE.max(step * size_of::<T>()));
    // Not an iterator that steps: it divides to know how often.
    while p < end {
        ask(p);
        p = p.wrapping_add(step);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::bf16::{Pairs, narrowed, widened};
    use crate::device::lanes::Plain;
    #[cfg(target_arch = "x86_64")]
    use crate::device::lanes::x86::{Avx2, Avx512};

    /// Where values of rows go: piece p of row i, `each` values, `FIRST + starts[p] + i * step` values after the head's first.
    struct Places {
        starts: Vec<usize>,
        each: usize,
        step: usize,
        count: usize,
    }

    const FIRST: usize = 3;

    /// What is done to them.
    struct Case<'a> {
        map: LaneMap,
        slope: Option<f32>,
        more: Option<&'a [f32]>,
        plus: Option<Values<'a>>,
        half: bool,
    }

    /// Puts rows by `put`, in all ways there are, and compares with what becomes of value by value.
    fn check(places: &Places, put: impl Fn(&Target<true>, &[[f32; LANES]])) {
        let Places { starts, each, step, count } = places;
        let len = FIRST + starts[starts.len() - 1] + count * step + 7;
        let before: Vec<f32> = (0..len).map(|i| 0.37 * (i % 23) as f32 - 3.0).collect();
        let single: Vec<f32> = (0..len).map(|i| 0.29 * (i % 31) as f32 - 5.0).collect();
        let half: Vec<u16> = single.iter().map(|&x| narrowed(x)).collect();
        let row = |i: usize| std::array::from_fn(|l| 0.75 * i as f32 - 0.41 * l as f32);
        let rows: Vec<[f32; LANES]> = (0..*count).map(row).collect();
        for slope in [None, Some(0.3)] {
            for more in [None, Some(&before[..])] {
                for plus in [None, Some(Values::Single(&single)), Some(Values::Bf16(&half))] {
                    for half in [false, true] {
                        // The same for every piece.
                        let numbers = |scale: f32| std::array::from_fn(|l| scale * ((l % each) as f32 - 7.3));
                        let map =
                            LaneMap { bias: numbers(0.5), scale: numbers(-0.25), shift: numbers(0.125) };
                        let case = Case { map, slope, more, plus, half };
                        let got = case.got(len, |target| put(target, &rows));
                        assert_eq!(
                            got,
                            case.want(len, places, &rows),
                            "{count} rows, {starts:?} of {each}, {step} apart"
                        );
                    }
                }
            }
        }
    }

    impl Case<'_> {
        fn want(&self, len: usize, places: &Places, rows: &[[f32; LANES]]) -> Vec<f32> {
            let sums_stay = self.more.filter(|_| !self.half);
            let mut want = sums_stay.map_or(vec![f32::INFINITY; len], <[f32]>::to_vec);
            for (i, row) in rows.iter().enumerate() {
                for l in 0..places.starts.len() * places.each {
                    let at = FIRST + places.starts[l / places.each] + i * places.step + l % places.each;
                    let sum = row[l] + self.more.map_or(self.map.bias[l], |more| more[at]);
                    let y = sum * self.map.scale[l] + self.map.shift[l];
                    let y = self.slope.map_or(sum, |slope| if y > 0.0 { y } else { slope * y });
                    let y = match self.plus {
                        Some(Values::Single(x)) => y + x[at],
                        Some(Values::Bf16(x)) => y + widened(x[at]),
                        None => y,
                    };
                    want[at] = if self.half { widened(narrowed(y)) } else { y };
                }
            }
            want
        }

        /// What `put` leaves of sums before, or infinities.
        fn got(&self, len: usize, put: impl FnOnce(&Target<true>)) -> Vec<f32> {
            let mut sums = self.more.map_or(vec![f32::INFINITY; len], <[f32]>::to_vec);
            let mut halves = vec![narrowed(f32::INFINITY); len];
            let single = sums.as_mut_ptr();
            put(&Target {
                more: if self.more.is_some() { single } else { null_mut() },
                single,
                half: if self.half { halves.as_mut_ptr() } else { null_mut() },
                map: &self.map,
                slope: self.slope,
                plus: self.plus,
                len,
            });
            if self.half { halves.into_iter().map(widened).collect() } else { sums }
        }
    }

    fn check_unit<V: Lanes>() {
        for count in 1..=17 {
            for (each, step) in [(16, 16), (16, 24), (5, 24), (8, 8)] {
                let places = Places { starts: vec![0], each, step, count };
                // SAFETY: nobody else has the head; the caller found the unit.
                check(&places, |target, rows| unsafe { target.put_rows::<V>((FIRST, step), rows, each, ()) });
            }
            for (each, pieces) in [(2, 4), (2, 8), (4, 3), (4, 4), (8, 1), (8, 2)] {
                let starts: Vec<usize> = (0..pieces).map(|p| p * (count * each + 1)).collect();
                let places = Places { starts, each, step: each, count };
                // SAFETY: as above.
                check(&places, |target, rows| unsafe {
                    target.put_pieces::<V>((FIRST, &places.starts), rows, each, ());
                });
            }
        }
    }

    #[test]
    fn rows_and_pieces_go_where_they_belong_on_every_unit() {
        check_unit::<Plain>();
        check_unit::<Pairs<Plain>>();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                check_unit::<Avx2>();
            }
            if is_x86_feature_detected!("avx512f") {
                check_unit::<Avx512>();
            }
            if is_x86_feature_detected!("avx512bf16") {
                check_unit::<Pairs<Avx512>>();
            }
        }
    }
}
