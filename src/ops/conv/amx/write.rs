//! Writing register tiles of sums to their head, and asking for the lines of it before.

use super::cover::Run;
use super::fold::{Fold, parity};
use super::micro::keep_awake;
use super::scheme::{BAND, Scheme};
use crate::device::amx::ROWS;
use crate::device::lanes::{Job, Lanes};
use crate::device::list::List;
use crate::ops::conv::epilogue::{LaneMap, Out, Stage};
use crate::ops::conv::plan::{Block, LANES, Map};
use crate::ops::conv::rows::Pause;
use crate::ops::conv::target::Target;

/// A lane block of a pass.
pub struct Lane<'a> {
    out: &'a Out<'a>,
    map: LaneMap,
    place: AnyPlace,
}

/// Where a register tile of sums belongs: to voxels of these anchors, of one lane block.
#[derive(Clone, Copy)]
pub struct Sum<'a> {
    /// The anchors.
    pub runs: &'a [Run],
    /// From which the runs' voxels count.
    pub voxel: usize,
    /// Number of the lane block.
    pub lane: usize,
}

impl Sum<'_> {
    /// Value of a head of `channels` channels at which a run's first voxel begins.
    #[inline(always)]
    fn at(&self, run: &Run, channels: usize) -> usize {
        (self.voxel + run.voxel) * channels
    }
}

impl<'a> Lane<'a> {
    /// Of one of the heads `outs`, whose spaces are `out_space`.
    pub fn new(
        block: Block,
        (map, scheme): (Map, &Scheme),
        outs: &'a [Out<'a>],
        [_, out_h, out_w]: [usize; 3],
    ) -> Self {
        let out = &outs[block.tensor];
        let place = match scheme.fold {
            None => {
                let step = map.outputs() * out.channels;
                AnyPlace::Voxel(Voxel { first: block.first, lanes: block.len, step })
            }
            Some(Fold::Outputs { channels }) => {
                let start = |first: usize| {
                    let [d, h, _] = parity((block.first + first) / channels);
                    (d * out_h + h) * out_w * channels
                };
                let each = 2 * channels;
                AnyPlace::Pairs { starts: (0..block.len).step_by(each).map(start).collect(), each }
            }
            Some(Fold::Band { channels }) => {
                AnyPlace::Band(Band { each: BAND * channels, row: out_w * channels })
            }
        };
        Lane { out, map: out.lane_map(|l| scheme.channel(block, l)), place }
    }

    /// Its head.
    #[inline(always)]
    pub fn target(&self, stage: Stage) -> Target<'_, true> {
        self.out.whole(&self.map, stage)
    }

    /// Stores, adds or finishes a register tile of sums of this lane block in its target.
    ///
    /// # Safety
    /// V's vector unit must exist; the thread must hold the tiles; nobody else may use these voxels' lanes.
    #[inline(always)]
    pub unsafe fn write<V: Lanes>(&self, sum: &Sum, target: &Target<true>, values: &[[f32; LANES]; ROWS]) {
        let channels = self.out.channels;
        // SAFETY: handed on from the caller.
        unsafe {
            match &self.place {
                &AnyPlace::Voxel(place) => V::call(Write { place, channels, sum, target, values }),
                &AnyPlace::Band(place) => V::call(Write { place, channels, sum, target, values }),
                AnyPlace::Pairs { starts, each } => {
                    let place = Pairs { starts, each: *each };
                    V::call(Write { place, channels, sum, target, values });
                }
            }
        }
    }

    /// Asks the cache for the lines that [`Self::write`] will write, and read: there is time until then.
    #[inline(never)]
    pub fn prefetch(&self, sum: &Sum, target: &Target<true>) {
        match &self.place {
            &AnyPlace::Voxel(place) => place.prefetch_all(sum, self.out.channels, target),
            &AnyPlace::Band(place) => place.prefetch_all(sum, self.out.channels, target),
            AnyPlace::Pairs { starts, each } => {
                Pairs { starts, each: *each }.prefetch_all(sum, self.out.channels, target);
            }
        }
    }
}

/// A [`Place`].
enum AnyPlace {
    Voxel(Voxel),
    Pairs { starts: List<usize>, each: usize },
    Band(Band),
}

