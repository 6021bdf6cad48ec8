//! The outer-product core: gradients of weights.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::halves::widen_voxels;
use super::micro::{outer_product, store_rows};
use super::narrow::transform_neighbours;
use super::partials::{Partials, Task};
use super::plan::{Block, LANES, Origin, Tile};
use super::row::transform_row;
use super::thin_wgrad;
use super::tile::{Element, Order, Place, load};
use super::{Problem, Source, winograd};
use crate::device::arena::Buffer;
use crate::device::bf16::{Operands, Pairs};
use crate::device::cpu::{Simd, simd, simd_of_pairs};
#[cfg(target_arch = "x86_64")]
use crate::device::lanes::x86::{Avx2, Avx512};
use crate::device::lanes::{Lanes, Plain};
use crate::device::list::List;
use crate::device::scratch::Scratch;
use crate::tensor::Values;

/// `dw[lane channel][source channel][tap]` = sum over samples and anchors of
/// `source[anchor * stride + tap - pad] * lane_source[anchor]`.
///
/// `sources` lie on `space` and are read with a halo; `lane_sources` lie on the anchors (stride 1 or 2 coarser).
/// Returns one tensor a lane source. For a convolution (x, dy) that is PyTorch's (O, I, k, k, k), for a transposed
/// one (dy, x) its (I, O, k, k, k).
pub fn wgrad(problem: Problem, sources: &[Source], lane_sources: &[Source]) -> List<Buffer> {
    let Problem { map, operands, n, space, out_space: anchors, .. } = problem;
    if thin_wgrad::fits(map, sources, lane_sources) {
        return List::of_one(thin_wgrad::wgrad(operands, n, space, &sources[0], &lane_sources[0]));
    }
    #[cfg(target_arch = "x86_64")]
    if amx::multiplies(&problem, sources, lane_sources) {
        return amx::wgrad(problem, sources, lane_sources);
    }
    if winograd::multiplies(&problem, sources, lane_sources) {
        return winograd::wgrad(problem, sources, lane_sources);
    }
    // The sums run over voxels: so do pairs.
    let (element, voxels) = match operands {
        Operands::Single => (Element::Single, 1),
        Operands::Bf16 => (Element::Voxels, 2),
    };
    let steps = anchors[2].div_ceil(voxels);
    let class = &map.classes()[0];
    let (mut largest, mut tiles) = (Tile { d: 1, h: 1 }, List::default());
    let partials = Partials::new(map.kernel().pow(3), sources, lane_sources, 1, |channels| {
        largest = Tile::choose(map, anchors, channels);
        tiles = largest.origins(n, anchors);
        tiles.len()
    });
    let sums = partials.sums(
        Scratch::take,
        |&Task { block, lanes, tiles: ref of_split, .. },
         sum,
         scratch: &mut (Buffer, Buffer, Vec<_>, Vec<_>)| {
            let (tile, lane_tile, row, pairs) = scratch;
            let width = lanes.len() * LANES;
            let tiles = &tiles[of_split.clone()];
            let place = |i: usize| Place {
                map,
                space,
                row: map.extent(anchors[2]),
                origin: &tiles[i],
                before: i.checked_sub(1).map(|before| &tiles[before]),
            };
            for (i, origin) in tiles.iter().enumerate() {
                let size = origin.size;
                let (eh, ew) = (map.extent(size.h), map.extent(anchors[2]));
                let tile = tile.first(map.extent(largest.d) * eh * ew * block.len);
                let order = Order::Voxels { pitch: block.len };
                load(&sources[block.tensor], block, &place(i), (order, element), tile, row);
                let lane_tile = lane_tile.first(size.d * size.h * steps * width);
                load_lanes(lane_sources, lanes, (anchors, element), origin, lane_tile, row);
                // Rows too short to fill registers are taken three at a time: all kh of a kd.
                let floats = class.taps_w.len() * block.len;
                let groups = if floats == 3 && class.rows.len().is_multiple_of(3) { 3 } else { 1 };
                let parts = class.rows.len() / groups;
                for (index, rows) in class.rows.chunks_exact(groups).enumerate() {
                    if i + 1 < tiles.len() {
                        let next = place(i + 1);
                        next.prefetch(&sources[block.tensor], block, (index, parts));
                        for &lane in lanes {
                            let source = &lane_sources[lane.tensor];
                            next.of_anchors(anchors).prefetch(source, lane, (index, parts));
                        }
                    }
                    let (dd, hh, _, _) = rows[0];
                    pairs.clear();
                    pairs.extend((0..size.d * size.h).map(|i| (i / size.h, i % size.h)).map(|(d, h)| {
                        let row = (d * map.stride() + dd) * eh + h * map.stride() + hh;
                        (row * ew * block.len, (d * size.h + h) * steps * width)
                    }));
                    let job = Job {
                        x: tile,
                        x_pitch: voxels * map.stride() * block.len,
                        group: ew * block.len,
                        dy: lane_tile,
                        width,
                        pairs,
                        steps,
                        element,
                        rows: floats,
                        groups,
                        first: i == 0,
                    };
                    let floats = groups * floats * width;
                    job.run(&mut sum[index * floats..][..floats]);
                }
            }
        },
    );
    partials.finish(sums, sources, lane_sources)
}

