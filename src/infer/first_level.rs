//! Overlapping windows share the network's first level, which sees little around a voxel.
//!
//! Inside a window the first level's output is a function of the image alone: only its two outermost features on the low
//! side of an axis and its outermost one on the high side feel the window's edge, beyond which there is 0. (A convolution of
//! stride 2 reads one voxel before its first and none behind its last; the second convolution one feature on either side.)
//! So it is computed once for all windows of a row, those with one first plane, on a map of whose axes H and W each is
//!
//! ```text
//! shared part | 0 0 l l l p h h | 0 0 l l l p h h | ..        features; a group for each window that follows another
//! ```
//!
//! `l l l` are the first features of that window, `h h` the last ones of the one before, 0 a guard, which is made 0 between
//! the convolutions, and p has the voxel before h. Both first `l` and the last `h` are what the windows take from here; all
//! else comes from the shared part. A window that begins an odd number of voxels after the first one has other features:
//! it has them to itself, behind `0 0`.
//!
//! Along D a row takes over what it shares with the one before. The maps of two rows, and what lies between the two
//! convolutions, are in memory at once: of 270 x 270 voxels some 80 MB each in f32, half of that in bfloat16.
//!
//! Where windows overlap by half, what is computed is a quarter to a half of what they compute by themselves. Other levels
//! gain nothing: the more a level sees around a voxel, the more of a window feels its edge.
//!
//! Every value is the sum of the same products. Those that are summed one by one, and transforms (Winograd's) of pairs of
//! features that the window pairs too, have the same bits as in windows by themselves: the map has an even number of features
//! before everything, and along D a row takes over whole pairs. Where windows are an odd number of features apart, along any
//! axis, transforms are of other pairs, and round otherwise; so may matrix units, whose order of products depends on the width of
//! a layer.

use std::collections::BTreeSet;
use std::ops::Range;

use rayon::prelude::*;

use super::sliding_window::{Blend, Windows, axis_starts};
use crate::Result;
use crate::config::Window;
use crate::device::arena::{self, Buffer};
use crate::nn::UNet;
use crate::tensor::{Shape, Tensor, Values, ValuesMut};

/// Features that transforms pair.
const PAIR: usize = 2;

/// Features of a window's side at least: what feels one edge is apart from what feels the other.
const FEWEST: usize = 4 * PAIR;

/// Features of the map at most, of all that the windows have: less is not worth the copies.
const WORTH: f64 = 0.8;

/// Neighbouring features in a window and in the map.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    window: usize,
    map: usize,
    len: usize,
}

/// One axis of the map.
#[derive(Debug, Default)]
struct Axis {
    /// Which voxel of the volume, or beyond its edge, each voxel of the map's image is. `None` is 0. Two make a feature.
    image: Vec<Option<isize>>,
    /// Features that are 0 between the convolutions.
    guards: Vec<usize>,
    /// Where each window finds its features.
    windows: Vec<Vec<Run>>,
}

impl Axis {
    /// Of windows of `roi` voxels, from each of the ascending `starts` on.
    fn shared(starts: &[isize], roi: usize) -> Self {
        let mut axis = Axis::default();
        let (base, half, length) = (starts[0], roi / 2, roi as isize);
        let even = |start: isize| (start - base) % 2 == 0;
        let paired: Vec<isize> = starts.iter().copied().filter(|&start| even(start)).collect();
        axis.voxels(base..paired[paired.len() - 1] + length);
        axis.guards(axis.features() % PAIR);
        // The last feature of every window but the last.
        let highs: Vec<usize> = paired
            .windows(2)
            .map(|pair| {
                axis.guards(PAIR);
                axis.voxels(pair[1]..pair[1] + 6);
                axis.image.push(None);
                axis.voxels(pair[0] + length - 5..pair[0] + length);
                axis.features() - 1
            })
            .collect();
        for &start in starts {
            let runs = match paired.iter().position(|&s| s == start) {
                Some(i) => {
                    let begin = (start - base) as usize / 2;
                    let low = i.checked_sub(1).map(|i| Run { window: 0, map: highs[i] - 5, len: 2 });
                    let high = highs.get(i).map(|&map| Run { window: half - 1, map, len: 1 });
                    let first = if low.is_some() { 2 } else { 0 };
                    let len = half - first - usize::from(high.is_some());
                    let inner = Run { window: first, map: begin + first, len };
                    low.into_iter().chain([inner]).chain(high).collect()
                }
                None => {
                    axis.guards(PAIR);
                    let map = axis.features();
                    axis.voxels(start..start + length);
                    vec![Run { window: 0, map, len: half }]
                }
            };
            axis.windows.push(runs);
        }
        axis
    }

