//! Rows of sixteen sums on their way into a head: what is added to each, how it is mapped, what it is stored as.

use super::epilogue::LaneMap;
use super::plan::LANES;
use crate::device::lanes::{Job, Lanes};

/// Whole rows from one pause to the next.
const ROWS: usize = 8;

/// Rows that are written without asking whether there are more.
const TOGETHER: usize = 4;

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
pub struct Whole<'a, M, P, T, S> {
    pub rows: &'a [[f32; LANES]],
    /// What is added to the first row before it is mapped, and floats from there to what is added to the next.
    pub more: (*const f32, usize),
    pub map: M,
    pub plus: P,
    /// Where the first row goes.
    pub out: *mut T,
    /// Values from row to row there and in `plus`.
    pub step: usize,
    pub pause: S,
}

impl<M: Mapped, P: Plus, T: Value, S: Pause> Job for Whole<'_, M, P, T, S> {
    #[inline(always)]
    unsafe fn run<V: Lanes>(mut self) {
        // SAFETY: handed on from the caller.
        unsafe {
            let map = self.map.load::<V>();
            let mut left = 0;
            while self.rows.len() >= TOGETHER {
                if left == 0 {
                    self.pause.pause();
                    left = ROWS;
                }
                self.put::<V, TOGETHER>(map);
                left -= TOGETHER;
            }
            if left == 0 && !self.rows.is_empty() {
                self.pause.pause();
            }
            while !self.rows.is_empty() {
                self.put::<V, 1>(map);
            }
        }
    }
}

impl<M: Mapped, P: Plus, T: Value, S: Pause> Whole<'_, M, P, T, S> {
    /// Writes the first N rows, which are taken away.
    ///
    /// # Safety
    /// There are so many; as running the job.
    #[inline(always)]
    unsafe fn put<V: Lanes, const N: usize>(&mut self, map: Option<[V; 3]>) {
        let (more, more_step) = self.more;
        for i in 0..N {
            // SAFETY: handed on from the caller.
            unsafe {
                let sum = V::load(self.rows.get_unchecked(i).as_ptr());
                let sum = sum.add(V::load(more.wrapping_add(i * more_step)));
                let y = self.plus.next(i * self.step).add(mapped(sum, map));
                T::store(self.out.wrapping_add(i * self.step), y);
            }
        }
        // SAFETY: handed on from the caller.
        self.rows = unsafe { self.rows.get_unchecked(N..) };
        self.more.0 = more.wrapping_add(N * more_step);
        self.plus = self.plus.next(N * self.step);
        self.out = self.out.wrapping_add(N * self.step);
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