/// Where a lane block's outputs of an anchor lie in the head, in values from the first of the anchor's first voxel on.
trait Place: Copy {
    /// Puts the values of a run whose first voxel begins `at` values after the target.
    ///
    /// # Safety
    /// As [`Lane::write`].
    unsafe fn put<V: Lanes>(self, target: &Target<true>, at: usize, run: &Run, values: &[[f32; LANES]]);

    /// Asks for their lines.
    fn prefetch(self, target: &Target<true>, at: usize, run: &Run);

    /// Asks for the lines of all runs of a sum.
    #[inline(always)]
    fn prefetch_all(self, sum: &Sum, channels: usize, target: &Target<true>) {
        for run in sum.runs {
            self.prefetch(target, sum.at(run, channels), run);
        }
    }
}

/// Channels of one voxel.
#[derive(Clone, Copy)]
struct Voxel {
    /// The first lane's.
    first: usize,
    lanes: usize,
    /// Values from an anchor to the next along w.
    step: usize,
}

impl Place for Voxel {
    #[inline(always)]
    unsafe fn put<V: Lanes>(self, target: &Target<true>, at: usize, _: &Run, values: &[[f32; LANES]]) {
        // SAFETY: handed on from the caller.
        unsafe { target.put_rows::<V>((at + self.first, self.step), values, self.lanes, KeepAwake) };
    }

    #[inline(always)]
    fn prefetch(self, target: &Target<true>, at: usize, run: &Run) {
        target.prefetch((at + self.first, self.step), run.len, self.lanes);
    }
}

/// [`Fold::Outputs`]: both outputs along w of every channel, neighbours in memory, of one anchor after the other.
#[derive(Clone, Copy)]
struct Pairs<'a> {
    /// Of each such two.
    starts: &'a [usize],
    /// Values of two.
    each: usize,
}

impl Place for Pairs<'_> {
    #[inline(always)]
    unsafe fn put<V: Lanes>(self, target: &Target<true>, at: usize, _: &Run, values: &[[f32; LANES]]) {
        // SAFETY: handed on from the caller; starts are of the parities of d and h, in their order.
        unsafe { target.put_pieces::<V>((at, self.starts), values, self.each, KeepAwake) };
    }

    #[inline(always)]
    fn prefetch(self, target: &Target<true>, at: usize, run: &Run) {
        for start in self.starts {
            target.prefetch((at + start, 0), 1, run.len * self.each);
        }
    }
}

/// [`Fold::Band`]: channels of neighbouring voxels.
#[derive(Clone, Copy)]
struct Band {
    /// Values of a band.
    each: usize,
    /// Values of a row of the head: its last band may go beyond its end.
    row: usize,
}

impl Band {
    /// Values of a run.
    #[inline(always)]
    fn values(self, run: &Run) -> usize {
        (run.len * self.each).min(self.row - run.w * self.each)
    }
}

impl Place for Band {
    #[inline(always)]
    unsafe fn put<V: Lanes>(self, target: &Target<true>, at: usize, run: &Run, values: &[[f32; LANES]]) {
        let Band { each, .. } = self;
        let whole = match self.values(run) {
            all if all == run.len * each => run.len,
            _ => run.len - 1,
        };
        // SAFETY: handed on from the caller.
        unsafe {
            target.put_rows::<V>((at, each), &values[..whole], each, KeepAwake);
            if whole < run.len {
                let rest = self.values(run) - whole * each;
                target.put_rows::<V>((at + whole * each, each), &values[whole..], rest, KeepAwake);
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, target: &Target<true>, at: usize, run: &Run) {
        target.prefetch((at, 0), 1, self.values(run));
    }
}

/// Writes a sum. Running it asks for what [`Lane::write`] does.
struct Write<'a, P> {
    place: P,
    /// Channels of the head.
    channels: usize,
    sum: &'a Sum<'a>,
    target: &'a Target<'a, true>,
    values: &'a [[f32; LANES]; ROWS],
}

impl<P: Place> Job for Write<'_, P> {
    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        for run in self.sum.runs {
            let at = self.sum.at(run, self.channels);
            // SAFETY: handed on from the caller.
            unsafe { self.place.put::<V>(self.target, at, run, &self.values[run.row..][..run.len]) };
        }
    }
}

/// Keeps the multiplier awake; the thread must hold [`crate::device::amx::Tiles`].
#[derive(Clone, Copy)]
struct KeepAwake;

impl Pause for KeepAwake {
    #[inline(always)]
    unsafe fn pause(self) {
        // SAFETY: handed on from the caller.
        unsafe { keep_awake() };
    }
}