    /// Appends voxels.
    fn voxels(&mut self, voxels: Range<isize>) {
        self.image.extend(voxels.map(Some));
    }

    /// Appends guards.
    fn guards(&mut self, number: usize) {
        let first = self.features();
        self.guards.extend(first..first + number);
        self.image.extend(std::iter::repeat_n(None, 2 * number));
    }

    /// How many there are.
    fn features(&self) -> usize {
        self.image.len() / 2
    }
}

/// How the windows of volumes of one shape share the first level.
pub struct Shared<'a> {
    net: &'a UNet,
    /// (D, H, W) of a volume.
    shape: [usize; 3],
    config: &'a Window,
    /// The first planes of windows: each is a row of windows, which has a map.
    planes: Vec<isize>,
    /// The map's, along H and W.
    axes: [Axis; 2],
}

impl<'a> Shared<'a> {
    /// `None` where the network has no first level that is a function of the image, and where windows have no whole pairs of
    /// features or too few: H and W must be multiples of 4 voxels from 16 on, D even.
    pub fn new(net: &'a UNet, shape: [usize; 3], config: &'a Window) -> Option<Self> {
        let [depth, height, width] = config.roi;
        let fits = |side: usize| side.is_multiple_of(2 * PAIR) && side >= 2 * FEWEST;
        if !(net.has_first_level() && depth.is_multiple_of(2) && fits(height) && fits(width)) {
            return None;
        }
        let [planes, along_h, along_w] = axis_starts(shape, config);
        let axes = [Axis::shared(&along_h, height), Axis::shared(&along_w, width)];
        Some(Shared { net, shape, config, planes, axes })
    }

    /// Whether so much less is computed that it is worth the copies.
    pub fn is_worth_it(&self) -> bool {
        let features = |axis: &Axis| axis.windows.iter().flatten().map(|run| run.len).sum::<usize>();
        let [alone_h, alone_w] = self.axes.each_ref().map(features);
        let [together_h, together_w] = self.axes.each_ref().map(Axis::features);
        (together_h * together_w) as f64 <= WORTH * (alone_h * alone_w) as f64
    }

    /// Blended logits of a volume (D,H,W) as (D,H,W,C), those of [`sliding_window`]. A batch ends with its row. `told` hears
    /// before each how many windows it has, and may end it all.
    ///
    /// [`sliding_window`]: super::sliding_window::sliding_window
    ///
    /// # Errors
    /// Those of `told` and of the network, and [`crate::Error::Shape`] when the volume does not have the size it should.
    pub fn sliding_window(
        &self,
        volume: &[f32],
        out_channels: usize,
        told: &dyn Fn(usize) -> Result<()>,
    ) -> Result<Buffer> {
        let Shared { net, shape, config, .. } = *self;
        let windows = Windows::new(shape, config);
        let mut blend = Blend::new(&windows, &[volume], config, out_channels)?;
        let [along_h, along_w] = &self.axes;
        let of_row = |h| along_w.windows.iter().map(move |w: &Vec<Run>| [h, w]);
        let row: Vec<[&Vec<Run>; 2]> = along_h.windows.iter().flat_map(of_row).collect();
        // As even as rows allow.
        let batch = row.len().div_ceil(row.len().div_ceil(config.batch));
        let mut maps = Maps { shared: self, volume, lengths: BTreeSet::new() };
        let mut before = None;
        for (number, &plane) in self.planes.iter().enumerate() {
            let map = maps.next(plane, before)?;
            for (index, places) in row.chunks(batch).enumerate() {
                told(places.len())?;
                let logits = net.infer_from_first_level(gather(&map, places, config.roi))?;
                let first = number * row.len() + index * batch;
                blend.add(first..first + places.len(), logits.data())?;
            }
            before = Some((plane, map));
        }
        Ok(blend.finish().pop().expect("one volume in, one out"))
    }
}

/// Makes the maps of a volume.
struct Maps<'a> {
    shared: &'a Shared<'a>,
    volume: &'a [f32],
    /// Lengths of its buffers.
    lengths: BTreeSet<usize>,
}

