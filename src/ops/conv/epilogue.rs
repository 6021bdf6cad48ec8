//! What becomes of the sums of a pass: they are stored, or added to those of the source channels before; or, in inference,
//! finished in one go: norm and PReLU, a residual sum, rounding to bfloat16.
//!
//! A finished activation is written once, in half the bytes, and its consumers copy it as it is, where they would map
//! every value of a raw one for each tile that reads it.

use super::plan::LANES;
use super::row::Affine;
use crate::device::arena::Buffer;
use crate::device::bf16::Operands;
use crate::device::cpu::{Lanes, prefetch_to_read, prefetch_to_write};
use crate::device::disjoint::Disjoint;
use crate::error::{Error, Result};
use crate::tensor::{Activation, Pending, Shape, Tensor, Values, ValuesMut};
use std::ptr::null_mut;

/// y = PReLU(scale * sum + shift) + plus, in f32, every step rounded by itself: for passes of inference.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    /// One scale and shift a channel, the same in all samples.
    pub map: Option<&'a Pending>,
    /// Of the output's shape, in host memory, with nothing pending.
    pub plus: Option<&'a Activation>,
    /// What y is stored as: f32, or bfloat16.
    pub stored: Operands,
}

impl Epilogue<'_> {
    /// Whether it fits an output of this shape.
    ///
    /// # Errors
    /// [`Error::Shape`] when it does not.
    pub fn check(&self, op: &'static str, out: Shape) -> Result<()> {
        let [scales, shifts] = self.map.map_or([out.c; 2], |map| [map.scale.len(), map.shift.len()]);
        let plus = self.plus.map_or(out, Activation::shape);
        let plain = self.plus.is_none_or(|plus| plus.pending().is_none() && plus.view().is_none());
        if [scales, shifts] == [out.c; 2] && plus == out && plain {
            return Ok(());
        }
        let want = format!("an epilogue for {out}, its summand on the host with nothing pending");
        Err(Error::Shape { op, want, got: format!("{scales} scales, {shifts} shifts and {plus}") })
    }
}

/// An output of a pass before it is a tensor.
pub struct Output<'a> {
    shape: Shape,
    epilogue: Option<Epilogue<'a>>,
    data: Buffer,
}

impl<'a> Output<'a> {
    /// Of unspecified values.
    pub fn new(shape: Shape, epilogue: Option<Epilogue<'a>>) -> Self {
        Output { shape, epilogue, data: Tensor::room(shape, stored(epilogue)) }
    }

    /// As the pass that writes all of it sees it.
    pub fn head<'h>(&'h mut self, bias: Option<&'h [f32]>) -> Head<'h> {
        let out = Tensor::values_mut(self.shape, stored(self.epilogue), &mut self.data);
        Head { out, channels: self.shape.c, bias, epilogue: self.epilogue }
    }

    /// What was written.
    pub fn tensor(self) -> Tensor {
        Tensor::stored(self.shape, stored(self.epilogue), self.data)
    }
}

fn stored(epilogue: Option<Epilogue>) -> Operands {
    epilogue.map_or(Operands::Single, |e| e.stored)
}

/// One output of a pass.
pub struct Head<'a> {
    /// Where its values go, NDHWC, all of them written; bfloat16 with an epilogue alone.
    out: ValuesMut<'a>,
    /// Channels of the output.
    pub channels: usize,
    /// Added to every voxel, one a channel.
    bias: Option<&'a [f32]>,
    /// What is done to the sums.
    epilogue: Option<Epilogue<'a>>,
}

impl<'a> Head<'a> {
    /// Sums in f32, NDHWC, and nothing done to them.
    pub fn sums(out: &'a mut [f32], channels: usize, bias: Option<&'a [f32]>) -> Self {
        Head { out: ValuesMut::Single(out), channels, bias, epilogue: None }
    }

    /// Room for the sums that one of `groups` of source channels leaves to the next, where the head's own is not for f32.
    pub fn partial_sums(&self, groups: usize) -> Buffer {
        Buffer::dirty(match &self.out {
            ValuesMut::Bf16(out) if groups > 1 => out.len(),
            ValuesMut::Single(_) | ValuesMut::Bf16(_) => 0,
        })
    }
}

/// Which group of source channels is summed: the first one writes, others add, the last one finishes.
#[derive(Clone, Copy)]
pub struct Stage {
    /// Whether no group came before.
    pub first: bool,
    /// Whether none comes after.
    pub last: bool,
}

impl Stage {
    /// Group `index` of `groups`.
    pub fn of(index: usize, groups: usize) -> Self {
        Stage { first: index == 0, last: index + 1 == groups }
    }
}

/// What the lanes of a row of values have of their channels.
#[repr(align(64))]
pub struct LaneMap {
    bias: [f32; LANES],
    scale: [f32; LANES],
    shift: [f32; LANES],
}

/// A head, shared by tasks that write different voxels or channels of it.
pub struct Out<'a> {
    /// Channels of the head.
    pub channels: usize,
    bias: Option<&'a [f32]>,
    /// The head itself, or partial sums of one of bfloat16.
    sums: Disjoint<'a>,
    finish: Option<Finish<'a>>,
}

