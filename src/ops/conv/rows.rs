//! Rows of sixteen sums on their way into a head: what is added to each, how it is mapped, what it is stored as.

use super::epilogue::LaneMap;
use super::plan::LANES;
use crate::device::lanes::{Job, Lanes, interleaved};
use std::mem::MaybeUninit;

/// Rows that are written without asking whether there are more, and from one pause to the next.
const TOGETHER: usize = 8;

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
/// `before` and `plus` and written through `out`, which nobody else uses, and where `pause` may run.
pub struct Whole<'a, B, M, P, T, A, S> {
    pub rows: &'a [[f32; LANES]],
    /// What is added to a row before it is mapped.
    pub before: B,
    pub map: M,
    /// What is added to the first row when it has been mapped.
    pub plus: P,
    /// Where the first row goes.
    pub out: *mut T,
    /// Values from row to row there, in `before` and in `plus`.
    pub apart: A,
    pub pause: S,
}

impl<B: Before, M: Mapped, P: Plus, T: Value, A: Apart, S: Pause> Job for Whole<'_, B, M, P, T, A, S> {
    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let mut first = 0;
        // SAFETY: handed on from the caller; there are so many rows.
        unsafe {
            let constants = (self.before.load::<V>(), self.map.load::<V>());
            while first + TOGETHER <= self.rows.len() {
                self.pause.pause();
                for i in first..first + TOGETHER {
                    self.put(i, constants);
                }
                first += TOGETHER;
            }
            if first < self.rows.len() {
                self.pause.pause();
            }
            for i in first..self.rows.len() {
                self.put(i, constants);
            }
        }
    }
}

impl<B: Before, M: Mapped, P: Plus, T: Value, A: Apart, S: Pause> Whole<'_, B, M, P, T, A, S> {
    /// Writes row `i`.
    ///
    /// # Safety
    /// There is such a row; as running the job.
    #[inline(always)]
    unsafe fn put<V: Lanes>(&self, i: usize, (bias, map): (V, Option<[V; 3]>)) {
        let at = i * self.apart.values();
        // SAFETY: handed on from the caller.
        unsafe {
            let sum = self.before.add(V::load(self.rows.get_unchecked(i).as_ptr()), at, bias);
            T::store(self.out.wrapping_add(at), self.plus.add(mapped(sum, map), at));
        }
    }
}

/// Rows of which pieces of EACH values, PIECES of them a row, go to places of their own, each behind that of the row before.
/// Running it is safe where `rows.len() * EACH` values from each start on may be written, which nobody else uses, and where
/// `pause` may run.
pub struct Pieces<'a, M, T, S, const EACH: usize, const PIECES: usize> {
    pub rows: &'a [[f32; LANES]],
    /// Of the rows.
    pub bias: &'a LaneMap,
    pub map: M,
    pub out: *mut T,
    /// Where the first row's pieces go: values from `out` on, of at most PIECES.
    pub starts: &'a [usize],
    pub pause: S,
}

impl<M: Mapped, T: Value, S: Pause, const EACH: usize, const PIECES: usize> Job
    for Pieces<'_, M, T, S, EACH, PIECES>
{
    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        const { assert!(EACH * PIECES == LANES, "a square's pieces are whole vectors") };
        let (squares, rest) = self.rows.as_chunks::<PIECES>();
        // SAFETY: handed on from the caller.
        unsafe {
            let constants = (self.bias.load::<V>(), self.map.load::<V>());
            let mut first = 0;
            for square in squares {
                if first % TOGETHER == 0 {
                    self.pause.pause();
                }
                let pieces = Self::pieces::<V>(square, constants);
                for i in 0..PIECES {
                    let Some(&start) = self.starts.get(i) else { break };
                    T::store(self.out.wrapping_add(start + first * EACH), pieces[i]);
                }
                first += PIECES;
            }
            if rest.is_empty() {
                return;
            }
            self.pause.pause();
            let mut square = [[0.0; LANES]; PIECES];
            square[..rest.len()].copy_from_slice(rest);
            for (piece, start) in Self::pieces::<V>(&square, constants).into_iter().zip(self.starts) {
                let mut values = MaybeUninit::<[T; LANES]>::uninit();
                T::store(values.as_mut_ptr().cast(), piece);
                let out = self.out.wrapping_add(start + first * EACH);
                out.copy_from_nonoverlapping(values.as_ptr().cast(), rest.len() * EACH);
            }
        }
    }
}