impl Maps<'_> {
    /// Features (1, D/2, H, W, C) of the windows that begin at `plane`. In the planes that the row `before` has too they are
    /// that row's, but for those that feel an edge of either.
    fn next(&mut self, plane: isize, before: Option<(isize, Tensor)>) -> Result<Tensor> {
        let depth = self.shared.config.roi[0];
        let (depth, half) = (depth as isize, depth / 2);
        if let Some((first, map)) = before
            && (plane - first) % 2 == 0
        {
            let apart = (plane - first) as usize / 2;
            let inner = 2..half.saturating_sub(apart + 1);
            if inner.len() > half / 4 {
                // One feature more behind, and two or, so that pairs stay what they are, three before, which feel the edges of
                // what is computed.
                let low = self.features(plane..plane + 6)?;
                let begin = (inner.end - 2) / PAIR * PAIR;
                let high = self.features(plane + 2 * begin as isize..plane + depth)?;
                let rest = inner.end - begin..high.shape().d;
                let parts = [(&low, 0..2), (&map, inner.start + apart..inner.end + apart), (&high, rest)];
                return Ok(self.joined(&parts));
            }
        }
        self.features(plane..plane + depth)
    }

    /// The first level's output over these planes, beyond which there is 0.
    fn features(&mut self, planes: Range<isize>) -> Result<Tensor> {
        let Maps { shared: &Shared { net, shape, axes: [ref along_h, ref along_w], .. }, volume, .. } = *self;
        let image_shape = Shape::new(1, [planes.len(), along_h.image.len(), along_w.image.len()], 1);
        let mut image = Buffer::dirty(image_shape.len());
        let inside = |at: isize, len: usize| usize::try_from(at).ok().filter(|&at| at < len);
        let columns: Vec<_> = along_w.image.iter().map(|at| at.and_then(|at| inside(at, shape[2]))).collect();
        let slabs = image.par_chunks_mut(image_shape.h * image_shape.w);
        slabs.zip(planes.into_par_iter()).for_each(|(slab, d)| {
            for (row, h) in slab.chunks_exact_mut(image_shape.w).zip(&along_h.image) {
                match inside(d, shape[0]).zip(h.and_then(|h| inside(h, shape[1]))) {
                    None => row.fill(0.0),
                    Some((d, h)) => {
                        let x = &volume[(d * shape[1] + h) * shape[2]..][..shape[2]];
                        row.iter_mut().zip(&columns).for_each(|(to, at)| *to = at.map_or(0.0, |at| x[at]));
                    }
                }
            }
        });
        let image = Tensor::new(image_shape, image);
        let map = net.first_level(image, [&along_h.guards, &along_w.guards])?;
        self.lengths.extend([image_shape.len(), map.floats()]);
        Ok(map)
    }

    /// These planes of features, one after the other.
    fn joined(&mut self, parts: &[(&Tensor, Range<usize>)]) -> Tensor {
        let shape = Shape { d: parts.iter().map(|(_, planes)| planes.len()).sum(), ..parts[0].0.shape() };
        let stored = parts[0].0.stored_as();
        let mut room = Tensor::room(shape, stored);
        self.lengths.insert(room.len());
        let plane = shape.h * shape.w * shape.c;
        let planes = parts
            .iter()
            .flat_map(|(part, planes)| planes.clone().map(|d| part.values().part(d * plane, plane)));
        match Tensor::values_mut(shape, stored, &mut room) {
            ValuesMut::Single(to) => copy_planes(to, plane, planes.map(Values::single)),
            ValuesMut::Bf16(to) => copy_planes(to, plane, planes.map(Values::bf16)),
        }
        Tensor::stored(shape, stored, room)
    }
}

impl Drop for Maps<'_> {
    /// A volume's lengths may never come again.
    fn drop(&mut self) {
        self.lengths.iter().for_each(|&len| arena::release(len));
    }
}

fn copy_planes<'a, T: Copy + Send + Sync + 'a>(
    to: &mut [T],
    plane: usize,
    from: impl Iterator<Item = &'a [T]>,
) {
    let from: Vec<_> = from.collect();
    to.par_chunks_exact_mut(plane).zip(from).for_each(|(to, from)| to.copy_from_slice(from));
}