/// An epilogue.
struct Finish<'a> {
    /// The head, if it is of bfloat16.
    half: Option<Disjoint<'a, u16>>,
    map: Affine<'a>,
    plus: Option<Values<'a>>,
}

impl<'a> Out<'a> {
    /// Shares a head and its [`Head::partial_sums`] until the borrow ends.
    pub fn new(head: &'a mut Head, partial_sums: &'a mut [f32]) -> Self {
        let Head { ref mut out, channels, bias, epilogue } = *head;
        let (sums, half) = match out {
            ValuesMut::Single(out) => (Disjoint::new(out), None),
            ValuesMut::Bf16(out) => (Disjoint::new(partial_sums), Some(Disjoint::new(out))),
        };
        let finish = epilogue.map(|Epilogue { map, plus, .. }| Finish {
            half,
            map: map.map(|p| (&p.scale[..], &p.shift[..], p.slope)),
            plus: plus.map(|plus| plus.raw().values()),
        });
        Out { channels, bias, sums, finish }
    }

    /// What rows need whose lane l is of channel `channel(l)`.
    pub fn lane_map(&self, channel: impl Fn(usize) -> Option<usize>) -> LaneMap {
        let of = |values: Option<&[f32]>| {
            std::array::from_fn(|l| values.zip(channel(l)).map_or(0.0, |(values, c)| values[c]))
        };
        let map = self.finish.as_ref().and_then(|f| f.map);
        LaneMap { bias: of(self.bias), scale: of(map.map(|m| m.0)), shift: of(map.map(|m| m.1)) }
    }

    /// Whether values of this stage are finished, not sums.
    pub fn finishes(&self, stage: Stage) -> bool {
        stage.last && self.finish.is_some()
    }

    /// Where to write some of the `len` values of the head from value `start` on, of lanes that `map` is of. FINISHES must
    /// be what [`Self::finishes`] says.
    #[inline(always)]
    pub fn target<'t, const FINISHES: bool>(
        &'t self,
        start: usize,
        len: usize,
        map: &'t LaneMap,
        stage: Stage,
    ) -> Target<'t, FINISHES> {
        debug_assert_eq!(FINISHES, self.finishes(stage));
        let finish = self.finish.as_ref().filter(|_| FINISHES);
        let half = finish.and_then(|f| f.half.as_ref()).map_or(null_mut(), |half| half.at(start, len));
        let unused = stage.first && !half.is_null();
        let sums = if unused { null_mut() } else { self.sums.at(start, len) };
        Target {
            more: if stage.first { null_mut() } else { sums },
            single: sums,
            half,
            map,
            slope: finish.and_then(|f| f.map).map(|map| map.2),
            plus: finish.and_then(|f| f.plus).map(|plus| plus.part(start, len)),
        }
    }

    /// Stores, adds or finishes the first `len` values of every row; row i belongs `i * step` values after value `start`.
    ///
    /// # Safety
    /// Nobody else uses these values of the head; V's vector unit exists.
    #[inline(always)]
    pub unsafe fn put_rows<V: Lanes>(
        &self,
        (start, step): (usize, usize),
        rows: &[[f32; LANES]],
        len: usize,
        map: &LaneMap,
        stage: Stage,
    ) {
        let Some(last) = rows.len().checked_sub(1) else { return };
        let span = last * step + len;
        // SAFETY: handed on from the caller.
        unsafe {
            if self.finishes(stage) {
                self.target::<true>(start, span, map, stage).put_rows::<V>(step, rows, len);
            } else {
                self.target::<false>(start, span, map, stage).put_rows::<V>(step, rows, len);
            }
        }
    }

    /// Asks the cache for what writing `rows` rows to a target will write, and read, of the head: there is time until they
    /// are.
    #[inline(always)]
    pub fn prefetch(&self, (start, step): (usize, usize), rows: usize, len: usize, stage: Stage) {
        let Some(last) = rows.checked_sub(1) else { return };
        let span = last * step + len;
        let finish = self.finish.as_ref().filter(|_| stage.last);
        match finish.and_then(|f| f.half.as_ref()) {
            Some(half) => prefetch_lines(half.at(start, span), span, step, prefetch_to_write),
            None => prefetch_lines(self.sums.at(start, span), span, step, prefetch_to_write),
        }
        match finish.and_then(|f| f.plus) {
            Some(Values::Single(x)) => prefetch_lines(x[start..].as_ptr(), span, step, prefetch_to_read),
            Some(Values::Bf16(x)) => prefetch_lines(x[start..].as_ptr(), span, step, prefetch_to_read),
            None => {}
        }
    }
}

/// Asks for the lines of `span` values from `p` on, of which some of every `step` are used.
#[inline(always)]
fn prefetch_lines<T>(p: *const T, span: usize, step: usize, ask: fn(*const T)) {
    (0..span).step_by(step.max(64 / size_of::<T>())).for_each(|i| ask(p.wrapping_add(i)));
}