impl<M: Mapped, T: Value, S: Pause, const EACH: usize, const PIECES: usize>
    Pieces<'_, M, T, S, EACH, PIECES>
{
    /// A row's pieces of as many rows as it has, each in one vector.
    ///
    /// # Safety
    /// V's vector unit exists.
    #[inline(always)]
    unsafe fn pieces<V: Lanes>(
        rows: &[[f32; LANES]; PIECES],
        (bias, map): (V, Option<[V; 3]>),
    ) -> [V; PIECES] {
        let mut vectors = [V::zero(); PIECES];
        for i in 0..PIECES {
            // SAFETY: sixteen floats.
            vectors[i] = mapped(unsafe { V::load(rows[i].as_ptr()) }.add(bias), map);
        }
        interleaved::<V, EACH, PIECES>(vectors)
    }
}

/// Values from a row's first to the next one's.
pub trait Apart: Copy {
    /// Their number.
    fn values(self) -> usize;
}

/// A row's values: rows lie one behind the other.
#[derive(Clone, Copy)]
pub struct Dense;

impl Apart for Dense {
    #[inline(always)]
    fn values(self) -> usize {
        LANES
    }
}

impl Apart for usize {
    #[inline(always)]
    fn values(self) -> usize {
        self
    }
}

/// What is added to sums before they are mapped.
pub trait Before: Copy {
    /// What is the same for all rows.
    ///
    /// # Safety
    /// V's vector unit exists.
    unsafe fn load<V: Lanes>(self) -> V;

    /// `sum` plus what belongs to the row `at` values from the first; `same` was loaded.
    ///
    /// # Safety
    /// It is readable; V's vector unit exists.
    unsafe fn add<V: Lanes>(self, sum: V, at: usize, same: V) -> V;
}

/// Biases.
impl Before for &LaneMap {
    #[inline(always)]
    unsafe fn load<V: Lanes>(self) -> V {
        // SAFETY: sixteen biases.
        unsafe { V::load(self.bias.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn add<V: Lanes>(self, sum: V, _: usize, bias: V) -> V {
        sum.add(bias)
    }
}

/// Sums of the groups before.
impl Before for *const f32 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(self) -> V {
        V::zero()
    }

    #[inline(always)]
    unsafe fn add<V: Lanes>(self, sum: V, at: usize, _: V) -> V {
        // SAFETY: handed on from the caller.
        unsafe { sum.add(V::load(self.wrapping_add(at))) }
    }
}

/// A sum, mapped by scales, shifts and a slope if there are any, every step rounded by itself.
#[inline(always)]
pub fn mapped<V: Lanes>(sum: V, map: Option<[V; 3]>) -> V {
    match map {
        None => sum,
        Some([scale, shift, slope]) => sum.mul(scale).add(shift).prelu(slope),
    }
}

/// An epilogue's map, or none.
pub trait Mapped: Copy {
    /// Its scales, shifts and slope.
    ///
    /// # Safety
    /// V's vector unit exists.
    unsafe fn load<V: Lanes>(self) -> Option<[V; 3]>;
}

/// None.
impl Mapped for () {
    #[inline(always)]
    unsafe fn load<V: Lanes>(self) -> Option<[V; 3]> {
        None
    }
}

/// With this slope.
impl Mapped for (&LaneMap, f32) {
    #[inline(always)]
    unsafe fn load<V: Lanes>(self) -> Option<[V; 3]> {
        let (LaneMap { scale, shift, .. }, slope) = self;
        // SAFETY: sixteen scales and shifts, and a slope.
        unsafe { Some([V::load(scale.as_ptr()), V::load(shift.as_ptr()), V::splat(&raw const slope)]) }
    }
}

/// What an epilogue adds last.
pub trait Plus: Copy {
    /// `y` plus the sixteen values `at` values from here.
    ///
    /// # Safety
    /// They are readable; V's vector unit exists.
    unsafe fn add<V: Lanes>(self, y: V, at: usize) -> V;
}

/// Nothing.
impl Plus for () {
    #[inline(always)]
    unsafe fn add<V: Lanes>(self, y: V, _: usize) -> V {
        y
    }
}

impl<T: Value> Plus for *const T {
    #[inline(always)]
    unsafe fn add<V: Lanes>(self, y: V, at: usize) -> V {
        // SAFETY: handed on from the caller.
        unsafe { y.add(T::load(self.wrapping_add(at))) }
    }
}

/// What activations are stored as.
pub trait Value: Copy {
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
