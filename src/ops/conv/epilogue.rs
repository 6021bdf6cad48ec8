//! What becomes of the sums of a pass: they are stored, or added to those of the source channels before; or, in inference,
//! finished in one go: norm and PReLU, a residual sum, rounding to bfloat16.
//!
//! A finished activation is written once, in half the bytes, and its consumers copy it as it is, where they would map
//! every value of a raw one for each tile that reads it.

use super::plan::LANES;
use super::row::Affine;
use super::target::Target;
use crate::device::arena::Buffer;
use crate::device::bf16::Operands;
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
    pub(super) bias: [f32; LANES],
    pub(super) scale: [f32; LANES],
    pub(super) shift: [f32; LANES],
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

    /// Where to write some of the `len` values of the head from value `start` on, of lanes that `map` is of. FINISHES is false
    /// only where [`Self::finishes`] is.
    #[inline(always)]
    pub fn target<'t, const FINISHES: bool>(
        &'t self,
        start: usize,
        len: usize,
        map: &'t LaneMap,
        stage: Stage,
    ) -> Target<'t, FINISHES> {
        debug_assert!(FINISHES || !self.finishes(stage));
        let finish = self.finish.as_ref().filter(|_| FINISHES && stage.last);
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
            len,
        }
    }

    /// All of the head as a target, whether it is finished or not.
    #[inline(always)]
    pub fn whole<'t>(&'t self, map: &'t LaneMap, stage: Stage) -> Target<'t, true> {
        let half = self.finish.as_ref().and_then(|f| f.half.as_ref());
        self.target(0, half.map_or(self.sums.size(), Disjoint::size), map, stage)
    }
}