/// A part of a head, as one that writes lanes to it sees it.
pub struct Target<'a, const FINISHES: bool> {
    /// Sums of the groups before, or null.
    more: *const f32,
    /// Where f32 values go.
    single: *mut f32,
    /// Where bfloat16 ones go instead, or null.
    half: *mut u16,
    map: &'a LaneMap,
    /// If there is a map.
    slope: Option<f32>,
    plus: Option<Values<'a>>,
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
            let y = self.mapped(sums.add(V::load(more)));
            let y = match self.plus.filter(|_| FINISHES) {
                None => y,
                Some(Values::Single(x)) => x.add(at, y),
                Some(Values::Bf16(x)) => x.add(at, y),
            };
            if self.half.is_null() { self.single.put(at, y) } else { self.half.put(at, y) }
        }
    }

    /// The epilogue's map of a sum.
    ///
    /// # Safety
    /// V's vector unit exists.
    #[inline(always)]
    unsafe fn mapped<V: Lanes>(&self, sum: V) -> V {
        let Some(slope) = self.slope.filter(|_| FINISHES) else { return sum };
        let LaneMap { scale, shift, .. } = self.map;
        // SAFETY: sixteen scales and shifts, and a slope.
        unsafe {
            sum.mul(V::load(scale.as_ptr())).add(V::load(shift.as_ptr())).prelu(V::splat(&raw const slope))
        }
    }

    /// The same for the first `len` of sixteen sums.
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

    /// See [`Out::put_rows`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn put_rows<V: Lanes>(&self, step: usize, rows: &[[f32; LANES]], len: usize) {
        // SAFETY: handed on from the caller.
        unsafe {
            if len < LANES {
                for (i, row) in rows.iter().enumerate() {
                    self.put_few(i * step, V::load(row.as_ptr()), len);
                }
                return;
            }
            // What all rows have in common is asked once.
            match (self.plus.filter(|_| FINISHES), self.half.is_null()) {
                (None, true) => self.put_whole::<V>(step, rows, (), self.single),
                (None, false) => self.put_whole::<V>(step, rows, (), self.half),
                (Some(Values::Single(x)), true) => self.put_whole::<V>(step, rows, x, self.single),
                (Some(Values::Single(x)), false) => self.put_whole::<V>(step, rows, x, self.half),
                (Some(Values::Bf16(x)), true) => self.put_whole::<V>(step, rows, x, self.single),
                (Some(Values::Bf16(x)), false) => self.put_whole::<V>(step, rows, x, self.half),
            }
        }
    }

    /// [`Self::put`] of every row, with the target's summand and place.
    ///
    /// # Safety
    /// As [`Self::put`].
    #[inline(always)]
    unsafe fn put_whole<V: Lanes>(
        &self,
        step: usize,
        rows: &[[f32; LANES]],
        plus: impl Plus,
        place: impl Place,
    ) {
        let (more, more_step) =
            if self.more.is_null() { (self.map.bias.as_ptr(), 0) } else { (self.more, step) };
        for (i, row) in rows.iter().enumerate() {
            // SAFETY: handed on from the caller.
            unsafe {
                let y = self.mapped(V::load(row.as_ptr()).add(V::load(more.add(i * more_step))));
                place.put(i * step, plus.add(i * step, y));
            }
        }
    }
}

/// What an epilogue adds last.
trait Plus: Copy {
    /// `y` plus what belongs `at` values from the target's first.
    ///
    /// # Safety
    /// Sixteen values from there are readable; V's vector unit exists.
    unsafe fn add<V: Lanes>(self, at: usize, y: V) -> V;
}

/// Nothing.
impl Plus for () {
    #[inline(always)]
    unsafe fn add<V: Lanes>(self, _: usize, y: V) -> V {
        y
    }
}

impl Plus for &[f32] {
    #[inline(always)]
    unsafe fn add<V: Lanes>(self, at: usize, y: V) -> V {
        // SAFETY: handed on from the caller.
        unsafe { y.add(V::load(self.as_ptr().add(at))) }
    }
}

impl Plus for &[u16] {
    #[inline(always)]
    unsafe fn add<V: Lanes>(self, at: usize, y: V) -> V {
        // SAFETY: handed on from the caller.
        unsafe { y.add(V::load_bf16(self.as_ptr().add(at))) }
    }
}

/// Where a target's values go.
trait Place: Copy {
    /// Writes sixteen, `at` values from the first.
    ///
    /// # Safety
    /// As [`Target::put`].
    unsafe fn put<V: Lanes>(self, at: usize, y: V);
}

impl Place for *mut f32 {
    #[inline(always)]
    unsafe fn put<V: Lanes>(self, at: usize, y: V) {
        // SAFETY: handed on from the caller.
        unsafe { y.store(self.add(at)) }
    }
}

impl Place for *mut u16 {
    #[inline(always)]
    unsafe fn put<V: Lanes>(self, at: usize, y: V) {
        // SAFETY: handed on from the caller.
        unsafe { y.store_bf16(self.add(at)) }
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