/// Copies the lane side of a tile, mapped, to `[voxel or pair of them][lane block][16]`. Lanes beyond a tensor's channels are
/// left as they are: nobody reads their sums.
fn load_lanes(
    sources: &[Source],
    lanes: &[Block],
    (space, element): ([usize; 3], Element),
    &Origin { n, d: d0, h: h0, size }: &Origin,
    out: &mut [f32],
    row: &mut Vec<f32>,
) {
    let width = lanes.len() * LANES;
    let row_floats = out.len() / (size.d * size.h);
    for (index, block) in lanes.iter().enumerate() {
        let s = &sources[block.tensor];
        let pending = s.affine(n, *block);
        for (i, out) in out.chunks_exact_mut(row_floats).enumerate() {
            let voxel = ((n * space[0] + d0 + i / size.h) * space[1] + h0 + i % size.h) * space[2];
            let (start, span) = (voxel * s.channels + block.first, (space[2] - 1) * s.channels + block.len);
            let (x, out) = (s.data.part(start, span), &mut out[index * LANES..]);
            match (element, x) {
                (Element::Voxels, x) => {
                    transform_neighbours((out, width), (x, s.channels), block.len, pending, row);
                }
                (_, Values::Single(x)) => transform_row(out, width, x, s.channels, block.len, pending),
                (_, Values::Bf16(x)) => widen_voxels(out, width, x, s.channels, block.len),
            }
        }
    }
}

/// One (kd, kh) of one tile, or all kh of one kd: rows (kw, channel) by all lanes.
struct Job<'a> {
    x: &'a [f32],
    x_pitch: usize,
    /// Floats between the input rows of neighbouring kh.
    group: usize,
    dy: &'a [f32],
    width: usize,
    pairs: &'a [(usize, usize)],
    /// Voxels, or pairs of them.
    steps: usize,
    element: Element,
    /// (kw, channel) pairs of a kh.
    rows: usize,
    /// Number of kh.
    groups: usize,
    /// Whether this is the first tile of a sum: it writes, the others add.
    first: bool,
}