/// The first level's outputs (N, D/2, H/2, W/2, C) of the windows at these places of the map.
fn gather(map: &Tensor, places: &[[&Vec<Run>; 2]], roi: [usize; 3]) -> Tensor {
    let c = map.shape().c;
    let shape = Shape::new(places.len(), roi.map(|side| side / 2), c);
    let stored = map.stored_as();
    let mut room = Tensor::room(shape, stored);
    match (Tensor::values_mut(shape, stored, &mut room), map.values()) {
        (ValuesMut::Single(to), Values::Single(from)) => gather_values(to, shape, from, map.shape(), places),
        (ValuesMut::Bf16(to), Values::Bf16(from)) => gather_values(to, shape, from, map.shape(), places),
        _ => unreachable!("both are stored as the map is"),
    }
    Tensor::stored(shape, stored, room)
}

fn gather_values<T: Copy + Send + Sync>(
    to: &mut [T],
    shape: Shape,
    from: &[T],
    map: Shape,
    places: &[[&Vec<Run>; 2]],
) {
    let c = shape.c;
    to.par_chunks_mut(shape.h * shape.w * c).enumerate().for_each(|(i, plane)| {
        let (n, d) = (i / shape.d, i % shape.d);
        let [along_h, along_w] = places[n];
        for (h, map_h) in along_h.iter().flat_map(|run| (0..run.len).map(|i| (run.window + i, run.map + i))) {
            let to = &mut plane[h * shape.w * c..][..shape.w * c];
            let from = &from[(d * map.h + map_h) * map.w * c..][..map.w * c];
            for Run { window, map, len } in along_w {
                to[window * c..][..len * c].copy_from_slice(&from[map * c..][..len * c]);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::sliding_window::window_starts;

    /// Voxels that the first convolution reads for a feature of the map; `None` is 0.
    fn reads(axis: &Axis, feature: usize) -> [Option<isize>; 3] {
        let at = |i: isize| usize::try_from(i).ok().and_then(|i| axis.image[i]);
        [-1, 0, 1].map(|i| at(2 * feature as isize + i))
    }

    /// What the second convolution reads at a place of the map: what the first one read for it, or 0.
    fn sees(axis: &Axis, feature: isize) -> Option<[Option<isize>; 3]> {
        let inside =
            usize::try_from(feature).ok().filter(|&f| f < axis.features() && !axis.guards.contains(&f));
        inside.map(|f| reads(axis, f))
    }

    /// The definition: both convolutions of every window see, of every feature, what they would see in the window.
    #[test]
    fn windows_find_what_they_would_compute_by_themselves() {
        let mut others = 0;
        for (len, roi, overlap) in [
            (256, 96, 0.5),
            (293, 96, 0.5),
            (134, 96, 0.5),
            (96, 96, 0.5),
            (61, 16, 0.75),
            (77, 24, 0.6),
            (400, 160, 0.25),
        ] {
            let front = 3;
            let starts: Vec<isize> =
                window_starts(len, roi, overlap).into_iter().map(|start| start as isize - front).collect();
            let axis = Axis::shared(&starts, roi);
            assert!(axis.features().is_multiple_of(PAIR));
            for (&start, runs) in starts.iter().zip(&axis.windows) {
                let of = |feature: isize| {
                    let voxel = |i: isize| {
                        let at = 2 * feature + i;
                        (0..roi as isize).contains(&at).then_some(start + at)
                    };
                    (0..roi as isize / 2).contains(&feature).then(|| [-1, 0, 1].map(voxel))
                };
                let mut seen = vec![0; roi / 2];
                for i in runs.iter().flat_map(|run| (0..run.len).map(|i| (run.window + i, run.map + i))) {
                    seen[i.0] += 1;
                    for d in -1..2 {
                        let [window, map] = [i.0, i.1].map(|i| i as isize + d);
                        assert_eq!(
                            sees(&axis, map),
                            of(window),
                            "{len} {roi} {overlap}: window at {start}, {i:?}"
                        );
                    }
                    let paired = (start - starts[0]) % 4 != 2;
                    assert!(
                        !paired || i.0 % PAIR == i.1 % PAIR,
                        "{len} {roi} {overlap}: window at {start}, {i:?}"
                    );
                }
                assert!(seen.iter().all(|&n| n == 1), "{runs:?}");
                others += usize::from((start - starts[0]) % 2 == 1);
            }
        }
        assert!(others > 0, "some windows have features of their own");
    }
}