impl Job<'_> {
    /// Writes the tile's outer products to, or adds them to, `sum[row][lane]`.
    fn run(&self, sum: &mut [f32]) {
        match (self.element, simd()) {
            (Element::Voxels, _) => self.run_pairs(sum),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd()` found the features.
            (_, Simd::Avx512) => unsafe { self.run_avx512(sum) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd()` found the features.
            (_, Simd::Avx2) => unsafe { self.run_avx2::<Avx2>(sum) },
            // SAFETY: plain Rust needs no feature.
            _ => unsafe { self.run_lanes::<Plain, 2>(sum) },
        }
    }

    /// The same for elements that are pairs.
    fn run_pairs(&self, sum: &mut [f32]) {
        match simd_of_pairs() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd_of_pairs()` found the features.
            Simd::Avx512 => unsafe { self.run_avx512_bf16(sum) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd_of_pairs()` found the features.
            Simd::Avx2 => unsafe { self.run_avx2::<Pairs<Avx2>>(sum) },
            // SAFETY: plain Rust needs no feature.
            _ => unsafe { self.run_lanes::<Pairs<Plain>, 2>(sum) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512(&self, sum: &mut [f32]) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx512, 24>(sum) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,fma")]
    unsafe fn run_avx512_bf16(&self, sum: &mut [f32]) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Pairs<Avx512>, 24>(sum) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2<V: Lanes>(&self, sum: &mut [f32]) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<V, 6>(sum) }
    }

    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes, const ACCUMULATORS: usize>(&self, sum: &mut [f32]) {
        let mut lane = 0;
        while lane < self.width {
            let two = ACCUMULATORS >= 24 && lane + 2 * LANES <= self.width;
            let mut row = 0;
            while row < self.rows {
                // SAFETY: rows and lanes are clipped to the tile and to `sum`.
                row += unsafe {
                    match (self.groups, two) {
                        (3, true) if ACCUMULATORS >= 24 => self.add::<V, 3, 9, 2>(row, lane, sum),
                        (3, _) if ACCUMULATORS >= 24 => self.add::<V, 3, 9, 1>(row, lane, sum),
                        (3, _) if ACCUMULATORS >= 6 && row + 2 <= self.rows => {
                            self.add::<V, 2, 6, 1>(row, lane, sum)
                        }
                        (3, _) => self.add::<V, 1, 3, 1>(row, lane, sum),
                        (_, true) if ACCUMULATORS >= 24 => self.run_rows::<V, 12, 2>(row, lane, sum),
                        _ if ACCUMULATORS >= 24 => self.run_rows::<V, 24, 1>(row, lane, sum),
                        _ if ACCUMULATORS >= 6 => self.run_rows::<V, 6, 1>(row, lane, sum),
                        _ => self.run_rows::<V, 2, 1>(row, lane, sum),
                    }
                };
            }
            lane += if two { 2 * LANES } else { LANES };
        }
    }

    /// The largest run of at most `MAX` rows that fits; returns its length.
    #[inline(always)]
    unsafe fn run_rows<V: Lanes, const MAX: usize, const Q: usize>(
        &self,
        row: usize,
        lane: usize,
        sum: &mut [f32],
    ) -> usize {
        // SAFETY: handed on from the caller.
        unsafe {
            match (self.rows - row).min(MAX) {
                24.. if MAX >= 24 => self.add::<V, 24, 24, Q>(row, lane, sum),
                12.. if MAX >= 12 => self.add::<V, 12, 12, Q>(row, lane, sum),
                6.. if MAX >= 6 => self.add::<V, 6, 6, Q>(row, lane, sum),
                2.. => self.add::<V, 2, 2, Q>(row, lane, sum),
                _ => self.add::<V, 1, 1, Q>(row, lane, sum),
            }
        }
    }

    /// Computes P rows of every group, RP in all, for Q lane blocks; returns P.
    #[inline(always)]
    unsafe fn add<V: Lanes, const P: usize, const RP: usize, const Q: usize>(
        &self,
        row: usize,
        lane: usize,
        sum: &mut [f32],
    ) -> usize {
        let (x, dy) = (self.x[row..].as_ptr(), self.dy[lane..].as_ptr());
        // SAFETY: every voxel of the tile has `rows` floats from its own on in every group, and 16 Q lanes.
        unsafe {
            let acc = outer_product::<V, P, RP, Q>(
                (x, self.x_pitch, [0, self.group, 2 * self.group]),
                (dy, self.width),
                self.pairs,
                self.steps,
            );
            store_rows::<V, P, RP, Q>(acc, sum, (row, self.rows), (lane, self.width), !self.first);
        }
        P
    }
}
